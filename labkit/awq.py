"""AWQ on a CPU: 4-bit weights, scaled so that those which matter keep their precision.

The method is that of Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv:2306.00978);
the files are laid out as AutoAWQ writes them ("gemm"), which vLLM reads without any flag.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from labkit import weights
from labkit.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Qwen2ForCausalLM

BITS = 4
MOST = 2**BITS - 1
# The order in which eight 4-bit numbers lie in one 32-bit number.
PACKING = (0, 2, 4, 6, 1, 3, 5, 7)
RATIOS = 20  # exponents tried between 0 (no scaling) and 1
SHRINKS = 10  # steps of clipping tried, down to half of the range
MOST_ROWS = 512  # activations that a search looks at
METHODS = ("awq", "round")
KEPT_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
              "chat_template.jinja", "generation_config.json")  # fmt: skip


@dataclass(frozen=True)
class Quantized:
    """A weight (out, in) as integers 0..15 with a scale and a zero point for each group."""

    integers: "Tensor"  # (out, in)
    scales: "Tensor"  # (out, groups)
    zeros: "Tensor"  # (out, groups)

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.integers.shape[1] // self.scales.shape[1]

    def dequantized(self) -> "Tensor":
        """The weights that the kernel will compute with, (out, in) in float32."""
        zeros = self.zeros.repeat_interleave(self.group, dim=1)
        return (self.integers - zeros) * self.scales.repeat_interleave(self.group, dim=1)


def scheme(group: int) -> dict[str, object]:
    """What config.json says of such weights."""
    return {
        "quant_method": "awq", "bits": BITS, "group_size": group, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": None,
    }  # fmt: skip


def quantize_weight(weight: "Tensor", group: int, shrink: "Tensor | float" = 1.0) -> Quantized:
    """Round each group of `group` weights in a row to 16 levels between its least and largest.

    `weight` is (out, in); `shrink` narrows the range, as one number or one (out, groups).
    """
    import torch

    rows = weight.reshape(weight.shape[0], -1, group)
    shrink = torch.as_tensor(shrink, dtype=rows.dtype).expand(rows.shape[:2])
    high, low = rows.amax(-1) * shrink, rows.amin(-1) * shrink
    # The scale is kept in 16 bits, so the rounding must use what those bits hold.
    scales = ((high - low).clamp(min=1e-5) / MOST).half().float()
    zeros = (-low / scales).round().clamp(0, MOST)
    integers = (rows / scales[..., None]).round() + zeros[..., None]
    return Quantized(integers.clamp(0, MOST).reshape(weight.shape), scales, zeros)


def pack(numbers: "Tensor") -> "Tensor":
    """Eight 4-bit numbers along the last axis in one int32 each."""
    import torch

    parts = numbers.to(torch.int64).reshape(*numbers.shape[:-1], -1, 8)
    packed = sum(parts[..., place] << (4 * i) for i, place in enumerate(PACKING))
    return packed.to(torch.int32)


def _tensors(name: str, quantized: Quantized) -> dict[str, "Tensor"]:
    """The three tensors of a linear layer as the file holds them: (in, out) and packed."""
    return {
        f"{name}.qweight": pack(quantized.integers.T),
        f"{name}.qzeros": pack(quantized.zeros.T),
        f"{name}.scales": quantized.scales.T.half().contiguous(),
    }


# ---- the search -----------------------------------------------------------------------------


def _search_scales(inputs: "Tensor", linears: Sequence["nn.Linear"], group: int) -> "Tensor":
    """One scale for each input channel: the mean size of its activations to the best power.

    Scaling a weight up before rounding, and its input down, makes its rounding error smaller.
    """
    import torch

    size = inputs.abs().mean(0).clamp(min=1e-4)
    weight = torch.cat([linear.weight for linear in linears])
    wanted, best = inputs @ weight.T, (torch.ones_like(size), float("inf"))
    for step in range(RATIOS):
        scales = size ** (step / RATIOS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        rounded = quantize_weight(weight * scales, group).dequantized() / scales
        error = (inputs @ rounded.T - wanted).square().mean().item()
        best = min(best, (scales, error), key=lambda found: found[1])
    return best[0]


def _search_shrink(inputs: "Tensor", weight: "Tensor", group: int) -> "Tensor":
    """How far to narrow each group's range, (out, groups): clipping outliers helps the others."""
    import torch

    rows = weight.reshape(weight.shape[0], -1, group)
    parts = inputs.reshape(inputs.shape[0], -1, group)
    best = torch.full(rows.shape[:2], float("inf"))
    chosen = torch.ones(rows.shape[:2])
    for step in range(SHRINKS + 1):
        shrink = 1 - step / SHRINKS / 2
        rounded = quantize_weight(weight, group, shrink).dequantized().reshape(rows.shape)
        off = torch.einsum("ngi,ogi->nog", parts, rounded - rows).square().mean(0)
        better = off < best
        best, chosen = torch.where(better, off, best), chosen.masked_fill(better, shrink)
    return chosen


