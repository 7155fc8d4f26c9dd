# SPDX-License-Identifier: Apache-2.0
"""Pruning a model in memory by a plan, with a recovery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..calibration.samples import CalibrationInput, CalibrationSet
from ..calibration.texts import needs_tokenizer
from ..checkpoints.source import Source
from ..config import MoEPrunerConfig
from ..errors import RequestError
from ..models.checks import usable_model
from ..models.memory import Compute
from ..names import REFIT
from ..plan import PruningPlan
from ..surgery.checks import check_plan
from ..surgery.in_memory import apply_plan
from .recover import Recovery

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def recover(
    model: PreTrainedModel,
    plan: PruningPlan,
    texts: CalibrationInput,
    steps: str | Sequence[str] = REFIT,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    what: str | Sequence[str] = (),
    num_samples: int | None = None,
    max_length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    compute: Compute = Compute(),
) -> PruningPlan:
    """Prune a model in memory by a plan, and give back some of what that costs.

    ``MoEPruner.prune`` does it with the plan that it makes, and ``apply --recover`` with the files of a checkpoint.

    Args:
        model: The unpruned model; afterwards pruned and recovered.
        plan: The plan.
        texts: Texts, files, records, a dataset or token tensors; a fifth is held back.
        steps: ``"refit"``, ``"distil"``, or both.
        tokenizer: For texts; by default the one in the model's folder.
        what: What a distillation trains, of ``"experts"``, ``"router"``, ``"norms"``; by default all.
        num_samples: Samples to use at most; by default all.
        max_length: Tokens of a sample at most; less if the model was made for less.
        batch_size: Samples in a forward pass.
        seed: For whatever is drawn.
        compute: In which precision.

    Returns:
        The plan, which remembers what the recovery was worth (``provenance["recovery"]``).

    Raises:
        RequestError: If the plan does not fit the model, or there is too little text; the model is then unchanged.
        RunError: If the recovery fails; the message says whether the experts are removed, and no weight is recovered.
    """
    plain = usable_model(model, to_change=True)
    recipe = MoEPrunerConfig(
        method="random",
        recover=steps,  # type: ignore[arg-type]  # made a tuple of there
        recover_what=what,  # type: ignore[arg-type]
        recovery_samples=num_samples,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
    )
    if not recipe.recover:
        raise RequestError("steps names nothing to recover with; it takes refit, distil or both.")
    check_plan(plan.without_heads, plain)
    known = Source(plain.name_or_path) if tokenizer is None and needs_tokenizer(texts) else tokenizer
    samples = CalibrationSet.for_recipe(texts, recipe, known, plain.config, recovers=True)
    samples.check_vocabulary(plain.config.get_text_config().vocab_size)
    recovery = Recovery.of_model(plain, plan, samples, recipe, compute)
    apply_plan(plan, model)
    return recovery.in_model(plain)
