# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with a head for further tokens (MTP), and that head as transformers loads it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.published import deepseek_v3_fp8, dequantised, qwen3_5_moe_nested
from architectures.published_formats import Tensors, read, write
from architectures.tiny import tiny_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DeepseekV3ForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_layers import MtpModel

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, PruningPlan

LAYERS, EXPERTS = 4, 12
HEAD = {"deepseek_v3": "model.layers.4.", "qwen3_5": "mtp.layers.0.", "numbered": "mtp.layers.0."}
"""Numbered experts in a layer after the last; fused ones in a place of their own, in a nested config; the same trunk
with a numbered head."""


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def checkpoint(kind: str, folder: Path, dtype: torch.dtype = torch.float32, loads: bool = True) -> Path:
    """A checkpoint with a head.

    Args:
        kind: As in ``HEAD``.
        folder: Where.
        dtype: Of its tensors.
        loads: Whether transformers is told of the head; configs of Qwen3.5 do not tell it.
    """
    if kind == "deepseek_v3":
        model = tiny_model("deepseek_v3", n_group=1, topk_group=1)
        source = deepseek_v3_fp8(folder.with_name("quantised"), model)
        tensors, config = dequantised(source), config_of(source)
        del config["quantization_config"]
    else:
        source = qwen3_5_moe_nested(folder.with_name("nested"), tiny_model("qwen3_5_moe"))
        tensors, config = read(source), config_of(source)
        if kind == "numbered":
            tensors = numbered_head(tensors)
        if loads:
            config["text_config"] |= {"num_mtp_layers": 1, "mtp_layer_types": ["full_attention"]}
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    return write(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()}, config)


def two_heads(folder: Path) -> Path:
    """A DeepSeek-V3 with a second head, made of the first."""
    one = checkpoint("deepseek_v3", folder.with_name("one"))
    tensors, config = read(one), config_of(one)
    for name in [name for name in tensors if name.startswith(HEAD["deepseek_v3"])]:
        numbers = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(len(name)))
        tensors[name.replace(".4.", ".5.", 1)] = tensors[name] + 0.05 * numbers
    return write(folder, tensors, config | {"num_nextn_predict_layers": 2})


def numbered_head(tensors: Tensors) -> Tensors:
    """The head's fused experts one by one."""
    start = "mtp.layers.0.mlp.experts."
    gate_up, down = tensors.pop(f"{start}gate_up_proj"), tensors.pop(f"{start}down_proj")
    for expert in range(EXPERTS):
        gate, up = gate_up[expert].chunk(2)
        for name, tensor in (("gate", gate), ("up", up), ("down", down[expert])):
            tensors[f"{start}{expert}.{name}_proj.weight"] = tensor.clone()
    return tensors


def random_pruner(folder: Path, num_experts: int = 8, **settings: Any) -> MoEPruner:
    return MoEPruner.from_pretrained(folder, MoEPrunerConfig(method="random", num_experts=num_experts, **settings))


def pruned(folder: Path, output: Path, **settings: Any) -> PruningPlan:
    """Prune a checkpoint's files at random; the plan that was written."""
    random_pruner(folder, **settings).prune_checkpoint(output)
    return PruningPlan.load(output)


def loaded(folder: Path) -> PreTrainedModel:
    auto = AutoModelForImageTextToText if "text_config" in config_of(folder) else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def heads_of_tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks for DeepSeek's head in layer 61 alone."""
    monkeypatch.setattr(
        DeepseekV3ForCausalLM,
        "_keys_to_ignore_on_load_unexpected",
        [rf"model\.layers\.{LAYERS}.*", rf"model\.layers\.{LAYERS + 1}.*"],
    )


def transformers_head(model: PreTrainedModel) -> MtpModel:
    """The head of a loaded model, by transformers alone.

    It looks for numbered experts of a head only where the model's own are numbered, and not below a text part.
    """
    model._weight_conversions = get_model_conversion_mapping(model.get_decoder())
    return MtpModel.from_pretrained(model, device_map={"": "cpu"}).eval()


def head_output(head: MtpModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """What the head gives for the model's last hidden states and the tokens after them."""
    positions = torch.arange(1, ids.shape[1] + 1)[None]
    with torch.no_grad():
        return head.forward_layer(0, hidden, positions, None, input_ids=ids)


@contextlib.contextmanager
def masked(layer: torch.nn.Module, retained: Collection[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A decoder layer whose router cannot choose the experts that are not retained."""
    gate, linear = layer.mlp.gate, functional.linear
    gone = [expert for expert in range(EXPERTS) if expert not in retained]

    def masking(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        if out.shape[-1] == EXPERTS and weight.shape == gate.weight.shape:
            out[..., gone] = float("-inf")
        return out

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "linear", masking)
        if hasattr(gate, "e_score_correction_bias"):  # a score of 0 could still be chosen by it
            gate.e_score_correction_bias[gone] = float("-inf")
        yield