def _fold(before: "nn.Module", linears: Iterable["nn.Linear"], scales: "Tensor") -> None:
    """Multiply the weights' input channels by the scales, and divide what comes before by them."""
    if before.weight.dim() == 1:
        before.weight.div_(scales)
    else:
        before.weight.div_(scales[:, None])
        if before.bias is not None:
            before.bias.div_(scales)
    for linear in linears:
        linear.weight.mul_(scales)


class _Activations:
    """What the layers of a model are given while it reads the samples, (tokens, channels)."""

    def __init__(self, model: "Qwen2ForCausalLM", samples: Sequence[Sequence[int]]) -> None:
        import torch

        self.kept: dict[nn.Module, list[Tensor]] = {}
        # All of them would be gigabytes; some of each sample, so that every sample counts.
        self.rows_each = max(1, 4 * MOST_ROWS // max(1, len(samples)))
        linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
        hooks = [linear.register_forward_pre_hook(self._keep) for linear in linears]
        for sample in samples:
            model.model(input_ids=torch.tensor([list(sample)]))
        for hook in hooks:
            hook.remove()

    def _keep(self, module: "nn.Module", inputs: tuple["Tensor", ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        some = rows[:: max(1, len(rows) // self.rows_each)].clone()
        self.kept.setdefault(module, []).append(some)

    def of(self, module: "nn.Module") -> "Tensor":
        """An even choice of the inputs of a layer."""
        import torch

        rows = torch.cat(self.kept[module])
        return rows[:: max(1, len(rows) // MOST_ROWS)]


def _awq(layer: "nn.Module", seen: _Activations, group: int) -> dict["nn.Linear", Quantized]:
    """Scale, clip and round the linear parts of one layer."""
    attention, mlp = layer.self_attn, layer.mlp
    scaled = (
        (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        (mlp.up_proj, (mlp.down_proj,)),
    )
    inputs = {linear: seen.of(linear) for linear in _linears(layer).values()}
    for before, linears in scaled:
        scales = _search_scales(inputs[linears[0]], linears, group)
        _fold(before, linears, scales)
        for linear in linears:
            inputs[linear] = inputs[linear] / scales
    # Queries and keys meet in a product, where the error of a clipped range would multiply.
    kept_whole = (attention.q_proj, attention.k_proj)
    return {
        linear: quantize_weight(
            linear.weight,
            group,
            1.0 if linear in kept_whole else _search_shrink(rows, linear.weight, group),
        )
        for linear, rows in inputs.items()
    }


def _linears(module: "nn.Module") -> dict[str, "nn.Linear"]:
    import torch

    return {n: m for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}


# ---- whole checkpoints ----------------------------------------------------------------------


def channel_sizes(source: str | Path, samples: Sequence[Sequence[int]]) -> dict[str, "Tensor"]:
    """Of each linear layer by name, the mean size of every input channel over the samples."""
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = weights.find(source)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    with torch.no_grad():
        seen = _Activations(model, samples)
    names = {module: name for name, module in model.model.named_modules()}
    return {names[linear]: seen.of(linear).abs().mean(0) for linear in seen.kept}


def quantize(
    source: str | Path,
    target: Path,
    samples: Sequence[Sequence[int]] = (),
    method: str = "awq",
    group: int = 128,
    show: Callable[[str], None] = print,
) -> Path:
    """Write a 4-bit copy of a Qwen2 checkpoint to `target` and return that directory.

    `samples` are token numbers of texts like those that the model will meet; "awq" needs them,
    "round" rounds plainly. Embedding, norms and biases stay in 16 bits. Raises WeightsError
    where the checkpoint or the group does not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = weights.find(source)
    _refuse(checkpoint, method, group, samples)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    packed: dict[str, Tensor] = {}
    with torch.no_grad():
        seen = _Activations(model, samples) if method == "awq" else None
        for number, layer in enumerate(model.model.layers):
            done = _awq(layer, seen, group) if seen else _round(layer, group)
            for name, linear in _linears(layer).items():
                packed |= _tensors(f"model.layers.{number}.{name}", done[linear])
            show(f"layer {number + 1} of {len(model.model.layers)}")
        kept = {
            name: tensor.half()
            for name, tensor in model.state_dict().items()
            if name.removesuffix(".weight") + ".qweight" not in packed
            and not (name == "lm_head.weight" and model.config.tie_word_embeddings)
        }
    _write(checkpoint, target, packed | kept, group)
    return target


def _round(layer: "nn.Module", group: int) -> dict["nn.Linear", Quantized]:
    return {linear: quantize_weight(linear.weight, group) for linear in _linears(layer).values()}


def _refuse(
    checkpoint: weights.Checkpoint, method: str, group: int, samples: Sequence[Sequence[int]]
) -> None:
    config = checkpoint.config
    if config.get("quantization_config"):
        raise WeightsError(f"{checkpoint.name} is quantized already.",
                           "Its weights have 4 bits; there is nothing left to round.",
                           "Take the checkpoint that it was made from.")  # fmt: skip
    if config.get("model_type") != "qwen2":
        raise WeightsError(f"{checkpoint.name} is a {config.get('model_type')} model.",
                           "This quantiser knows the layers of Qwen2 and Qwen2.5 only.",
                           "Take a Qwen2 checkpoint, or llm-compressor.")  # fmt: skip
    widths = (config["hidden_size"], config["intermediate_size"])
    if group < 32 or group % 32 or any(width % group for width in widths):
        raise WeightsError(f"Groups of {group} do not fit this model.",
                           f"Its layers are {widths[0]} and {widths[1]} wide.",
                           "Choose 128, 64 or 32, whichever divides both.")  # fmt: skip
    if method not in METHODS:
        raise WeightsError(f"There is no method {method!r}.", "", "Use 'awq' or 'round'.")
    if method == "awq" and not samples:
        raise WeightsError("AWQ needs sample texts.",
                           "It looks at which inputs of a layer are large.",
                           "Pass the token numbers of some dialogues.")  # fmt: skip


def _write(
    checkpoint: weights.Checkpoint, target: Path, tensors: dict[str, "Tensor"], group: int
) -> None:
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    (target / weights.INDEX).unlink(missing_ok=True)  # of shards that were there before
    for name in KEPT_FILES:
        if (checkpoint.path / name).exists():
            shutil.copyfile(checkpoint.path / name, target / name)
    config = checkpoint.config | {"dtype": "float16", "quantization_config": scheme(group)}
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, target / weights.SINGLE, metadata={"format": "pt"})
    (target / weights.SINGLE).chmod(0o644)
