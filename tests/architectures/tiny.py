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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def _sized(model_type: str, values: dict[str, object], shape: dict[str, object] = SHAPE) -> dict[str, object]:
    """The part of ``shape`` that the configuration class has fields for, and ``values``."""
    known = {field.name for field in fields(CONFIG_MAPPING[model_type])}
    return {name: value for name, value in shape.items() if name in known} | values


def tiny_config(model_type: str, **settings: object) -> PreTrainedConfig:
    """The configuration of a tiny model. ``settings`` are keys of it, or of its text part where it has one."""
    return AutoConfig.for_model(model_type, **_sized(model_type, {**TEXT[model_type], **settings}))


TINY: dict[str, Callable[[], PreTrainedConfig]] = {name: partial(tiny_config, name) for name in TEXT}


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
    raise ValueError(f"transformers has no generating class for {config.model_type}")


def tiny_model(
    model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: object
) -> PreTrainedModel:
    """A tiny random model in evaluation mode; of another ``dtype`` with the same numbers, rounded as on loading."""
    config = tiny_config(model_type, **settings)
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


UPSTREAM: dict[str, str] = {}
"""What transformers 5.24 cannot do with an unpruned model of a type: the first line of its error."""
