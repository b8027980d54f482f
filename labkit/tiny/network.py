"""The network: a small Qwen2, its loss, and its export in the Hugging Face layout."""

import json
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AttentionInterface, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from labkit.tiny.batches import Batch
from labkit.tiny.tokenizer import END_OF_TEXT, IM_END, save_tokenizer

# 8 query heads share 2 key-value heads; fused, the attention input is 384 = 3 x 128 wide, so
# that every layer size suits 4-bit groups of 128.
SIZES = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 768, "max_position_embeddings": 2048,
}  # fmt: skip
SHARD = "6MB"  # so that the 11 MB of weights make two shards and an index


def plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention as two matrix products; query (batch, heads, length, width).

    On a CPU the backward pass of the fused kernel takes longer than all matrix products of the
    network together; like this the whole training step is 1.5 times faster.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    rows = (query * scaling).reshape(batch, groups, heads // groups * length, width)
    scores = (rows @ key.transpose(-1, -2)).view(batch, groups, heads // groups, length, length)
    future = torch.full((length, length), float("-inf"), dtype=scores.dtype).triu(1)
    weights = torch.softmax(scores + future, dim=-1).view(batch, groups, -1, length)
    mixed = (weights @ value).view(batch, heads, length, width)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain_attention)


def build(tokenizer: Tokenizer, sizes: dict | None = None) -> Qwen2ForCausalLM:
    """A fresh network of the given sizes (default: the bundled model's), in float32."""
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(IM_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        **(sizes or SIZES),
    )
    return Qwen2ForCausalLM(config)


def batch_loss(model: Qwen2ForCausalLM, batch: Batch, device: str) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy over the trained tokens, and how many they are.

    The vocabulary projection runs only where a token is trained, which saves about a tenth.
    """
    ids = torch.tensor(batch.ids, device=device)
    wanted = torch.tensor(batch.trained, device=device)[:, 1:]
    with torch.autocast(device, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[wanted])
    loss = functional.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="sum")
    return loss, int(wanted.sum())


def gradients(model: Qwen2ForCausalLM, batch: Batch, device: str) -> tuple[list, float, int]:
    """Gradients of the summed loss for all parameters, that loss, and the trained tokens."""
    loss, trained = batch_loss(model, batch, device)
    return torch.autograd.grad(loss, list(model.parameters())), loss.item(), trained


def _generation_config(model: Qwen2ForCausalLM) -> GenerationConfig:
    """Greedy by default: a model this small wanders when it samples."""
    config = model.config
    return GenerationConfig(
        do_sample=False,
        eos_token_id=[config.eos_token_id, config.pad_token_id],
        pad_token_id=config.pad_token_id,
    )


def export(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path, notes: dict) -> None:
    """Writes config, tokenizer, bf16 shards with their index, and training.json.

    Everything is written beside the target first and moved file by file, so that a reader never
    meets a half-written shard.
    """
    staging = folder.with_name(folder.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    half = Qwen2ForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    half.generation_config = _generation_config(model)
    half.save_pretrained(staging, max_shard_size=SHARD)
    save_tokenizer(tokenizer, staging, model.config.max_position_embeddings)
    (staging / "training.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    staging.rmdir()
