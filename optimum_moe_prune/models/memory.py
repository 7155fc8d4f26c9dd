# SPDX-License-Identifier: Apache-2.0
"""Whether a model fits, and a way of running it that does."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from transformers import AutoModelForCausalLM

from ..checkpoints.layout import Layout, model_dtype
from .checks import check_model
from .layerwise import LayerByLayer
from .skeleton import Skeleton

logger = logging.getLogger(__name__)


_HEADROOM_BYTES = 2**30  # for activations and statistics


_CGROUP = Path("/sys/fs/cgroup")


_MEMINFO = Path("/proc/meminfo")


def open_runner(
    layout: Layout,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    stream: bool | None = None,
    hub: Mapping[str, Any] | None = None,
) -> LayerByLayer:
    """A checkpoint's model as something that runs layer by layer: in memory, or from its files.

    Args:
        layout: The checkpoint.
        dtype: The precision to calculate in; ``"auto"`` is the checkpoint's.
        device: Where to calculate.
        stream: Hold one decoder layer in memory at a time; by default where the model does not fit.
        hub: ``revision``, ``token``, ``cache_dir``, ``trust_remote_code``.
    """
    device = _resolved(device)
    if stream is None:
        stream = not _fits(layout, dtype, device)
    if stream:
        return Skeleton(layout, model_dtype(layout.config, layout.checkpoint, dtype), device)
    model = _model(layout, dtype, device, dict(hub or {}))
    check_model(model)  # nothing may be offloaded
    return LayerByLayer(model)


def _model(layout: Layout, dtype: str, device: str, hub: dict[str, Any]) -> Any:
    hub.update(layout.checkpoint.hub)  # of the commit whose files were looked at
    return AutoModelForCausalLM.from_pretrained(layout.checkpoint.name_or_path, dtype=dtype, device_map=device, **hub)


def _resolved(device: str) -> str:
    """``auto`` is the processor where there is nothing else."""
    return "cpu" if device == "auto" and not torch.cuda.is_available() else device


def _fits(layout: Layout, dtype: str, device: str) -> bool:
    """Whether a whole model fits in the memory that is free; says so where it does not."""
    needed = model_bytes(layout, dtype)
    free = available_memory(device)
    if needed + _HEADROOM_BYTES <= free:
        return True
    logger.warning(
        "the model takes %.1f GB and %.1f GB of memory are free, so one layer is held at a time (--stream).",
        needed / 1e9,
        free / 1e9,
    )
    return False


def model_bytes(layout: Layout, dtype: str) -> int:
    """Bytes of a whole model in memory, in a precision or (``"auto"``) the checkpoint's."""
    size = model_dtype(layout.config, layout.checkpoint, dtype).itemsize
    return sum(math.prod(t.shape) for t in layout.checkpoint.tensors.values()) * size


def available_memory(device: str) -> int:
    """Bytes that are free where a model would be loaded: on the device, or for this process (its container)."""
    if device == "auto":  # spread over all there is
        return int(sum(get_max_memory().values()))
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = _MEMINFO.read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        free = int(sum(get_max_memory().values()))
    try:  # a container's limit, where there is one
        limit = int((_CGROUP / "memory.max").read_text())
        held = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - int(held["anon"]))
    except (OSError, ValueError, KeyError):
        pass
    return free
