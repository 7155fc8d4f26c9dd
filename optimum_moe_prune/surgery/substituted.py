# SPDX-License-Identifier: Apache-2.0
"""A copy of a checkpoint in which the experts that a plan removes answer with a constant.

What it looks like says ``architectures.substitution``. The router, every count and the numbers of the experts stay;
the tensors of experts that go are left out, and of each there is its mean output over the tokens of the calibration
that were routed to it. Bytes are copied as in ``surgery.files``.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..architectures.fingerprint import same_routers
from ..architectures.substitution import KEY, READER, READER_VERSION, name_of_constant
from ..checkpoints.cutting import Piece
from ..checkpoints.layout import Layout
from ..config import MoEPrunerConfig
from ..config_checks import check_served
from ..errors import RequestError, RunError
from ..names import KEEP, NOTES_LOGGER, PLAN_NAME
from ..plan import PruningPlan
from ..statistics.mean_outputs import check_mean_outputs, mean_outputs
from ..statistics.stats import CalibrationStats
from ..storage.folders import check_target
from ..storage.tensor_files import TORCH_DTYPES
from ..storage.values import Values
from ..targets.vllm import VLLM
from .checks import check_plan_for_config, check_routers
from .config_json import source_config
from .files import MAX_SHARD_SIZE, Prepared
from .heads import with_heads_settled
from .substitutable import check_substitution

logger = logging.getLogger(NOTES_LOGGER)


def check_in_memory(config: MoEPrunerConfig | None) -> None:
    """Raise if a recipe asks for what cannot be made of a model in memory.

    Raises:
        RequestError: If experts are to answer with a constant: transformers has no such model.
    """
    if config is not None and config.substitute:
        raise RequestError(
            f"substitute=True is for files that {READER} reads, and transformers has no such model to prune in "
            "memory; use prune_checkpoint, or substitute=False."
        )


def statistics_of(
    config: MoEPrunerConfig | None, stats: CalibrationStats | None, domain_weights: Mapping[str, float] | None
) -> CalibrationStats | None:
    """The statistics whose mean outputs a recipe puts in place of experts; None where it removes them.

    Args:
        config: The recipe, where there is one.
        stats: Those of the last calibration, where there was one.
        domain_weights: A share for each domain, where they were given.

    Raises:
        RequestError: If there are none, or without mean outputs.
    """
    if config is None or not config.substitute:
        return None
    if stats is None:
        raise RequestError(
            "with substitute=True experts answer with their mean output, and there are no statistics to take it from; "
            "pass a calibration, or statistics with mean outputs."
        )
    check_mean_outputs(stats)
    return stats if domain_weights is None else stats.with_domain_weights(domain_weights)


def constants_of(plan: PruningPlan, stats: CalibrationStats) -> tuple[PruningPlan, dict[int, dict[int, Tensor]]]:
    """What each expert that a plan removes answers with: its mean output; zeros where no token was routed to it.

    Args:
        plan: The plan.
        stats: Of a calibration of the plan's model.

    Returns:
        The plan, which remembers it, and the vectors ``(H,)`` by layer and expert.

    Raises:
        RequestError: If the statistics are of another model, or lack what it takes.
        RunError: If a mean is not finite.
    """
    check_mean_outputs(stats)
    if not same_routers(plan.made_for, stats.model):
        raise RequestError("these statistics are of another model than the one that the plan was made for.")
    constants: dict[int, dict[int, Tensor]] = {}
    unreached: dict[str, list[int]] = {}
    for index, total in plan.without_heads.original_num_experts.items():
        gone = [expert for expert in range(total) if expert not in plan.retained[index]]
        layer = stats.layers.get(index)
        if not gone:
            continue
        if layer is None or layer.num_experts != total:
            raise RequestError(
                f"these statistics are of another model: the plan has {total} experts in layer {index}, and they have "
                f"{'none' if layer is None else layer.num_experts}."
            )
        means, size = mean_outputs(layer, gone), layer.tensors["output_sum"].shape[-1]
        if never := [expert for expert, mean in means.items() if mean is None]:
            unreached[str(index)] = never
        constants[index] = {e: torch.zeros(size).double() if m is None else m for e, m in means.items()}
        if not all(bool(torch.isfinite(mean).all()) for mean in constants[index].values()):
            raise RunError(f"layer {index}: the mean output of an expert is NaN or infinite; calibrate again.")
    said = {
        "reader": f"{READER} {READER_VERSION}",
        "constants": "mean outputs",
        "calibration": stats.fingerprint,
        "samples": len(stats.samples),
        "domain_weights": stats.domain_weights,
        **({"unreached": unreached} if unreached else {}),
    }
    note = (
        f"{sum(map(len, constants.values()))} experts are left out and answer with their mean output over the "
        f"calibration's text; {READER} {READER_VERSION} reads that, and transformers does not"
    )
    notes = [note]
    if count := sum(map(len, unreached.values())):
        notes.append(f"{count} of them answer with 0: no token of the calibration was routed to them")
    for note in notes:
        logger.warning("%s", note)
    return replace(plan, provenance={**plan.provenance, "substitution": {**said, "notes": notes}}), constants


@contextlib.contextmanager
def substituted_checkpoint(
    plan: PruningPlan,
    layout: Layout,
    target: str | os.PathLike,
    stats: CalibrationStats,
    *,
    recipe: Values | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    standalone: bool = False,
    mtp: str | None = None,
) -> Iterator[Path]:
    """Write a copy of a checkpoint in which the experts that a plan removes answer with their mean output.

    Args:
        plan: The plan.
        layout: The checkpoint of the model it was made for.
        target: The folder to write, absent or empty.
        stats: Of a calibration of that model, with mean outputs.
        recipe: As for ``surgery.files.pruned_checkpoint``.
        max_shard_size: Likewise.
        overwrite: Likewise.
        standalone: Refused.
        mtp: Heads for further tokens stay whole; anything else is refused.

    Yields:
        The folder with everything in it, beside the target.

    Raises:
        RequestError: If the plan or the statistics are of another model, its reader does not take the checkpoint, or
            the target is in the way.
        RunError: As ``pruned_checkpoint``.
    """
    checkpoint = layout.checkpoint
    check_target(target, overwrite, [checkpoint.name_or_path], PLAN_NAME)
    check_plan_for_config(plan, layout.config)
    check_served(plan.config.get("target"), plan.config.get("parallel_size", 1))
    check_substitution(layout, standalone, mtp)
    check_routers(plan, layout.fingerprints())
    plan, constants = constants_of(with_heads_settled(plan, layout, KEEP if layout.heads else None), stats)
    config = VLLM.config(source_config(checkpoint.source), plan.without_heads.original_num_experts)
    config[KEY] = {str(layer): sorted(vectors) for layer, vectors in sorted(constants.items())}
    pieces = _pieces(layout, constants)
    prepared = Prepared(plan, checkpoint, Path(target), pieces, config, {}, max_shard_size, overwrite)
    with prepared.written(recipe) as output:
        yield output


def _pieces(layout: Layout, constants: Mapping[int, Mapping[int, Tensor]]) -> dict[str, Piece]:
    """All tensors but those of experts that go, and behind a layer's others the vectors of these."""
    made: dict[str, Piece | None] = {}  # by name in the source; None: left out
    vectors: dict[str, Piece] = {}
    checked: set[str] = set()
    for index, layer in layout.layers.items():
        checked.update(name for name in layer.names if name not in layer.whole)
        for number, vector in constants.get(index, {}).items():
            tensors = layer.experts[number]
            made |= dict.fromkeys(tensors.values())
            path, name = next(iter(tensors.items()))
            dtype = layout.checkpoint.tensors[name].dtype
            value = vector.to(TORCH_DTYPES[dtype])
            data = value.view(torch.uint8).numpy().tobytes()
            new = name_of_constant(name.removesuffix(f".{number}.{path}"), number)
            vectors[new] = Piece(new, dtype, tuple(value.shape), len(data), data=data)
    pieces = {
        name: made.get(name, Piece(name, tensor.dtype, tensor.shape, tensor.nbytes, checked=name in checked))
        for name, tensor in layout.checkpoint.tensors.items()
    }
    return {name: piece for name, piece in pieces.items() if piece is not None} | vectors
