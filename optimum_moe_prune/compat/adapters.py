# SPDX-License-Identifier: Apache-2.0
"""The classes that adapters are trained in, and what PEFT knows of a parameter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from . import ModelConfig, build_on_meta


def built_for_task(config: ModelConfig, named: str, auto: str | None, code: bool) -> Iterator[Any]:
    """Models without weights, in evaluation mode, in the order in which an adapter is likely to be of them.

    Why: ``_from_config`` is private (transformers 5.14 to 5.24), and ``from_config`` is of auto classes alone.

    Args:
        config: The model's.
        named: A class of transformers; of what is none, and of an empty name, nothing is known.
        auto: The auto class of a task; None where it is to write text.
        code: Whether code that comes with the model may run.
    """
    import transformers

    cls = getattr(transformers, named, None) if named else None
    with torch.device("meta"):
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            yield cls._from_config(copy.deepcopy(config)).eval()
            return
        if auto is not None:
            yield getattr(transformers, auto).from_config(copy.deepcopy(config), trust_remote_code=code).eval()
            return
    yield (first := build_on_meta(config, trust_remote_code=code))
    with torch.device("meta"):
        try:
            text = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=code).eval()
        except Exception:  # there is none
            return
    if type(text) is not type(first):  # of a model that sees or hears, the part that reads
        yield text


def is_turned(wrapper: Any) -> bool:
    """Whether PEFT takes a parameter of three dimensions to hold inputs before outputs.

    Why: ``ParamWrapper`` (PEFT 0.17 to 0.21) has it in a private attribute.
    """
    return not wrapper._did_swap_in_out_features
