# SPDX-License-Identifier: Apache-2.0
"""Calibrate a checkpoint by whichever way fits the machine: the whole model in memory, or one layer at a time."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from transformers import AutoModelForCausalLM

from .calibration import CalibrationSet
from .collect import check_model, collect, versions
from .errors import RunError
from .layerwise import LayerByLayer
from .layout import Layout, model_dtype
from .resume import Store, unfinished
from .stats import CalibrationStats, Need
from .stream import Skeleton, collect_streamed

logger = logging.getLogger(__name__)

_HEADROOM_BYTES = 2**30  # for activations and statistics
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def calibrate_checkpoint(
    layout: Layout,
    calibration: CalibrationSet,
    needs: Iterable[Need],
    *,
    batch_size: int = 8,
    max_tokens: int = 8192,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    stream: bool | None = None,
    folder: Path | None = None,
    restart: bool = False,
    hub: Mapping[str, Any] | None = None,
) -> CalibrationStats:
    """Gather statistics of the MoE layers of a checkpoint.

    Args:
        layout: The checkpoint.
        calibration: The samples.
        needs: What to gather.
        batch_size: Samples in a forward pass.
        max_tokens: The most tokens for which statistics per token are kept.
        seed: Decides which tokens are kept when there are more.
        dtype: The precision to calculate in; ``"auto"`` is the checkpoint's.
        device: Where to calculate.
        stream: Hold one decoder layer in memory at a time; by default where the model does not fit.
        folder: Where unfinished work is kept, and continued by a later call for the same.
        restart: Begin anew, whatever the folder holds.
        hub: ``revision``, ``token``, ``cache_dir``, ``trust_remote_code``.

    Raises:
        RequestError: If the request is wrong, a tensor is missing or has another shape than the config says, or the
            folder holds unfinished work on something else.
        RunError: If the model holds NaN or infinite values, or something cannot be written.
    """
    needs = frozenset(needs)
    device = _resolved(device)
    there = None if folder is None or restart else unfinished(folder)
    if stream is None and there is not None:
        stream = bool(there[0].get("stream"))  # memory may be free now that was not when it began
    if stream is None:
        stream = not _fits(layout, dtype, device)
    how: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens, "seed": seed}
    of = {
        "model": identity(layout),
        "calibration": calibration.fingerprint,
        "needs": sorted(map(str, needs)),
        **how,
        "dtype": dtype,
        "device": torch.device(device.replace("auto", "cuda")).type,
        "stream": stream,
        "versions": versions(),
    }
    skeleton = Skeleton(layout, model_dtype(layout.config, layout.checkpoint, dtype), device)  # checks all tensors
    store = Store(folder, of, restart)
    try:
        if stream:
            stats = collect_streamed(skeleton, calibration, needs, **how, store=store)
        else:
            stats = _collected(layout, calibration, needs, how, dtype, device, store, dict(hub or {}))
    finally:
        store.close()
    provenance = {**stats.provenance, "streamed": stream, "statistics_on_disk": store.spilled}
    return replace(stats, provenance=provenance)


def _collected(
    layout: Layout,
    calibration: CalibrationSet,
    needs: frozenset[Need],
    how: dict[str, Any],
    dtype: str,
    device: str,
    store: Store,
    hub: dict[str, Any],
) -> CalibrationStats:
    """Statistics of the whole model in memory."""
    model = _model(layout, dtype, device, hub)
    try:
        stats = collect(model, calibration, needs, **how, store=store)
    except RunError:
        layout.checkpoint.check_finite()  # names the file and the tensor, where it is one
        raise
    return replace(stats, model=layout.facts())  # of the checkpoint's own precision


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


def identity(layout: Layout) -> dict[str, Any]:
    """What makes a checkpoint the same one: its files and routers, or its commit on the Hub."""
    checkpoint = layout.checkpoint
    if not checkpoint.is_local:
        return {"name": checkpoint.name_or_path, "commit": getattr(layout.config, "_commit_hash", None)}
    folder = Path(os.path.realpath(checkpoint.name_or_path))
    found = {file: os.stat(folder / file) for file in ("config.json", *checkpoint.files)}
    files = {file: {"bytes": stat.st_size, "changed at": stat.st_mtime_ns} for file, stat in found.items()}
    return {"name": str(folder), "fingerprint": layout.fingerprint(), **files}


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
