# SPDX-License-Identifier: Apache-2.0
"""Calibrate a checkpoint by whichever way fits the machine: the whole model in memory, or one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.layout import Layout, identity, model_dtype
from ..errors import RunError
from ..models.memory import _fits, _model, _resolved
from ..models.skeleton import Skeleton
from ..provenance import versions
from ..statistics.stats import CalibrationStats, Need
from ..storage.growing import Store, unfinished
from .in_memory import collect
from .samples import CalibrationSet
from .streamed import collect_streamed


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
