# SPDX-License-Identifier: Apache-2.0
"""Calibration and evaluation texts as commands name them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.naming import ON_THE_HUB
from ..compat import text_config
from ..errors import RequestError
from ..storage.values import Json
from . import flags
from .requests import require_calibration

if TYPE_CHECKING:
    from ..calibration.samples import CalibrationInput, CalibrationSet
    from ..checkpoints.source import Source
    from ..pruner import MoEPruner


def calibration_samples(args: argparse.Namespace, pruner: MoEPruner) -> CalibrationSet:
    """The calibration samples the arguments name, their tokens checked against the model's vocabulary."""
    require_calibration(args)
    samples = pruner.samples(_input(args.calibration, "--calibration"))
    samples.check_vocabulary(text_config(pruner.model_config).vocab_size)
    return _named(samples, args.calibration)


def recovery_samples(args: argparse.Namespace, pruner: MoEPruner) -> CalibrationSet | None:
    """What the recipe's recovery is done with of the texts that the arguments name; None where there is none.

    Raises:
        RequestError: If there is too little, or the checkpoint cannot be recovered.
    """
    from ..recovery.split import split_samples
    from ..recovery.texts import given_texts

    texts = None if pruner.config is None or not pruner.config.recover else _input(args.calibration, "--calibration")
    if texts is None or given_texts(pruner.config, None, pruner.layout(), texts, None) is None:
        return None
    samples = pruner.samples(texts, recovers=True)
    samples.check_vocabulary(text_config(pruner.model_config).vocab_size)
    split_samples(samples)
    return _named(samples, args.calibration)


def held_out_samples(
    args: argparse.Namespace, model: Source, data: Sequence[str], flag: str, max_length: int = 2048
) -> CalibrationSet:
    """The samples to evaluate on that the arguments name, read as they say."""
    from ..evaluation.compare import held_out

    reading: Json = {
        "text_column": args.text_column,
        "template_args": flags.template_args(args.template_args),
        "skip_bad": bool(args.skip_bad),
    }
    return _named(held_out(model, _input(data, flag), max_length=max_length, **reading), data)


def _input(names: Sequence[str], flag: str) -> CalibrationInput:
    """What files, or datasets on the Hub, are named."""
    from ..calibration.texts import HubMixture

    on_hub = [name.removeprefix("hub:") for name in names if name.startswith(ON_THE_HUB)]
    if on_hub and len(on_hub) < len(names):
        raise RequestError(f"{flag} takes files, or hub: mixtures and presets, not both at once.")
    source: Any = HubMixture(",".join(on_hub)) if on_hub else [Path(name) for name in names]
    return source


def _named(samples: CalibrationSet, names: Sequence[str]) -> CalibrationSet:
    """The samples, with datasets on the Hub called as on the command line."""
    return replace(samples, sources=tuple(names)) if names[0].startswith(ON_THE_HUB) else samples
