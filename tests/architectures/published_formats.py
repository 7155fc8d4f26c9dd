# SPDX-License-Identifier: Apache-2.0
"""The number formats of published checkpoints: to them, and back without transformers.

Every ``to_`` function takes weights [..., out, in] and returns the tensors a file holds for them by the end of their
names; ``dequantised`` reads a folder and gives the weights under the names they have without quantisation.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""What three bits of a four-bit float stand for; the fourth is the sign."""
FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


def _spread(scale: torch.Tensor, rows: int, columns: int, block: tuple[int, int]) -> torch.Tensor:
    """A scale for every number: blocks of rows and columns, the last ones cut."""
    wide = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., :rows, :columns]


def _largest(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest magnitude of every block; never zero."""
    rows, columns = weight.shape[-2:]
    down, across = -rows % block[0], -columns % block[1]
    padded = torch.nn.functional.pad(weight.float().abs(), (0, across, 0, down))
    tiles = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    return tiles.amax((-1, -3)).clamp_min(1e-12)


def to_fp8(weight: torch.Tensor, block: tuple[int, int], power_of_two: bool = False) -> Tensors:
    """Blocks with one float32 factor each (``weight_scale_inv``), or with a power of two in eight bits (``scale``)."""
    scale = _largest(weight, block) / torch.finfo(FP8).max
    if power_of_two:
        scale = torch.exp2(torch.log2(scale).ceil())
    wide = _spread(scale, *weight.shape[-2:], block)
    tensors = {"weight": (weight.float() / wide).to(FP8)}
    return tensors | ({"scale": scale.to(torch.float8_e8m0fnu)} if power_of_two else {"weight_scale_inv": scale})


def _to_e2m1(scaled: torch.Tensor) -> torch.Tensor:
    """The nearest four-bit floats, two in a byte, the first one in the lower half."""
    code = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    return (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8)


def _from_e2m1(packed: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    return E2M1[codes % 8] * (1 - 2 * (codes // 8))


def to_mxfp4(weight: torch.Tensor) -> Tensors:
    """32 four-bit floats with a power of two: bytes [..., out, in / 2] and exponents + 127 [..., out, in / 32]."""
    exponent = torch.log2(_largest(weight, (1, 32)) / 6).ceil()
    packed = _to_e2m1(weight.float() / _spread(torch.exp2(exponent), *weight.shape[-2:], (1, 32)))
    return {"packed": packed, "exponents": (exponent + 127).to(torch.uint8)}


def to_nvfp4(weight: torch.Tensor) -> Tensors:
    """16 four-bit floats with an eight-bit float, and one float32 for the whole."""
    whole = weight.float().abs().max() / (6 * torch.finfo(FP8).max)
    scale = (_largest(weight, (1, 16)) / 6 / whole).to(FP8)
    wide = _spread(scale.float() * whole, *weight.shape[-2:], (1, 16))
    packed = _to_e2m1(weight.float() / wide.clamp_min(1e-12))
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.01)}


def to_int4(weight: torch.Tensor, group: int = 32) -> Tensors:
    """Whole numbers -8 to 7, eight in an int32, the first one in the lowest bits; a bfloat16 factor for each group."""
    scale = (_largest(weight, (1, group)) / 7.5).bfloat16()
    wide = _spread(scale.float(), *weight.shape[-2:], (1, group))
    codes = (weight.float() / wide).round().clamp(-8, 7).long() + 8
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = (codes << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape).int()}


def read(folder: Path) -> Tensors:
    """Every tensor of a folder's files."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def write(folder: Path, tensors: Tensors, config: dict[str, object], shards: int = 2) -> Path:
    """A folder of a publisher: files with an index, and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def dequantised(folder: Path) -> Tensors:
    """The weights of a folder in float32 under the names they have unquantised; what is not quantised, as it is."""
    config = json.loads((folder / "config.json").read_text())
    quantised = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config") or {}
    block = tuple(quantised.get("weight_block_size") or (1, 1))
    tensors = read(folder)
    plain: Tensors = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight").removesuffix(".weight_packed").removesuffix("_blocks")
        if name.endswith("_blocks"):
            exponents = tensors[stem + "_scales"].float() - 127
            flat = _from_e2m1(tensor.flatten(-2))
            plain[stem] = (flat * torch.exp2(exponents).repeat_interleave(32, -1)).transpose(-1, -2)
        elif name.endswith(".weight_packed"):
            rows, columns = tensors[stem + ".weight_shape"].tolist()
            codes = (tensor.long().unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
            scale = tensors[stem + ".weight_scale"].float()
            plain[stem + ".weight"] = (codes.flatten(-2)[:, :columns] - 8) * _spread(scale, rows, columns, (1, 32))
        elif stem + ".weight_scale_2" in tensors and name.endswith(".weight"):
            scale = tensors[stem + ".weight_scale"].float() * tensors[stem + ".weight_scale_2"]
            plain[name] = _from_e2m1(tensor) * scale.repeat_interleave(16, -1)
        elif stem + ".scale" in tensors and name.endswith(".weight"):
            scale = tensors[stem + ".scale"].float()
            if tensor.dtype == torch.int8:
                plain[name] = _from_e2m1(tensor.view(torch.uint8)) * scale.repeat_interleave(32, -1)
            else:
                plain[name] = tensor.float() * _spread(scale, *tensor.shape, block)
        elif name + "_scale_inv" in tensors:
            plain[name] = tensor.float() * _spread(tensors[name + "_scale_inv"], *tensor.shape, block)
        elif not _is_scale(name, tensors):
            plain[name] = tensor
    return plain


def _is_scale(name: str, tensors: Tensors) -> bool:
    """Whether a tensor only says how to read another one."""
    stem, _, end = name.rpartition(".")
    if end in ("weight_scale", "weight_scale_2", "input_scale", "weight_shape"):
        return True
    return (
        (end == "scale" and stem + ".weight" in tensors)
        or (name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in tensors)
        or (name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in tensors)
    )
