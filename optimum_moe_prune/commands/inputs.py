# SPDX-License-Identifier: Apache-2.0
"""Calibration texts as commands name them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compat import text_config
from ..errors import RequestError

if TYPE_CHECKING:
    from ..calibration.samples import CalibrationSet
    from ..pruner import MoEPruner


def calibration_samples(args: argparse.Namespace, pruner: MoEPruner) -> CalibrationSet:
    """The calibration samples the arguments name, their tokens checked against the model's vocabulary."""
    from ..calibration.texts import HubMixture

    sources = args.calibration or []
    if not sources:
        raise RequestError("a calibration is needed; name a file (--calibration FILE).")
    hub = [source.removeprefix("hub:") for source in sources if source.startswith("hub:")]
    files = [Path(source) for source in sources if not source.startswith("hub:")]
    if hub and files:
        raise RequestError("--calibration takes files or hub: mixtures, not both at once.")
    source: Any = HubMixture(",".join(hub)) if hub else files
    samples = pruner.samples(source)
    if hub:
        samples = replace(samples, sources=tuple(sources))
    samples.check_vocabulary(text_config(pruner.model_config).vocab_size)
    return samples
