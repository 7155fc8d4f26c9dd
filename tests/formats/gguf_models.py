# SPDX-License-Identifier: Apache-2.0
"""Small GGUF files of any architecture, and plans for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from optimum_moe_prune import PruningPlan
from optimum_moe_prune.architectures.fingerprint import fingerprints_of
from optimum_moe_prune.storage.gguf_files import GgufFile, read_gguf

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 64, 32
Tensors = dict[str, "np.ndarray | tuple[np.ndarray, Type]"]


def floats(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantised(values: np.ndarray, kind: Type) -> tuple[np.ndarray, Type]:
    return gguf.quants.quantize(values, kind), kind


def moe_tensors(layers: Sequence[int] = (0, 1), experts: int = EXPERTS, seed: int = 0) -> Tensors:
    """A model with experts in some layers; the first tensors are of none."""
    tensors: Tensors = {
        "token_embd.weight": floats(96, HIDDEN, seed=seed),
        "blk.0.attn_q.weight": floats(8, 8, seed=1),
    }
    for layer in layers:
        start = 100 * (layer + 1) + 1000 * seed
        tensors |= {
            f"blk.{layer}.ffn_gate_inp.weight": floats(experts, HIDDEN, seed=start),
            f"blk.{layer}.ffn_gate_exps.weight": floats(experts, INNER, HIDDEN, seed=start + 1),
            f"blk.{layer}.ffn_up_exps.weight": floats(experts, INNER, HIDDEN, seed=start + 2),
            f"blk.{layer}.ffn_down_exps.weight": floats(experts, HIDDEN, INNER, seed=start + 3),
            f"blk.{layer}.ffn_norm.weight": floats(HIDDEN, seed=start + 4),
        }
    return tensors


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, Type]],
    architecture: str = "qwen3moe",
    experts: int = EXPERTS,
    top_k: int = TOP_K,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    alignment: int = 32,
    in_parts_of: int = 0,
    **numbers: int,
) -> Path:
    """Write a file, or parts of so many tensors; the first."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endian, split_max_tensors=in_parts_of)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_string("general.name", "Tiny")
    writer.add_uint32(f"{architecture}.block_count", 1 + max(int(n.split(".")[1]) for n in tensors if "blk." in n))
    writer.add_uint32(f"{architecture}.embedding_length", HIDDEN)
    if experts:
        writer.add_uint32(f"{architecture}.expert_count", experts)
    writer.add_uint32(f"{architecture}.expert_used_count", top_k)
    writer.add_token_list([f"w{i}" for i in range(96)])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for name, number in numbers.items():
        writer.add_uint32(f"{architecture}.{name}", number)
    for name, tensor in tensors.items():
        values, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))))


def plan_for(
    tensors: Mapping[str, object],
    retained: Sequence[int] | Mapping[int, Sequence[int]] = (0, 3, 5, 6),
    model_type: str = "qwen3_moe",
    experts: int = EXPERTS,
    top_k: int = TOP_K,
    layers: Sequence[int] | None = None,
    beside: Sequence[str] = (),
    known: bool = True,
) -> PruningPlan:
    """A plan for the routers among some tensors.

    Args:
        tensors: The model.
        retained: Of each layer, or by layer.
        model_type: As transformers calls it.
        experts: Of each layer.
        top_k: Experts of a token.
        layers: Those with experts; by default all that have routers.
        beside: Ends of the names of what a router has beside its weight.
        known: Whether the plan remembers for which routers it was made.
    """
    if layers is None:
        layers = sorted(int(name.split(".")[1]) for name in tensors if name.endswith("ffn_gate_inp.weight"))
    every = {layer: tuple(retained[layer] if isinstance(retained, Mapping) else retained) for layer in layers}
    ends = ("ffn_gate_inp.weight", *beside)
    routers = [
        (layer, experts, top_k, [torch.from_numpy(np.asarray(tensors[f"blk.{layer}.{end}"])) for end in ends])
        for layer in layers
    ]
    facts = {"name_or_path": "tiny", **fingerprints_of(routers)} if known else {}
    return PruningPlan(
        model_type, top_k, "random", every, dict.fromkeys(every, experts), provenance={"model": facts} if known else {}
    )


def raw_keys(file: GgufFile) -> dict[str, bytes]:
    """The keys of a file with their values, byte for byte."""
    content = file.path.read_bytes()
    return {name: content[key.begin : key.end] for name, key in file.keys.items()}


def read_tensors(path: Path) -> dict[str, tuple[np.ndarray, int]]:
    """The tensors of a file by the library's reader, with the numbers of their types."""
    return {t.name: (np.array(t.data), int(t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


def opened(path: Path) -> GgufFile:
    return read_gguf(path)
