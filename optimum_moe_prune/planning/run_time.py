# SPDX-License-Identifier: Apache-2.0
"""How long a model will run, by how fast one of its layers is read and run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..calibration.samples import CalibrationSet
from ..checkpoints.layout import Layout
from ..compat import text_config
from ..models.memory import Compute
from ..models.transfers import copies_aside
from ..statistics.needs import Need
from . import backward_pass
from .measuring import Measuring
from .probe import Speed, probe
from .progressive import needs_unpruned

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig

WORTH_PROBING = 10**11
"""Parameters times tokens: below, the work takes seconds."""


def speed_of(
    layout: Layout, samples: CalibrationSet, needs: frozenset[Need], compute: Compute, recipe: MoEPrunerConfig
) -> Speed | None:
    """How fast a layer is read and run; None where it cannot be told."""
    if not layout.checkpoint.is_local:  # of a model on the Hub nothing is downloaded before the work
        return None
    return probe(layout, samples, needs, compute, recipe.batch_size, recipe.max_tokens)


def seconds_of(
    layout: Layout,
    speed: Speed,
    recipe: MoEPrunerConfig,
    texts: tuple[int, int],
    needs: frozenset[Need],
    compute: Compute,
    measuring: Measuring,
) -> float:
    """How long the model will run, roughly, for tokens to calibrate with and to judge by, and to measure plans."""
    tokens, judged = texts
    layers = text_config(layout.config).num_hidden_layers
    at_once = bool(compute.stream) and copies_aside(torch.device(compute.runs_on))  # one is read while one runs

    def layer(running: float) -> float:
        return max(speed.reading, running) if at_once else speed.reading + running

    total = layers * layer(tokens * speed.watched) if needs else 0.0
    if Need.FISHER in needs:
        alone = tokens * speed.plain
        total += layers * (layer(alone) + layer((backward_pass.FORWARD_PASSES - 1) * alone))
    if recipe.progressive and recipe.needs:  # each layer runs again without what was removed
        again = 2 if needs_unpruned(recipe) else 1
        total = again * total + layers * tokens * speed.plain
    total += layers * layer(judged * speed.plain) if judged else 0.0
    if measuring.recipes:
        total += layers * (speed.reading + sum(measuring.passes(layers)) * speed.plain)
    return total
