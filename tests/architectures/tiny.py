# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every type with routed experts that transformers 5.24 can build. No network.

``tiny_model("glm4_moe")`` is in evaluation mode and has 12 experts, a number no other dimension has. Everything that
transformers starts at zero or one (selection biases, scales, norms, sinks) holds random values, routers have opinions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import torch
from architectures.tiny_text import EXPERTS, SHAPE, TEXT
from architectures.tiny_wrappers import PART_SHAPE, TEXT_PARTS, TOP_SHAPE, WRAPPERS
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def _sized(cls: type[PreTrainedConfig], shape: dict[str, object], values: dict[str, object]) -> dict[str, object]:
    """The part of ``shape`` that the class has fields for, and ``values``."""
    known = {field.name for field in fields(cls)}
    return {name: value for name, value in shape.items() if name in known} | values


def _text(model_type: str, settings: dict[str, object]) -> PreTrainedConfig:
    cls = CONFIG_MAPPING[model_type]
    return cls(**_sized(cls, SHAPE, (TEXT | TEXT_PARTS)[model_type] | settings))


def _part(cls: type[PreTrainedConfig], values: dict[str, object], settings: dict[str, object]) -> PreTrainedConfig:
    """A configuration with parts, or one part of it; ``settings`` go to its text part."""
    built: dict[str, object] = {}
    for name, value in values.items():
        if name == "text_config":
            built[name] = _text(str(value), settings)
        elif isinstance(value, dict) and name in cls.sub_configs:
            kind = CONFIG_MAPPING[value["model_type"]] if "model_type" in value else cls.sub_configs[name]
            built[name] = _part(kind, value, settings)
        else:
            built[name] = value
    return cls(**_sized(cls, TOP_SHAPE if cls.sub_configs else PART_SHAPE, built))


def tiny_config(model_type: str, **settings: object) -> PreTrainedConfig:
    """The configuration of a tiny model. ``settings`` are keys of it, or of its text part where it has one."""
    if model_type in WRAPPERS:
        return _part(CONFIG_MAPPING[model_type], WRAPPERS[model_type], settings)
    return _text(model_type, settings)


TINY: dict[str, Callable[[], PreTrainedConfig]] = {name: partial(tiny_config, name) for name in (*TEXT, *WRAPPERS)}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class transformers loads for the whole of ``config``."""
    causal = AutoModelForCausalLM._model_mapping
    text = config.get_text_config(decoder=True)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) not in auto._model_mapping:
            continue
        found = auto._model_mapping[type(config)]
        text_only = type(text) is not type(config) and type(text) in causal and causal[type(text)] is found
        if not text_only:
            return found
    AutoModelForCausalLM.from_config(config)  # says that it knows no class
    raise AssertionError(config.model_type)


def tiny_model(
    model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: object
) -> PreTrainedModel:
    """A tiny random model in evaluation mode; of another ``dtype`` with the same numbers, rounded as on loading."""
    return random_model(tiny_config(model_type, **settings), seed, dtype)


def random_model(config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of ``config`` as ``tiny_model`` makes it."""
    cls = model_class(config)
    config.architectures = [cls.__name__]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=torch.float32).eval()
        stir(model)
    if dtype != torch.float32:
        numbers = model.state_dict()
        model = cls._from_config(config, dtype=dtype).eval()
        kept = list(model._get_dtype_plan(dtype))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if kept and re.search("|".join(kept), name):
                tensor.data = tensor.data.float()
        model.load_state_dict(numbers)
    return model


@torch.no_grad()
def stir(model: PreTrainedModel) -> None:
    """Fill what was started at one value: zeros with N(0, 0.2), others times 0.5 to 1.5; hash tables with ids."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("tid2eid"):
            tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(1)[:, : tensor.shape[1]])
        elif tensor.is_floating_point() and not tensor.any():
            tensor.normal_(0, 0.2)
        elif tensor.is_floating_point() and tensor.isfinite().all() and len(tensor.unique()) == 1:
            tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 1.5))
        if model.config.model_type == "zaya":
            if "router_mlp" in name and tensor.dim() == 2:  # after a GELU most of it is the same for all tokens
                tensor.sub_(tensor.mean(1, keepdim=True)).mul_(2)
            elif name.endswith("embed_tokens.weight"):
                tensor.mul_(5)
            elif name.endswith("balancing_biases"):  # loading sets the last, of the class that skips, to -1
                tensor[:-1].normal_(0, 0.05)


UPSTREAM: dict[str, str] = {
    "llama4": "'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'",
    "qwen3_omni_moe": "_forward_unimplemented() got an unexpected keyword argument 'input_ids'",
    "step3p5": (
        "Unrecognized configuration class "
        "<class 'transformers.models.step3p7.configuration_step3p7.Step3p7TextConfig'> "
        "for this kind of AutoModel: AutoModelForCausalLM."
    ),
}
"""Types whose tiny model transformers 5.24 does not build or run, and the first line of what it says.

The text part of llama4, ``model.language_model``, runs, and llama4_text does; qwen3_omni_moe has no forward, its
thinker has; step3p5 is a configuration only, and the text part of step3p7.
"""
