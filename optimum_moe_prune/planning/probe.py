# SPDX-License-Identifier: Apache-2.0
"""How long a calibration will take, from one layer that is read and run on a few tokens."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..calibration.current import Current
from ..calibration.observer import LayerObserver
from ..calibration.outbox import Outbox
from ..calibration.samples import CalibrationSet
from ..checkpoints.layout import Layout
from ..errors import MoEPruneError
from ..models.memory import Compute, open_skeleton
from ..statistics.needs import Need
from ..statistics.samples import MaxTokens, most_tokens
from ..storage.growing import Store
from ..storage.tensor_files import Shapes

logger = logging.getLogger(__name__)

_TOKENS = 512
_SAMPLES = 4
_REPEATS = 5
_SECONDS = 1.0  # after which a layer is not run once more


@dataclass(frozen=True)
class Speed:
    """Seconds of one layer.

    Attributes:
        reading: To read its weights.
        plain: To run it, for a token.
        watched: To run it and gather what is needed, for a token.
    """

    reading: float
    plain: float
    watched: float


def probe(
    layout: Layout,
    samples: CalibrationSet,
    needs: frozenset[Need],
    compute: Compute,
    batch_size: int,
    max_tokens: MaxTokens = 8192,
) -> Speed | None:
    """Read and run the MoE layer in the middle, on normal random numbers; None if it cannot be run alone.

    Args:
        layout: The checkpoint.
        samples: Of which the beginnings are run.
        needs: What is to be gathered.
        compute: How the checkpoint is run, settled.
        batch_size: Samples in a forward pass.
        max_tokens: The most tokens for which statistics per token are kept, of all samples: here it is the same share.
    """
    ids = samples.token_ids[: min(batch_size, _SAMPLES)]
    few = CalibrationSet.build([tokens[: _TOKENS // len(ids)] for tokens in ids])
    try:
        kept = -(-few.num_tokens * min(most_tokens(max_tokens), samples.num_tokens) // samples.num_tokens)
        return _measured(layout, few, needs, compute, kept)
    except (MoEPruneError, RuntimeError, ValueError) as error:  # whatever it is, the work meets it again and names it
        logger.debug("no time can be foretold: %s", error)
        return None


def _measured(layout: Layout, few: CalibrationSet, needs: frozenset[Need], compute: Compute, kept: int) -> Speed:
    skeleton = open_skeleton(layout, compute)
    block = skeleton.blocks[len(skeleton.blocks) // 2]
    batch = next(iter(few.batches(len(few))))
    current = Current(few, kept, 0)
    current.set(batch)
    store = Store()

    def allocate(layer: int, shapes: Shapes) -> Mapping[str, Tensor]:
        return store.tensors(f"probe {layer}", shapes)

    skeleton.prepare()
    with skeleton.running(), Outbox() as outbox:
        state = skeleton.random_state(batch)
        began = time.perf_counter()
        with skeleton.loaded(block.layer):
            reading = time.perf_counter() - began
            skeleton.forward(block.layer, batch, state)  # what is done once is not counted

            def seconds(observer: LayerObserver | None) -> float:
                watching = contextlib.nullcontext() if observer is None else _observed(observer)
                taken: list[float] = []
                with watching:
                    while len(taken) < _REPEATS and sum(taken) < _SECONDS:
                        began = time.perf_counter()
                        with outbox.batch():
                            output = skeleton.forward(block.layer, batch, state)
                        outbox.wait()
                        float(output.flatten()[0])  # on a GPU: when it is done
                        taken.append(time.perf_counter() - began)
                return min(taken)  # whatever else the machine does only adds to it

            plain = seconds(None)
            forward = needs - {Need.FISHER}
            watched = seconds(LayerObserver(block, forward, current, allocate, None, outbox)) if forward else plain
    return Speed(reading, plain / few.num_tokens, watched / few.num_tokens)


def _observed(observer: LayerObserver) -> contextlib.AbstractContextManager[None]:
    return observer.block.observed(observer.on_logits, observer.experts_forward)
