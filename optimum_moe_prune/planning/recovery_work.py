# SPDX-License-Identifier: Apache-2.0
"""What a recovery takes, before it begins: time, memory, and what it reads of a model that does not fit in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..calibration.samples import CalibrationSet
from ..checkpoints.layout import Layout
from ..checkpoints.sizes import Sizes
from ..compat import text_config
from ..models.memory import Compute
from ..names import DISTIL, REFIT
from .fit import gigabytes
from .probe import Speed

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig

HELD_BACK = 0.2
_REFIT = 2.5  # passes over the text, of which a layer takes one
_EPOCHS, _TRAINING = 6, 4  # over the text; forward and backward are so many forward passes
_STEP, _LEAST, _MOST = 512, 60, 180  # tokens of a step in memory, and how many steps there are
_STREAMED_STEPS, _LARGEST_STEP = 16, 2**16  # of a distillation that reads the checkpoint twice for each
_LOOKS = 1.25  # looks at the text held back take a fourth of the time beside
_TRAINED = 16  # bytes of a number that is trained: its copy, its gradient and two moments
_DOWN = 1 / 3  # of an expert's numbers
MOST_FEATURES = 8192  # that are solved for together
EXACT_FEATURES = 2048  # up to so many in float64
FEATURE_BYTES = 512 * 2**20  # of tokens, that are there at once; twice that where all are kept
_SQUARES, _PRODUCTS = 5, 6  # of features by features, and by the hidden size: sums of both texts, what is solved


@dataclass(frozen=True)
class RecoveryWork:
    """What it takes.

    Attributes:
        steps: What is done.
        samples: Samples it is done with, those held back among them.
        tokens: Their tokens.
        memory: Bytes beside the model.
        unfinished: Bytes that wait on disk until it is done, of a model that is streamed.
        reads: Bytes of the checkpoint that are read for it.
        seconds: Roughly; None where it cannot be told.
    """

    steps: tuple[str, ...]
    samples: int
    tokens: int
    memory: int
    unfinished: int
    reads: int
    seconds: float | None

    def sentence(self) -> str:
        """In words."""
        more = f", reads {gigabytes(self.reads)} for it" if self.reads else ""
        return f"{', '.join(self.steps)} with {self.samples} samples, {self.tokens} tokens, a fifth held back{more}"


def recovery_work(
    layout: Layout,
    sizes: Sizes,
    recipe: MoEPrunerConfig,
    samples: CalibrationSet,
    compute: Compute,
    retained: int,
    speed: Speed | None,
) -> RecoveryWork:
    """What the recovery of a recipe takes.

    Args:
        layout: The checkpoint.
        sizes: Its sizes.
        recipe: The recipe.
        samples: What it is recovered with.
        compute: How models are run, settled.
        retained: Experts that are kept, in all layers.
        speed: How fast a layer is read and run; None where it is not known.
    """
    config, top_k = text_config(layout.config), layout.spec.routing(layout.config).top_k
    layers, hidden, tokens = config.num_hidden_layers, config.hidden_size, samples.num_tokens
    itemsize = compute.computing_dtype(layout).itemsize
    expert = max(size.parameters for size in sizes.experts.values())
    part = retained / sum(sizes.num_experts.values())  # of the experts that the pruned model still has
    kept = int(
        sizes.whole.nbytes - (1 - part) * sum(s.nbytes * sizes.num_experts[n] for n, s in sizes.experts.items())
    )
    memory = reads = 0
    seconds = 0.0
    if REFIT in recipe.recover:
        memory = tokens * hidden * (itemsize + 4) + 2 * expert * 4
        memory += _solving(expert, hidden, max(1, round(retained / len(sizes.num_experts))), tokens * top_k)
        reads += sizes.whole.nbytes if compute.stream else 0
        if speed is not None:
            seconds += layers * (speed.reading + _REFIT * tokens * speed.plain)
    if DISTIL in recipe.recover:
        trained = retained * expert * _DOWN
        memory = max(memory, int(trained * _TRAINED))
        passes = 2 * _STREAMED_STEPS + 1
        reads += sizes.whole.nbytes + passes * kept if compute.stream else 0
        if speed is not None:
            looks = (_STREAMED_STEPS + 1) * HELD_BACK * tokens if compute.stream else 0.0
            trained_on = trained_tokens((1 - HELD_BACK) * tokens, tokens / len(samples), bool(compute.stream))
            run = tokens + trained_on * _TRAINING * (1.0 if compute.stream else _LOOKS) + looks
            seconds += layers * (run * speed.plain + (passes + 1) * (speed.reading if compute.stream else 0.0))
    waits = int(2 * (1 + 2 * HELD_BACK) * tokens * hidden * itemsize) if compute.stream else 0
    known = None if speed is None else seconds
    return RecoveryWork(recipe.recover, len(samples), tokens, memory, waits, reads, known)


def trained_tokens(fit: float, sample: float, streamed: bool) -> float:
    """Tokens that all steps of a distillation are trained on, each by whole samples.

    Args:
        fit: Tokens of the text that it is fitted to.
        sample: Of a sample.
        streamed: Whether the model is held one layer at a time.
    """
    if streamed:
        return _STREAMED_STEPS * max(sample, _STEP, min(_LARGEST_STEP, _EPOCHS * fit / _STREAMED_STEPS))
    return max(_LEAST, min(_MOST, math.ceil(_EPOCHS * fit / _STEP))) * max(sample, _STEP)


def _solving(expert: int, hidden: int, retained: int, routed: int) -> int:
    """Bytes that the refit of a layer takes to solve.

    Args:
        expert: Numbers of an expert.
        hidden: The hidden size.
        retained: Experts that a layer keeps.
        routed: Tokens, each for each expert that it goes to.
    """
    width = max(1, int(_DOWN * expert / hidden))
    features = width * max(1, min(retained, MOST_FEATURES // width))
    size = 8 if features <= EXACT_FEATURES else 4
    return size * features * (_SQUARES * features + _PRODUCTS * hidden) + min(2 * FEATURE_BYTES, 4 * routed * width)
