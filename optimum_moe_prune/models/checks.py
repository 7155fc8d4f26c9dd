# SPDX-License-Identifier: Apache-2.0
"""What has to be true of a model in memory before it is run or changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoints.layout import Layout
from ..compat import is_quantised
from ..errors import RequestError, RunError
from ..storage.tensor_files import finite_flag
from .wrappers import ADAPTED, check_plain, plain_model, uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_model(model: PreTrainedModel) -> None:
    """Raise unless the parameters of a model are really there, and plain.

    Raises:
        RequestError: For sharded, scripted, meta or offloaded, quantised, and PEFT-wrapped models, with the way that
            works.
    """
    check_plain(model)
    if hasattr(model, "peft_config"):
        raise RequestError(ADAPTED)
    if is_quantised(model):
        raise RequestError(
            "this model is quantised in memory. Name the folder or Hub id of its checkpoint instead, which is "
            "dequantised for calibrating only; or load the model with a quantization_config of dequantize=True."
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            is_offloaded = any(getattr(_hook(module), "offload", False) for module in model.modules())
            raise RequestError(
                f"{name} is on the meta device ({'offloaded' if is_offloaded else 'not loaded'}), so the model cannot "
                "be read or changed in memory. Name the model's folder or Hub id in its place, of which one layer at "
                "a time is held (calibrate or prune_checkpoint with stream=True)."
            )


def _hook(module: nn.Module) -> object:
    """What accelerate has put around a module's forward; the last of several."""
    hook = getattr(module, "_hf_hook", None)
    return next((h for h in reversed(getattr(hook, "hooks", ())) if hasattr(h, "offload")), hook)


def usable_model(model: Any, to_change: bool = False) -> Any:
    """A model in memory without what is put around it, checked (:func:`check_model`); a checkpoint's layout as it is.

    Args:
        model: The model.
        to_change: Whether its parameters will be replaced.

    Raises:
        RequestError: If it cannot be used.
    """
    if not isinstance(model, Layout):
        model = plain_model(model, to_change)
        check_model(model)
    return model


def check_finite(model: PreTrainedModel) -> None:
    """Raise unless every weight of a model is finite.

    Raises:
        RunError: Naming the parameter that holds NaN or infinity.
    """
    flags: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            flag = finite_flag(parameter.detach())
            flags.setdefault(flag.device, []).append((name, flag))
    damaged = {
        name
        for of_device in flags.values()  # each is waited for once
        for (name, _), is_finite in zip(of_device, torch.stack([f for _, f in of_device]).tolist(), strict=True)
        if not is_finite
    }
    for name, _ in model.named_parameters():
        if name in damaged:
            raise RunError(f"{name} holds NaN or infinite weights; the checkpoint is damaged.")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and nothing compiled, inside a ``with``; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with uncompiled(model):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids: where its embeddings are, or where accelerate will put them to use them."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type == "meta":
        where = getattr(_hook(embeddings), "execution_device", None)
        return device if where is None else torch.device(where)
    return device


def vocabulary(model: Any) -> int:
    """How many token ids a model's embedding has rows for."""
    return model.get_input_embeddings().weight.shape[0]
