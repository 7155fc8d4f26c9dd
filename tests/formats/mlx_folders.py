# SPDX-License-Identifier: Apache-2.0
"""MLX folders as ``mlx_lm.convert`` writes them, made of tiny models without mlx."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

BITS, GROUP = 4, 8


def packed(weight: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    """A matrix, or a stack of them, quantised as mlx does in its affine mode; and the numbers that it then is."""
    grouped = weight.float().unflatten(-1, (-1, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / (2**bits - 1)).clamp_min(1e-6)
    numbers = ((grouped - low[..., None]) / scales[..., None]).round().clamp(0, 2**bits - 1)
    stream = numbers.flatten(-2).to(torch.uint8)[..., None] >> torch.arange(bits, dtype=torch.uint8) & 1
    bytes_ = (stream.flatten(-2).unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)).sum(-1)
    return {
        "weight": bytes_.to(torch.uint8).contiguous().view(torch.uint32),
        "scales": scales,
        "biases": low,
        "numbers": (numbers * scales[..., None] + low[..., None]).flatten(-2),
    }


def mlx_tensors(model: PreTrainedModel, quantised: bool = False) -> dict[str, Tensor]:
    """The tensors of a model's MLX folder: experts stacked, and these and the routers quantised if asked for."""
    model.save_pretrained(folder := Path(model._folder))  # type: ignore[arg-type]
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    renamed = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if match := re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name):
            path = f"{match[1]}.switch_mlp.{renamed.get(match[3], match[3])}.weight"
            stacks.setdefault(path, {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    found |= {name: torch.stack([parts[e] for e in sorted(parts)]) for name, parts in stacks.items()}
    if not quantised:
        return found
    for name in [name for name in found if ".switch_mlp." in name or name.endswith(".gate.weight")]:
        made = packed(found.pop(name), BITS if ".switch_mlp." in name else 8, GROUP)
        found |= {f"{name.removesuffix('weight')}{kind}": made[kind] for kind in ("weight", "scales", "biases")}
    return found


def write_mlx(folder: Path, model: PreTrainedModel, tensors: dict[str, Tensor], **config: object) -> Path:
    """Write a folder, with its index and files that people leave there."""
    folder.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "mlx"})
    values = json.loads(Path(model._folder, "config.json").read_text())  # type: ignore[arg-type]
    if any(name.endswith(".scales") for name in tensors):
        own = {name.removesuffix(".scales"): {"group_size": GROUP, "bits": 8} for name in tensors if "gate.s" in name}
        settings = {"group_size": GROUP, "bits": BITS, "mode": "affine", **own}
        values |= {"quantization": settings, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    index = {
        "metadata": {"total_size": 1, "total_parameters": 2},
        "weight_map": dict.fromkeys(tensors, "model.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: some/model\nlibrary_name: mlx\n---\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
