# SPDX-License-Identifier: Apache-2.0
"""What the commands read: models, texts, the Hub's settings. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RequestError


def hub_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say about the Hub, for the calls that take it."""
    given = {"revision": args.revision, "token": args.token, "trust_remote_code": args.trust_remote_code or None}
    return {key: value for key, value in given.items() if value is not None}


def calibration_samples(args: argparse.Namespace, pruner: Any) -> Any:
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
    samples.check_vocabulary(pruner.model_config.vocab_size)
    return samples


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    import torch

    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise RequestError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
