# SPDX-License-Identifier: Apache-2.0
"""What people put around a model, or make of it: taken off where the same model is inside, else refused.

``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` hold the model itself. It is run without them: each
process runs all samples, and compiled code could not be watched. Sharded, scripted and traced models are not what
they were made of any more.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import RequestError

_INSIDE = {"DataParallel": "module", "DistributedDataParallel": "module", "DeepSpeedEngine": "module",
           "OptimizedModule": "_orig_mod"}  # fmt: skip
"""Wrappers by the names of their classes, and where they hold the model."""
_SHARDED = ("torch.distributed.fsdp", "torch.distributed._composable", "fairscale.")
"""Modules whose classes split the parameters of those that are made theirs."""
ADAPTED = (
    "this model carries PEFT adapters; merge them first (model.merge_and_unload()), or prune the model without them "
    "(model.unload()) and cut the saved adapter by the same plan (plan.apply_to_checkpoint(adapter, output))."
)


def plain_model(model: Any, to_change: bool = False) -> Any:
    """The model inside of what is put around it; anything else as it is.

    Args:
        model: The model, perhaps wrapped or compiled.
        to_change: Whether its parameters will be replaced, which some wrappers do not notice.

    Raises:
        RequestError: If a wrapper would go on with parameters that the model has no more.
    """
    while (place := _place(model)) is not None:
        if to_change and place == "module" and not isinstance(model, nn.DataParallel):
            raise RequestError(
                f"{type(model).__name__} keeps the parameters it was made with, and would not notice that others take "
                "their place: prune model.module in every process, and wrap what comes out again."
            )
        model = getattr(model, place)
    return model


def check_plain(model: Any) -> None:
    """Raise unless something is a model in memory whose own code and parameters are at hand.

    Raises:
        RequestError: Saying what it is instead, and the way that works.
    """
    if isinstance(model, (str, os.PathLike)):
        raise RequestError(
            f"a model in memory is needed, and {os.fspath(model)!r} is the name of one; load it, or prune its files "
            "(prune_checkpoint)."
        )
    if not isinstance(model, nn.Module):
        raise RequestError(f"a transformers model in memory is needed, and this is a {type(model).__name__}.")
    if isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        kind = "TorchScript" if isinstance(model, torch.jit.ScriptModule) else "a traced graph"
        raise RequestError(
            f"this model is {kind}, whose code is fixed to its number of experts; pass the model it was made of, and "
            "make it anew of what comes out."
        )
    for name, module in model.named_modules():
        _check_module(name, module)
    for name, parameter in model.named_parameters():
        _check_parameter(name, parameter)
    if not hasattr(getattr(model, "config", None), "model_type"):
        inside = [n for n, child in model.named_children() if hasattr(getattr(child, "config", None), "model_type")]
        way = f"pass the model inside it (model.{inside[0]})" if inside else "pass the model itself"
        raise RequestError(f"a {type(model).__name__} is no transformers model (it has no config); {way}.")


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside a ``with`` what was compiled of a model runs as it is written: compiled code cannot be watched."""
    with torch.compiler.set_stance("force_eager") if _is_compiled(model) else contextlib.nullcontext():
        yield


def forget_compiled(model: nn.Module) -> None:
    """After a model was changed: code that was compiled for the old one is made anew when it is next called.

    Guards notice the change as a rule, but can be left out (``guard_filter_fn``).
    """
    if _is_compiled(model):
        torch.compiler.reset()


def _place(model: Any) -> str | None:
    """The attribute in which a wrapper holds the model; None of a model."""
    if isinstance(model, nn.DataParallel):
        return "module"
    if not isinstance(model, nn.Module):
        return None
    return next((_INSIDE[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in _INSIDE), None)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def _check_module(name: str, module: nn.Module) -> None:
    kinds = type(module).__mro__
    if sharding := [kind.__name__ for kind in kinds if kind.__module__.startswith(_SHARDED)]:
        raise _split("fully_shard" if "FSDPModule" in sharding else sharding[0])
    if any(kind.__module__.startswith("peft.") for kind in kinds):
        raise RequestError(ADAPTED)
    if (place := _place(module)) is not None:
        path = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"model.{name}")
        raise RequestError(
            f"a part of this model is wrapped in {type(module).__name__}; put the part itself back "
            f"({path} = {path}.{place})."
        )


def _split(by: str) -> RequestError:
    return RequestError(
        f"the parameters of this model are split over processes ({by}), so it cannot be read or changed in memory. "
        "Name the model's folder or Hub id in its place (calibrate or prune_checkpoint with stream=True), and split "
        "what comes out."
    )


def _check_parameter(name: str, parameter: torch.Tensor) -> None:
    kind = type(parameter)
    if kind.__module__.startswith("torch.distributed"):
        raise _split(kind.__name__)
    if hasattr(parameter, "ds_id"):
        raise _split("DeepSpeed ZeRO-3")
    if kind not in (nn.Parameter, torch.Tensor):
        raise RequestError(
            f"{name} is no plain tensor ({kind.__name__}: quantised in memory, or not loaded yet). Load the model "
            "unquantised, or name the folder or Hub id of its checkpoint."
        )
