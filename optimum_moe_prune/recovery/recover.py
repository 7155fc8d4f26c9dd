# SPDX-License-Identifier: Apache-2.0
"""Recovery: what is done before experts are removed, while the original is there, and what is done afterwards.

Before: what the original predicts is kept for a distillation, and down projections are refitted. After: refitted
weights are put in place, others are trained, and what that was worth is judged on text that nothing was fitted to.
What is no better is not kept.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration.samples import CalibrationSet
from ..checkpoints.layout import Layout, identity, model_dtype, open_layout
from ..config import MoEPrunerConfig
from ..errors import MoEPruneError, RunError
from ..models.blocks import moe_blocks
from ..models.layerwise import LayerByLayer
from ..models.memory import Compute, begun_with, load_model, open_runner, open_skeleton
from ..names import DISTIL, REFIT
from ..plan import PruningPlan
from ..processes import ALONE
from ..processes.folders import own_folder
from ..progress import working
from ..provenance import versions
from ..statistics import passages
from ..storage.growing import unfinished
from ..storage.values import Json
from ..storage.workspace import Workspace
from .distil import check_trainable, distil
from .distil_streamed import distil_streamed
from .refit import Refit, refit
from .split import Split, split_samples
from .steps import FEWEST_HELD_BACK, Distilled, DistilOptions
from .teacher import TOP, TeacherOutputs, teacher_outputs
from .trained import ROLES
from .verdict import Verdict, domains_of, one_domain
from .writing import put_into_files, put_into_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SETTINGS = (
    *("recover_what", "recovery_samples", "max_length", "batch_size", "seed"),
    *("text_column", "template_args", "skip_bad"),
)
"""Of the recipe, that a recovery follows from beside its text."""
_CALLED = {REFIT: "refit", DISTIL: "distillation"}
_CUT_ALONE = "The experts are removed, and no weight was recovered: the model is what the plan alone makes of it."
_IN_PART = (
    f"the divergences are those of the original's {TOP} most likely next tokens and of all others together, a little "
    "less than those of whole distributions"
)

TOKENS_PER_FEATURE = 10.0
"""Below it a refit rests on little text, which is said."""


@dataclass(frozen=True)
class Recovery:
    """A recovery of which all is done that needs the original.

    Attributes:
        plan: The plan.
        recipe: What is to be done.
        split: The text.
        refit: New down projections, where they were asked for.
        teacher: What the original predicts, where that is needed.
        compute: How models are run.
        workspace: Where unfinished work is kept.
        streamed: Whether the pruned model is held one layer at a time.
    """

    plan: PruningPlan
    recipe: MoEPrunerConfig
    split: Split
    refit: Refit | None
    teacher: TeacherOutputs | None
    compute: Compute
    workspace: Workspace
    streamed: bool = False

    @classmethod
    def of_model(
        cls,
        model: PreTrainedModel,
        plan: PruningPlan,
        samples: CalibrationSet,
        recipe: MoEPrunerConfig,
        compute: Compute = Compute(),
    ) -> Recovery:
        """Do what needs the original, of a model in memory, which stays as it is.

        Args:
            model: The unpruned model.
            plan: Its plan.
            samples: The text; a fifth of it is held back.
            recipe: What is to be done.
            compute: In which precision.

        Raises:
            RequestError: If there is too little text.
        """
        split = split_samples(samples)
        runner = LayerByLayer(model, dtype=compute.precision_of(model))
        return cls._done(runner, plan, samples, split, recipe, compute, Workspace(), None, False)

    @classmethod
    def of_checkpoint(
        cls,
        layout: Layout,
        plan: PruningPlan,
        samples: CalibrationSet,
        recipe: MoEPrunerConfig,
        compute: Compute = Compute(),
        workspace: Workspace = Workspace(),
    ) -> Recovery:
        """The same of a checkpoint, in memory or one layer at a time; an interrupted one goes on.

        Args:
            layout: The unpruned checkpoint.
            plan: Its plan.
            samples: The text.
            recipe: What is to be done.
            compute: How it is run.
            workspace: Where unfinished work is kept.

        Raises:
            RequestError: If there is too little text, or the checkpoint is quantised.
        """
        split, processes = split_samples(samples), compute.together
        begun = []
        if workspace.folder is not None and not workspace.restart:
            folders = [own_folder(processes, workspace.folder / REFIT), workspace.folder / "teacher"]
            begun = [unfinished(folder) for folder in folders]
        compute = compute.agreed(layout, *begun_with(*begun))
        with working("loading the model", None, did="loaded the model"):
            runner = open_runner(layout, compute)
        work: Json = {
            "model": identity(layout),
            "dtype": compute.dtype,
            "computing_dtype": compute.computing,
            "device": runner.device.type,
            "stream": runner.streams,
            "versions": versions(),
        }
        made = cls._done(runner, plan, samples, split, recipe, compute, workspace, work, runner.streams, layout)
        del runner
        gc.collect()  # the original has to be gone before the pruned model comes
        return made

    @classmethod
    def _done(
        cls,
        runner: LayerByLayer,
        plan: PruningPlan,
        samples: CalibrationSet,
        split: Split,
        recipe: MoEPrunerConfig,
        compute: Compute,
        workspace: Workspace,
        work: Json | None,
        streamed: bool,
        layout: Layout | None = None,
    ) -> Recovery:
        settings: Json = {"samples": samples.settings, "computing_dtype": {"dtype": compute.dtype}}
        found, teacher, processes = None, None, compute.together
        if DISTIL in recipe.recover and not streamed:
            check_trainable(runner.model, split.fit, recipe.recover_what or ROLES)
        if REFIT in recipe.recover:
            found = refit(
                runner,
                split,
                plan.without_heads.retained,
                batch_size=recipe.batch_size,
                dtypes=_same if layout is None else _in_files(layout, runner),
                work=work,
                settings=settings,
                workspace=workspace.part(REFIT),
                processes=processes,
            )
        if DISTIL in recipe.recover and (layout is None or processes.is_main):  # who writes files
            with torch.inference_mode(False):  # gradients will be taken of what follows from it
                teacher = teacher_outputs(
                    runner,
                    samples,
                    batch_size=recipe.batch_size,
                    work=work,
                    settings=settings,
                    workspace=workspace.part("teacher"),
                )
        return cls(plan, recipe, split, found, teacher, compute, workspace, streamed)

    # -- when the experts are gone

    def in_model(self, model: PreTrainedModel) -> PruningPlan:
        """Give a pruned model recovered weights; the plan, which remembers what that was worth.

        Args:
            model: The pruned model, in memory.

        Raises:
            RunError: If something fails; the model is then what the plan makes of it, with no weight recovered.
        """
        verdicts: dict[str, Verdict] = {}
        details: Json = {}
        before: Mapping[str, Tensor] = {}
        try:
            if self.refit is not None:
                verdicts[REFIT], details[REFIT] = self._of_refit(self.refit)
                if verdicts[REFIT].is_better:
                    before = put_into_model(model, self.refit.weights)
            if self.teacher is not None:
                texts = (self.split.fit, self.split.held_back, self.teacher)
                found = distil(model, *texts, *self._trained, dtype=self.compute.dtype)
                verdicts[DISTIL], details[DISTIL] = self._of_distillation(found, verdicts.get(REFIT))
                if verdicts[DISTIL].is_better:
                    put_into_model(model, found.tensors)
            return self._remembered(verdicts, details)
        except BaseException as error:
            put_into_model(model, before)
            if isinstance(error, KeyboardInterrupt):
                error.args = (f"the recovery was not finished. {_CUT_ALONE}",)
            if isinstance(error, MoEPruneError):
                raise RunError(f"the recovery failed: {error} {_CUT_ALONE}") from error
            raise

    def in_files(self, folder: Path) -> PruningPlan:
        """The same for a pruned checkpoint whose folder nobody reads yet; its files are written over.

        Args:
            folder: The checkpoint.
        """
        verdicts: dict[str, Verdict] = {}
        details: Json = {}
        if self.refit is not None:
            verdicts[REFIT], details[REFIT] = self._of_refit(self.refit)
            if verdicts[REFIT].is_better:
                put_into_files(folder, self.refit.weights)
        if self.teacher is not None:
            found = self._distilled(open_layout(str(folder)))
            verdicts[DISTIL], details[DISTIL] = self._of_distillation(found, verdicts.get(REFIT))
            if verdicts[DISTIL].is_better:
                put_into_files(folder, found.tensors)
        return self._remembered(verdicts, details)

    @property
    def _trained(self) -> tuple[tuple[str, ...], DistilOptions]:
        return self.recipe.recover_what or ROLES, DistilOptions(
            batch_size=self.recipe.batch_size, seed=self.recipe.seed
        )

    def _distilled(self, layout: Layout) -> Distilled:
        """A distillation of the pruned checkpoint."""
        assert self.teacher is not None
        compute = replace(self.compute, processes=ALONE)
        texts = (self.split.fit, self.split.held_back, self.teacher)
        if not self.streamed:
            model = load_model(layout, compute)
            stored = model_dtype(layout.config, layout.checkpoint)  # whatever it is loaded in
            return distil(model, *texts, *self._trained, dtype=compute.dtype, stored=stored)
        plan = {str(layer): list(experts) for layer, experts in self.plan.retained.items()}
        return distil_streamed(
            layout,
            *texts,
            *self._trained,
            compute=compute,
            work={"plan": plan, "recover": list(self.recipe.recover), "versions": versions()},
            workspace=self.workspace.part(DISTIL),
        )

    def _of_refit(self, found: Refit) -> tuple[Verdict, Json]:
        verdict = Verdict.of(self.split.held_back, found.divergences[0], found.divergences[1], self.recipe.seed)
        layers: Json = {
            str(result.layer): {
                "ridges": list(result.ridges),
                "error_left": result.error_after / result.error_before if result.error_before > 0 else 1.0,
                "left_out": list(result.left_out),
            }
            for result in found.layers
        }
        notes = []
        few = [result.tokens_per_feature for result in found.layers if result.is_changed]
        if few and min(few) < TOKENS_PER_FEATURE:
            notes.append(
                f"the refit rests on as few as {min(few):.1f} tokens for each feature of an expert; with more text "
                "(ten or more) it gives back more"
            )
        out = sum(len(result.left_out) for result in found.layers)
        if out:
            experts = "1 retained expert was" if out == 1 else f"{out} retained experts were"
            notes.append(f"{experts} not refitted: too few tokens reach them")
        return verdict, {"layers": layers, "notes": notes}

    def _of_distillation(self, found: Distilled, refitted: Verdict | None) -> tuple[Verdict, Json]:
        details: Json = {
            "steps": found.steps,
            "best": found.best,
            "looks": [list(look) for look in found.looks],
            "rank": found.rank,
            "numbers": dict(found.numbers),
            "notes": list(found.notes),
        }
        first = None
        if refitted is not None and refitted.is_better:
            more = self._whole_of_kept(refitted, found.divergences[0])
            first = {name: kl / more for name, kl in refitted.kl_before.items()}
        held_back = self.split.held_back
        before, after = found.divergences
        return Verdict.of(held_back, before, after, seed=self.recipe.seed, kl_first=first), details

    def _whole_of_kept(self, refitted: Verdict, before: Tensor) -> float:
        """How much larger divergences of whole distributions are than those of what is kept of the original's.

        Args:
            refitted: The refit, which measures whole ones.
            before: Of the refitted model, as the distillation measures it, by sample.
        """
        if self.teacher is None or self.teacher.is_whole or not float(before.sum()) > 0:
            return 1.0
        return float(refitted.sums[1].sum() / before.sum())

    def _remembered(self, verdicts: Mapping[str, Verdict], details: Json) -> PruningPlan:
        """The plan with what was done and what it was worth."""
        kept = [step for step, verdict in verdicts.items() if verdict.is_better]
        first = verdicts[kept[0]] if kept else next(iter(verdicts.values()))  # each kept one measured both of its ends
        whole = Verdict(first.kl_before, first.kl_before)
        if kept:
            after = verdicts[kept[-1]].sums[1]
            if len(kept) > 1:
                after = after * self._whole_of_kept(verdicts[REFIT], verdicts[DISTIL].sums[0])
            whole = Verdict.of(self.split.held_back, first.sums[0], after, seed=self.recipe.seed)
        judged, fit = self.split.held_back, self.split.fit
        notes = [note for of in details.values() for note in of.pop("notes")]
        if self.teacher is not None and not self.teacher.is_whole and first is verdicts[DISTIL]:
            notes.append(_IN_PART)
        notes.append(one_domain([sample.domain for sample in judged.samples]))
        if len(judged) < FEWEST_HELD_BACK and not any("held back to judge" in note for note in notes):
            samples = "sample is" if len(judged) == 1 else "samples are"
            notes.append(f"only {len(judged)} {samples} held back to judge the recovery by; more say it more surely")
        reason = "" if kept else "; ".join(f"{step}: {verdict.reason}" for step, verdict in verdicts.items())
        values = self.recipe.to_dict()
        said: Json = {
            "steps": kept or list(verdicts),
            "asked": list(self.recipe.recover),
            "settings": {name: values[name] for name in SETTINGS},
            "sources": list(judged.sources),
            "accepted": bool(kept),
            "reason": reason,
            "samples": {"fit": len(fit), "held_back": len(judged)},
            "tokens": {"fit": fit.num_tokens, "held_back": judged.num_tokens},
            "held_back_by_domain": domains_of(judged),
            **whole.to_dict(),
            **{step: {**verdict.to_dict(), **details[step]} for step, verdict in verdicts.items()},
            passages.KEY: passages.Passages.of(
                [sample.hash for sample in (*fit.samples, *judged.samples)], (*fit.token_ids, *judged.token_ids)
            ).to_dict(),
        }
        found = [note for note in notes if note]
        if kept and len(kept) < len(verdicts):
            refused = next(step for step in verdicts if step not in kept)
            found.append(f"what the {_CALLED[refused]} gave is not kept: {verdicts[refused].reason}")
        if not kept:
            found.append(f"recovery changed nothing: {reason}")
        return replace(self.plan, provenance={**self.plan.provenance, "recovery": {**said, "notes": found}})


def _same(layer: int, dtype: torch.dtype) -> torch.dtype:
    return dtype


def _in_files(layout: Layout, runner: LayerByLayer) -> Any:
    """The precision that a checkpoint's files have down projections in, whatever they are loaded in."""
    from ..models.skeleton import Skeleton

    skeleton = runner if isinstance(runner, Skeleton) else open_skeleton(layout, Compute("auto", "cpu"))
    path = layout.structure.layers
    blocks = {block.layer: block for block in moe_blocks(skeleton.model)}

    def dtype_of(layer: int, dtype: torch.dtype) -> torch.dtype:
        structure = blocks[layer].structure
        name = f"{structure.experts}.0.{structure.numbered[0]}" if structure.numbered else structure.expert_tensors[0]
        return skeleton.dtype_in_files(f"{path}.{layer}.{name}")

    return dtype_of
