# SPDX-License-Identifier: Apache-2.0
"""What a distillation of a model that does not fit in memory takes, before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration.samples import CalibrationSet
from ..checkpoints.layout import Layout
from ..compat import text_config
from ..models.memory import Compute
from ..planning.probe import probe
from ..progress.pace import duration, rough, size
from .steps import DistilOptions

_BACKWARD = 3  # of the time that a layer takes forward: run once more, and twice as much for gradients


@dataclass(frozen=True)
class StreamedCost:
    """What it takes.

    Attributes:
        steps: Steps.
        tokens: Of each step, about.
        reads: Bytes of the checkpoint that are read, all in all: it is read twice for each step, and once more.
        seconds: How long that takes, roughly; None where it cannot be told.
    """

    steps: int
    tokens: int
    reads: int
    seconds: float | None

    def sentence(self) -> str:
        """In words."""
        time = "" if self.seconds is None else f", about {duration(rough(self.seconds))}"
        return (
            f"{self.steps} steps of about {self.tokens} tokens, each of which reads the checkpoint twice: "
            f"{size(self.reads)} in all{time}"
        )


def streamed_cost(
    layout: Layout,
    fit: CalibrationSet,
    held_back: CalibrationSet,
    options: DistilOptions = DistilOptions(),
    compute: Compute = Compute(),
) -> StreamedCost:
    """What ``distil_streamed`` will take, if it goes through all its steps. One layer is read and run for it.

    Args:
        layout: The pruned checkpoint.
        fit: The samples it is trained on.
        held_back: The samples it is judged by.
        options: How.
        compute: Where to calculate.
    """
    options = options.streamed(fit)
    assert options.steps is not None and options.tokens is not None and options.check_every is not None
    passes = 2 * options.steps + 1
    looks = -(-options.steps // options.check_every) + 1
    speed = probe(layout, fit, frozenset(), compute.settled(layout), options.batch_size)
    seconds = None
    if speed is not None:
        run = options.steps * options.tokens * (1 + _BACKWARD) + looks * held_back.num_tokens
        seconds = text_config(layout.config).num_hidden_layers * (passes * speed.reading + run * speed.plain)
    return StreamedCost(options.steps, options.tokens, passes * layout.checkpoint.nbytes, seconds)
