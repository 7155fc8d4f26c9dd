# SPDX-License-Identifier: Apache-2.0
"""Models of types without a row: they are found out by trying (``discovery``), when such a model is met."""

from __future__ import annotations

from typing import Any

from ..architectures.spec import MoESpec
from ..architectures.table import discoverers
from ..compat import ModelConfig


def _discovered(thing: Any, config: ModelConfig) -> MoESpec:
    from .discovery import spec_of  # it needs torch

    return spec_of(thing, config)


def enable() -> None:
    """Have unknown types found out from now on."""
    if _discovered not in discoverers:
        discoverers.append(_discovered)
