# SPDX-License-Identifier: Apache-2.0
"""What has to be true of a model in memory before it is run or changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..compat import is_quantised
from ..errors import RequestError, RunError
from ..storage.tensor_files import all_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_model(model: PreTrainedModel) -> None:
    """Raise unless the parameters of a model are really there, and plain.

    Raises:
        RequestError: For meta or offloaded, quantised, and PEFT-wrapped models, with the way that works.
    """
    if hasattr(model, "peft_config") or type(model).__module__.startswith("peft."):
        raise RequestError("this model carries PEFT adapters; merge them first (model.merge_and_unload()).")
    if is_quantised(model):
        raise RequestError(
            "this model is quantised in memory. Name the folder or Hub id of its checkpoint instead, which is "
            "dequantised for calibrating only; or load the model with a quantization_config of dequantize=True."
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise RequestError(
                f"{name} is on the meta device (offloaded or not loaded); load the model so that it fits the "
                "machine's memory (device_map without offload)."
            )


def check_finite(model: PreTrainedModel) -> None:
    """Raise unless every weight of a model is finite.

    Raises:
        RunError: Naming the parameter that holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_floating_point() and not all_finite(parameter.detach()):
            raise RunError(f"{name} holds NaN or infinite weights; the checkpoint is damaged.")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside a ``with``; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids."""
    return model.get_input_embeddings().weight.device


def vocabulary(model: Any) -> int:
    """How many token ids a model's embedding has rows for."""
    return model.get_input_embeddings().weight.shape[0]
