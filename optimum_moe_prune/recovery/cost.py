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
        keeps: Bytes of files that it keeps until it is done: what goes into the layers, and what is trained.
        seconds: How long that takes, roughly; None where it cannot be told.
    """

    steps: int
    tokens: int
    reads: int
    keeps: int
    seconds: float | None

    def sentence(self) -> str:
        """In words."""
        time = "" if self.seconds is None else f", about {duration(rough(self.seconds))}"
        return (
            f"{self.steps} steps of about {self.tokens} tokens, each of which reads the checkpoint twice: "
            f"{size(self.reads)} in all{time}; files of {size(self.keeps)} are kept until it is done"
        )


def streamed_cost(
    layout: Layout,
    fit: CalibrationSet,
    held_back: CalibrationSet,
    options: DistilOptions = DistilOptions(),
    compute: Compute = Compute(),
    trained: int = 0,
) -> StreamedCost:
    """What ``distil_streamed`` will take, if it goes through all its steps. One layer is read and run for it.

    Args:
        layout: The pruned checkpoint.
        fit: The samples it is trained on.
        held_back: The samples it is judged by.
        options: How.
        compute: Where to calculate.
        trained: Bytes that are kept of what is trained.
    """
    options = options.streamed(fit)
    assert options.steps is not None and options.tokens is not None and options.check_every is not None
    passes = 2 * options.steps + 1
    looks = -(-options.steps // options.check_every) + 1
    compute, config = compute.settled(layout), text_config(layout.config)
    layers = config.num_hidden_layers
    states = (layers + 1) * options.tokens * config.hidden_size * compute.computing_dtype(layout).itemsize
    speed = probe(layout, fit, frozenset(), compute, options.batch_size)
    seconds = None
    if speed is not None:
        run = options.steps * options.tokens * (1 + _BACKWARD) + looks * held_back.num_tokens
        seconds = layers * (passes * speed.reading + run * speed.plain)
    reads = passes * layout.checkpoint.nbytes
    return StreamedCost(options.steps, options.tokens, reads, states + trained, seconds)
