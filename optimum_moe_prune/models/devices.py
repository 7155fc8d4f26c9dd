# SPDX-License-Identifier: Apache-2.0
"""The cards that are there (CUDA and ROCm, XPU ...), which one ``auto`` stands for, and what is free on them."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import RequestError
from ..names import AUTO

CPU = "cpu"


def cards() -> list[str]:
    """The cards that ``auto`` may choose from, by torch's names; none where only the processor can be used.

    Sums are gathered in float64. A kind of card that has none (MPS) is passed over.
    """
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    if kind is None or kind.type == CPU or not has_float64(kind.type):
        return []
    return [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]


def one_device(device: str) -> str:
    """The device for work on a single one: of ``auto`` the current card, else the processor."""
    if device != AUTO:
        return device
    found = cards()
    return found[int(_module(found[0]).current_device())] if found else CPU


def has_float64(device: str) -> bool:
    """Whether a device can be used, in float64 as well."""
    try:
        return float(torch.ones(1, dtype=torch.float64, device=device).sum()) == 1
    except (RuntimeError, TypeError, AssertionError, NotImplementedError):
        return False


def check_device(device: str) -> None:
    """Raise unless a device is there and can be used.

    Raises:
        RequestError: Naming it.
    """
    if device == AUTO:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise RequestError(f"device={device!r} cannot be used: {_first_sentence(error)}") from error
    if torch.device(device).type == "meta":
        raise RequestError("device='meta' calculates nothing; name one that does: cpu, cuda, auto ...")
    if not has_float64(device):
        raise RequestError(
            f"device={device!r} cannot be used: it has no float64, in which sums are gathered; take device='cpu'."
        )


def in_words(device: str) -> str:
    """The name of the card that a model runs on, or the cards; of the processor none.

    Args:
        device: As it was asked for.
    """
    used = one_device(device)
    if torch.device(used).type == CPU:
        return ""
    more = len(cards()) - 1 if device == AUTO else 0
    return f"{used}, {card_name(used)}" + (f", or spread over it and {more} more" if more else "")


def card_name(device: str | torch.device) -> str:
    """What the maker calls a card."""
    return str(_module(device).get_device_name(torch.device(device)))


def has_own_memory(device: str) -> bool:
    """Whether a device is a card with memory of its own, of which it tells what is free."""
    return torch.device(device).type != CPU and hasattr(_module(device), "mem_get_info")


def free_bytes(device: str) -> int:
    """Bytes that are free on a card, with those that torch holds for later."""
    module, where = _module(device), torch.device(device)
    held = module.memory_reserved(where) - module.memory_allocated(where)
    return int(module.mem_get_info(where)[0]) + int(held)


def total_bytes(device: str) -> int:
    """Bytes of a card."""
    return int(_module(device).mem_get_info(torch.device(device))[1])


def peak_bytes(devices: set[torch.device]) -> int:
    """The most bytes that tensors took on some cards together, each at its own time."""
    return sum(int(_module(device).max_memory_allocated(device)) for device in devices)


def finish(devices: set[torch.device]) -> None:
    """Wait until some devices have done what they were asked for."""
    for device in devices:
        if device.type != CPU:
            torch.accelerator.synchronize(device)


def _module(device: str | torch.device) -> Any:
    """torch's module for a kind of device: ``torch.cuda`` ..."""
    return torch.get_device_module(torch.device(device))


def _first_sentence(error: Exception) -> str:
    """What an error of torch says, without the lists that may follow."""
    first = str(error).splitlines()[0].split(". ")[0]
    if "at start of device string" in first:
        return "torch knows no such device."
    if first.startswith("Could not run") or isinstance(error, ImportError):  # its kind of device has nothing here
        return "this build of torch is not made for it."
    return first.rstrip(".") + "."
