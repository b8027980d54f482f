"""Which settings to take for a model on a machine, each with its reason."""

from dataclasses import dataclass, replace

from labkit.errors import SettingsError
from labkit.hardware import BFLOAT16_COMPUTE_CAPABILITY, GIB, MIB, MIN_COMPUTE_CAPABILITY
from labkit.memory import UTILIZATION, Choices, Place, Plan, plan
from labkit.shapes import AWQ_GROUP, Shape

RANKS = (2, 4, 8)
USERS = 4  # requests of full length that a server should hold at once
CPU_USERS = 16  # on a CPU, where the cache is what one asks for
SHORTEST = 2048  # below this a chat forgets too soon
ROOM = GIB  # left to others where they hold memory already


@dataclass(frozen=True)
class Advice:
    """A setting of vLLM, the value to give it, and why."""

    setting: str
    value: str
    reason: str


@dataclass(frozen=True)
class Recommendation:
    """What to set, the shape that this is for (perhaps in 4 bits), and what it gives."""

    shape: Shape
    choices: Choices
    plan: Plan
    advice: tuple[Advice, ...]

    def __str__(self) -> str:
        lines = [str(self.plan), "", "Recommended:"]
        lines += [f"  {a.setting} = {a.value}: {a.reason}" for a in self.advice]
        return "\n".join(lines)


def recommend(shape: Shape, place: Place) -> Recommendation:
    """Settings under which the model runs there; raises SettingsError where none do."""
    _check_capability(place)
    shape, ranks, found = _made_to_fit(shape, place)
    choices, advice = _memory(shape, place)
    choices = replace(choices, tensor_parallel_size=ranks)
    # The model that it came to decides the type, and the type is what one sets first.
    advice = [_dtype(shape, place), *advice, *found]
    choices, found = _length(shape, place, choices)
    advice += found
    return Recommendation(shape, choices, plan(shape, place, choices), tuple(advice))


def _check_capability(place: Place) -> None:
    if place.on_gpu and place.capability < MIN_COMPUTE_CAPABILITY:
        raise SettingsError(
            f"vLLM does not run on a {place.name}.",
            "It has compute capability {}.{}, and vLLM 0.32 needs 7.5.".format(*place.capability),
            "Take a T4 or newer, or run on the CPU.",
        )


def _dtype(shape: Shape, place: Place) -> Advice:
    if place.on_gpu and place.capability < BFLOAT16_COMPUTE_CAPABILITY:
        return Advice("dtype", "half", f"a {place.name} does not compute in bfloat16")
    if shape.awq_group and place.on_gpu:
        return Advice("dtype", "auto", "the checkpoint says it, and its kernel takes both 16 bits")
    return Advice("dtype", "bfloat16", "what Qwen2.5 is stored in: nothing is converted")


def _memory(shape: Shape, place: Place) -> tuple[Choices, list[Advice]]:
    """How much to take: of a GPU a share, of a CPU's memory a cache of a set size."""
    return _share(place) if place.on_gpu else _on_cpu(shape, place)


def _share(place: Place) -> tuple[Choices, list[Advice]]:
    """The share of a GPU to take: less than vLLM's default where others hold some already."""
    if place.taken < GIB // 2:
        return Choices(), []
    free = (place.total_bytes - place.taken - ROOM) / place.total_bytes
    share = round(min(UTILIZATION, max(0.01, free)), 2)
    reason = f"other programs hold {place.taken / GIB:.1f} GiB of it"
    advice = Advice("gpu_memory_utilization", f"{share:.2f}", reason)
    return Choices(gpu_memory_utilization=share), [advice]


def _on_cpu(shape: Shape, place: Place) -> tuple[Choices, list[Advice]]:
    """A cache of a set size, at most half of what is free beside the weights, and no compiling."""
    free = max(0, place.total_bytes - place.taken - shape.weight_bytes())
    enough = CPU_USERS * shape.longest * shape.kv_bytes_per_token()
    size = max(MIB, min(free // 2, enough) // MIB * MIB)
    choices = Choices(kv_cache_memory_bytes=size, enforce_eager=True)
    return choices, [
        Advice("kv_cache_memory_bytes", f"{size}",
               "a share would be of all the memory here, also of what others need"),
        Advice("enforce_eager", "True", "compiling takes half a minute here and pays off late"),
    ]  # fmt: skip


def _made_to_fit(shape: Shape, place: Place) -> tuple[Shape, int, list[Advice]]:
    """The first way out of a lack of memory that leads to SHORTEST tokens of cache.

    Returns the shape, the number of cards, and why.
    """

    def fits(tried: Shape, ranks: int = 1) -> bool:
        choices, length = _memory(tried, place)[0], min(SHORTEST, shape.longest)
        choices = replace(choices, max_model_len=length, tensor_parallel_size=ranks)
        return plan(tried, place, choices).fits

    if fits(shape):
        return shape, 1, []
    needed = f"the weights take {shape.weight_bytes() / GIB:.1f} GiB in this form"
    small = shape
    if place.four_bits and not shape.awq_group:
        small = shape.but(name=f"{shape.name}-AWQ", awq_group=AWQ_GROUP)
        needed += f", and {small.weight_bytes() / GIB:.1f} GiB in 4 bits"
        if fits(small):
            return small, 1, [Advice("model", small.name, needed)]
    for ranks in RANKS:
        if ranks <= place.cards and shape.heads % ranks == 0 and fits(small, ranks):
            advice = [Advice("tensor_parallel_size", str(ranks), f"{needed}: more than one card")]
            if small is not shape:
                advice.insert(0, Advice("model", small.name, "4-bit weights need fewer cards"))
            return small, ranks, advice
    raise SettingsError(
        f"{shape.name} does not fit on {place.name}.",
        f"{needed[0].upper()}{needed[1:]}.",
        "Take a smaller model.",
    )


def _length(shape: Shape, place: Place, choices: Choices) -> tuple[Choices, list[Advice]]:
    """A context that USERS requests can have at once."""
    whole = plan(shape, place, choices)
    if whole.max_concurrency >= USERS:
        return replace(choices, max_model_len=shape.longest), []
    length = max(min(SHORTEST, shape.longest), whole.kv_tokens // USERS // 1024 * 1024)
    chosen = replace(choices, max_model_len=min(length, shape.longest))
    at_once = whole.kv_tokens // chosen.max_model_len
    reason = (
        f"the cache holds {whole.kv_tokens:,} tokens: {at_once} requests of this length, "
        f"or one of up to {whole.longest_that_fits:,}"
    )
    return chosen, [Advice("max_model_len", f"{chosen.max_model_len}", reason)]
