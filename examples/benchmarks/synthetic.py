# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and statistics of any shape, drawn at random; what is chosen from them means nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from optimum_moe_prune import CalibrationStats
from optimum_moe_prune.architectures.routers import SoftmaxTopK
from optimum_moe_prune.statistics.needs import PER_EXPERT, PER_SAMPLE, PER_TOKEN, Need
from optimum_moe_prune.statistics.samples import Sample, keep_tokens
from optimum_moe_prune.statistics.stats import LayerStats
from optimum_moe_prune.storage.files import sync
from optimum_moe_prune.storage.tensor_files import header_bytes

_BLOCK = 2**24 + 43  # random numbers that are drawn once; no multiple of a row, so that no two tensors repeat
_GRAM_HIDDEN = 64

# ------------------------------------------------------------------------------------------- checkpoints


def moe_config(**sizes: Any) -> Qwen2MoeConfig:
    """A Qwen2-MoE in bfloat16, its positions enough for any benchmark."""
    config = Qwen2MoeConfig(max_position_embeddings=8192, dtype="bfloat16", **sizes)
    config.architectures = ["Qwen2MoeForCausalLM"]
    return config


def checkpoint_shards(config: Qwen2MoeConfig, fused: bool = False) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of a checkpoint's tensors: the embeddings, each decoder layer, the rest.

    Args:
        config: Of the model.
        fused: Experts in the first dimension of one tensor; else each has tensors of its own, as published.
    """
    with torch.device("meta"):
        whole = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in whole.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        number = int(layer[1]) + 1 if layer else 0 if "embed" in name else config.num_hidden_layers + 1
        shard = shards.setdefault(number, {})
        stem, _, last = name.rpartition(".experts.")
        if fused or not stem:
            shard[name] = shape
            continue
        count, rows, columns = shape
        parts = {"down_proj": rows} if last == "down_proj" else dict.fromkeys(("gate_proj", "up_proj"), rows // 2)
        for expert in range(count):
            for part, height in parts.items():
                shard[f"{stem}.experts.{expert}.{part}.weight"] = (height, columns)
    return [shard for _, shard in sorted(shards.items())]


def shards_bytes(shards: list[dict[str, tuple[int, ...]]]) -> int:
    """Bytes of all tensors, in bfloat16."""
    return sum(2 * torch.Size(shape).numel() for shard in shards for shape in shard.values())


def write_checkpoint(folder: Path, config: Qwen2MoeConfig, fused: bool = False) -> bool:
    """Write a checkpoint of random weights, one file after another, with no tensor in memory.

    All tensors are pieces of one block of random numbers, each from another place in it. Experts differ, activations
    stay of the size they have in a model that begins its training, and routers spread their tokens.

    Returns:
        Whether it was written; False where the same one was there already.
    """
    shards = checkpoint_shards(config, fused)
    text = config.to_json_string()
    marker = folder / "config.json"
    index = folder / "model.safetensors.index.json"
    weight_map = {name: _file(n, len(shards)) for n, shard in enumerate(shards) for name in shard}
    if marker.is_file() and marker.read_text() == text and json.loads(index.read_text())["weight_map"] == weight_map:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    router = 2 / config.hidden_size**0.5  # logits of deviation 2
    blocks = {deviation: (block * deviation).bfloat16() for deviation in (config.initializer_range, router)}
    place = torch.Generator().manual_seed(1)
    for number, shard in enumerate(shards):
        header = header_bytes(
            {name: ("BF16", shape, 2 * torch.Size(shape).numel()) for name, shape in shard.items()}, {"format": "pt"}
        )
        with open(folder / _file(number, len(shards)), "wb") as file:
            file.write(header)
            for name, shape in shard.items():
                if name.endswith("norm.weight"):
                    pieces = iter([torch.ones(shape, dtype=torch.bfloat16)])
                else:
                    values = blocks[router if name.endswith("mlp.gate.weight") else config.initializer_range]
                    begin = int(torch.randint(_BLOCK, (1,), generator=place))
                    pieces = _cyclic(values, begin, torch.Size(shape).numel())
                for piece in pieces:
                    file.write(piece.view(torch.uint8).numpy())
        sync(folder / _file(number, len(shards)))
    values = {"metadata": {"total_size": shards_bytes(shards)}, "weight_map": weight_map}
    index.write_text(json.dumps(values, indent=1) + "\n")
    marker.write_text(text)
    return True


def _file(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _cyclic(block: Tensor, begin: int, count: int) -> Iterator[Tensor]:
    """So many numbers of a block from a place on, as views; after its end it begins again."""
    while count:
        piece = block[begin : begin + count]
        yield piece
        begin, count = 0, count - len(piece)


# ------------------------------------------------------------------------------------------- statistics


def random_stats(
    layers: int, experts: int, top_k: int, samples: int, needs: set[Need], kept: int = 0, hidden: int = 0
) -> CalibrationStats:
    """Statistics as a calibration would leave them, drawn at random.

    Args:
        layers: MoE layers.
        experts: Experts of each.
        top_k: Experts used per token.
        samples: Calibration samples.
        needs: What there is.
        kept: Tokens for which statistics per token are kept.
        hidden: The hidden size, where inputs or Gram matrices are asked for; these are of vectors of that size, or of
            64 numbers where it is larger.
    """
    random = torch.Generator().manual_seed(0)
    entries = tuple(Sample(f"{n:064x}", "all", max(512, -(-kept // samples))) for n in range(samples))
    token_sample, token_position = keep_tokens(entries, kept, seed=0)
    weights = torch.ones(samples, dtype=torch.float64)
    per_sample, per_token, of_experts = (
        [name for need in sorted(needs) for name in table.get(need, ())]
        for table in (PER_SAMPLE, PER_TOKEN, PER_EXPERT)
    )
    made = {}
    for layer in range(layers):
        tensors = {}
        for name in per_sample:
            tensors[name] = 1 + 99 * torch.rand(samples, experts, dtype=torch.float64, generator=random)
        if Need.COACTIVATION in needs:
            tensors["coactivation"] = torch.rand(samples, experts if layer else 0, experts, generator=random)
        for name in of_experts:
            tensors[name] = 1 + torch.rand(experts, dtype=torch.float64, generator=random)
        for name in per_token:
            tensors[name] = _per_token(name, kept, experts, hidden, random)
        made[layer] = LayerStats(experts, SoftmaxTopK(top_k, True, False), tensors, weights, token_sample)
    model = {"model_type": "mixtral", "top_k": top_k, "fingerprint": "random"}
    return CalibrationStats(model, entries, made, frozenset(needs), token_sample, token_position, kept, 0)


def _per_token(name: str, kept: int, experts: int, hidden: int, random: torch.Generator) -> Tensor:
    if name == "logits":
        return (2 * torch.randn(kept, experts, generator=random)).bfloat16()
    if name in ("token_single_error", "token_dense_norm"):
        return torch.randn(kept, experts, generator=random).exp()
    if name == "token_output_energy":
        return torch.randn(kept, 1, generator=random).exp()
    if name == "inputs":  # in clouds, as the tokens of texts are
        centres = torch.randn(32, hidden, generator=random)
        cloud = torch.randint(len(centres), (kept,), generator=random)
        return (centres[cloud] + torch.randn(kept, hidden, generator=random)).bfloat16()
    rows, columns = torch.triu_indices(experts, experts)
    gram = torch.empty(kept, len(rows))
    for tokens in torch.arange(kept).split(256):
        outputs = torch.randn(len(tokens), experts, min(hidden, _GRAM_HIDDEN), generator=random)
        gram[tokens] = (outputs @ outputs.transpose(1, 2))[:, rows, columns]
    return gram
