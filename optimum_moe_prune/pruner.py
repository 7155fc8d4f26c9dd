# SPDX-License-Identifier: Apache-2.0
"""The front door: :class:`MoEPruner`. Each verb calls one function of one room."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration.calibrate import statistics_for
from .calibration.samples import CalibrationInput, CalibrationSet
from .checkpoints.layout import Layout, open_layout
from .checkpoints.source import Source
from .compat import ModelConfig, commit_of_config, text_config
from .config import MoEPrunerConfig
from .errors import RequestError, check_type
from .evaluation.choosing import choose_experts
from .evaluation.measure_sensitivity import SPARSITIES, experts_of, measure_sensitivity
from .evaluation.progressive import statistics_to_plan
from .models.blocks import moe_layers
from .models.checks import usable_model
from .models.memory import Compute
from .names import PLAN_NAME
from .plan import PruningPlan, with_parent
from .planning.build import budget_for, build_plan
from .planning.sensitivity import Sensitivity
from .processes import ALONE, shared
from .processes.folders import held
from .publishing.card import write_card
from .publishing.facts import CardFacts
from .publishing.hub import push_folder
from .publishing.outputs import apply_to_checkpoint, save_pruned
from .recovery.recover import Recovery
from .recovery.split import split_samples
from .recovery.texts import given_texts
from .statistics.samples import check_domain_weights
from .statistics.stats import CalibrationStats
from .storage.folders import check_target
from .storage.values import Json
from .storage.workspace import Workspace
from .surgery.checks import check_output, check_plan, check_plan_for_config, check_routers
from .surgery.files import MAX_SHARD_SIZE, shard_bytes
from .surgery.in_memory import apply_plan
from .surgery.settled import Settled, asks_model, settled
from .surgery.substituted import check_in_memory, statistics_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Calibration = CalibrationInput | CalibrationStats
    Model = PreTrainedModel | Layout

logger = logging.getLogger(__name__)


class MoEPruner:
    """Prunes Mixture-of-Experts models by a recipe, or again by a stored plan.

    Args:
        config: The recipe; not needed to apply a plan.
        plan: A plan to apply.
        source: The model's folder or Hub id, for its tokenizer and the files a checkpoint carries along.
        tokenizer: In place of the one found there.

    Attributes:
        config: The recipe.
        source: The model this pruner is bound to.
        stats: Statistics of the last calibration.
        pruning_plan: The plan made last, or loaded.
        sensitivity: What was measured last, or is to be planned with where ``allocation="sensitivity"`` or the method
            measures. Pruning by new texts measures anew, unless it was set from outside.
        output_dir: The checkpoint written last.
    """

    def __init__(
        self,
        config: MoEPrunerConfig | None = None,
        *,
        plan: PruningPlan | None = None,
        source: Source | str | os.PathLike | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config
        self.source = None if source is None else Source.of(source)
        self.pruning_plan = plan
        self.stats: CalibrationStats | None = None
        self.output_dir: Path | None = None
        self.model: PreTrainedModel | None = None
        self._sensitivity: Sensitivity | None = None
        self._sensitivity_is_given = False
        self._applied_plan: PruningPlan | None = None
        self._parent: PruningPlan | None = None  # the plan that made the bound model, if it is the one to prune
        self._tokenizer = tokenizer
        self._layouts: dict[Source, Layout] = {}  # of models on the Hub

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        config: MoEPrunerConfig | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        trust_remote_code: bool = False,
        **overrides: Any,
    ) -> MoEPruner:
        """Bind a pruner to a model, or load the recipe and plan of a checkpoint this package made.

        Args:
            name_or_path: A model's folder or Hub id. If it holds a stored plan and no recipe is given, ``prune``
                applies that plan to the base model without calibration.
            config: The recipe. With it the folder is simply the model, pruned before or not.
            revision: Of the Hub repository.
            token: For private repositories.
            cache_dir: Where downloads are kept.
            trust_remote_code: Passed to transformers, for configs and tokenizers with code of their own.
            overrides: Settings of ``MoEPrunerConfig``, in place of those of ``config``, of the stored recipe, or of
                the defaults.

        Raises:
            RequestError: If there is no model, its architecture is not known, or the recipe is wrong.
        """
        check_type(name_or_path, (str, os.PathLike), "the folder or Hub id of a model (a loaded one goes to prune)")
        check_type(config, (MoEPrunerConfig, type(None)), "a MoEPrunerConfig (MoEPrunerConfig.from_dict reads a dict)")
        source = Source(os.fspath(name_or_path), revision, token, cache_dir, trust_remote_code)
        pruner = cls(source=source)
        model_config = pruner.model_config
        stored = source.stored_plan()
        if config is None and stored is not None:
            pruner.pruning_plan = stored
            try:
                recipe = MoEPrunerConfig.from_pretrained(source.name_or_path, **source.for_files, **overrides)
                pruner.config = recipe if recipe.has_budget else None  # a plan made by hand has no recipe
            except RequestError as error:
                if overrides:
                    raise
                # The plan is enough to apply it; a method that is not installed here is no obstacle.
                logger.warning("the recipe in %s cannot be used, only its plan: %s", name_or_path, error)
            return pruner
        if stored is not None:
            logger.warning("%s was pruned before; with a new recipe it is taken as the model to prune.", name_or_path)
            pruner._parent = stored
        if overrides:
            config = MoEPrunerConfig.from_dict({} if config is None else config.to_dict(), **overrides)
        if config is not None and config.has_budget and config.fit is None:
            budget_for(config, *moe_layers(model_config, trust_remote_code))  # refuses what it can before any work
        pruner.config = config
        return pruner

    @classmethod
    def from_plan(
        cls, plan: PruningPlan, name_or_path: str | os.PathLike, config: MoEPrunerConfig | None = None, **settings: Any
    ) -> MoEPruner:
        """A pruner that applies a plan to the model it was made for.

        Args:
            plan: The plan.
            name_or_path: That model's folder or Hub id.
            config: A recipe, for the recovery that it names.
            settings: ``revision``, ``token``, ``cache_dir``, ``trust_remote_code``.

        Raises:
            RequestError: If there is no model, or its architecture is not known.
        """
        source = Source.of(name_or_path, **settings)
        source.config  # noqa: B018  # refuses what is no model
        return cls(config, plan=with_parent(plan, source.stored_plan()), source=source)

    # -- what it is bound to

    @property
    def name_or_path(self) -> str | None:
        """The folder or Hub id of the bound model."""
        return None if self.source is None else self.source.name_or_path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The one that was given, or the bound model's; None where there is none."""
        return self.source.tokenizer if self._tokenizer is None and self.source is not None else self._tokenizer

    @property
    def model_config(self) -> Any:
        """The config of the bound model; None where there is none."""
        return None if self.source is None else self.source.config

    @property
    def sensitivity(self) -> Sensitivity | None:
        """See the class."""
        return self._sensitivity

    @sensitivity.setter
    def sensitivity(self, value: Sensitivity | None) -> None:
        self._sensitivity, self._sensitivity_is_given = value, value is not None

    def layout(self, source: Source | str | os.PathLike | None = None) -> Layout:
        """Where the files of a checkpoint, by default the bound one, hold experts and routers; checked.

        Raises:
            RequestError: If there is none, or its files are damaged.
        """
        found = self._source(source)
        if found.is_local:  # what lies there may change; a commit does not
            return open_layout(found)
        if found not in self._layouts:
            self._layouts[found] = open_layout(found)
        return self._layouts[found]

    # -- the verbs

    def samples(
        self, calibration: CalibrationInput, model_config: ModelConfig = None, recovers: bool = False
    ) -> CalibrationSet:
        """The calibration samples that the recipe's settings make of a calibration.

        Args:
            calibration: Texts, files, records, a dataset or token tensors.
            model_config: Of the model they are for; by default of the bound one.
            recovers: Whether they are for the recipe's recovery.
        """
        config = self.model_config if model_config is None else model_config
        if config is None:
            raise RequestError("this pruner is bound to no model; pass the config of the one that samples are for.")
        return CalibrationSet.for_recipe(calibration, self._recipe(), self._tokenizer or self.source, config, recovers)

    def calibrate(
        self,
        model: Model | None = None,
        calibration: CalibrationInput | None = None,
        *,
        workspace: Workspace = Workspace(),
        **compute: Any,
    ) -> CalibrationStats:
        """Run the model over calibration samples and gather what the recipe's method needs.

        Args:
            model: A causal language model with real parameters; by default the bound checkpoint is calibrated.
            calibration: Texts, files, records, a dataset or token tensors.
            workspace: Where unfinished work on a checkpoint is kept.
            compute: ``dtype``, ``device``, ``stream``, ``processes``: how it is run (``models.memory.Compute``).

        Returns:
            The statistics, also readable as ``stats``.
        """
        model = self.layout() if model is None else usable_model(model)
        samples = self._samples_for(model, _needed(calibration))
        stats = statistics_for([self._recipe()], model, samples, Compute(**compute), workspace)
        self.stats, self.pruning_plan = self._with_commit(stats), None  # an earlier plan does not rest on these
        return self.stats

    def measure_sensitivity(
        self,
        model: Model | None = None,
        calibration: CalibrationInput | None = None,
        domain_weights: Mapping[str, float] | None = None,
        *,
        counts: Sequence[int] | None = None,
        sparsities: Sequence[float] = SPARSITIES,
        workspace: Workspace = Workspace(),
        **compute: Any,
    ) -> Sensitivity:
        """Measure how much is lost when the recipe's method prunes each layer alone, and whole models.

        Args:
            model: The unpruned model; by default the bound checkpoint is measured.
            calibration: As for :meth:`calibrate`; of it ``sensitivity_samples`` samples are measured on. Where there
                are no statistics yet, the model is calibrated on it first.
            domain_weights: A share for each domain in choosing experts.
            counts: Numbers of experts to measure in each layer; by default all, or twelve of them.
            sparsities: Of whole models; none for layers alone.
            workspace: As for :meth:`calibrate`.
            compute: As for :meth:`calibrate`.

        Returns:
            The sensitivity, also readable as ``sensitivity``; ``allocation="sensitivity"`` plans with it.
        """
        config, model = self._recipe(), self.layout() if model is None else usable_model(model)
        samples = self._samples_for(model, _needed(calibration))
        if self.stats is None:
            self.calibrate(model, samples, workspace=workspace.part("calibration"), **compute)
        self.sensitivity = measure_sensitivity(
            model,
            samples,
            [config],
            self.stats,
            domain_weights=domain_weights,
            counts=counts,
            sparsities=sparsities,
            batch_size=config.batch_size,
            compute=Compute(**compute),
            workspace=workspace.part("sensitivity"),
        )
        return self.sensitivity

    def plan(
        self, stats: CalibrationStats | None = None, domain_weights: Mapping[str, float] | None = None
    ) -> PruningPlan:
        """Choose the experts to retain.

        Args:
            stats: Statistics of a calibration; by default of the last one.
            domain_weights: A share for each domain; by default every token counts once.

        Returns:
            The plan, also readable as ``pruning_plan``.
        """
        stats = stats if stats is not None else self.stats
        if stats is None:
            raise RequestError("there are no statistics to plan with; calibrate first, or pass saved ones.")
        check_type(stats, CalibrationStats, "a CalibrationStats (CalibrationStats.load reads a folder)")
        recipe = self._recipe()
        made = settled(recipe, self.layout() if asks_model(recipe, self.source is not None) else None)
        plan = made.remembered(build_plan(stats, made.recipe, domain_weights, self.sensitivity))
        self.pruning_plan = with_parent(plan, self._parent)
        return self.pruning_plan

    def prune(
        self,
        model: PreTrainedModel,
        calibration: Calibration | None = None,
        domain_weights: Mapping[str, float] | None = None,
        recovery: CalibrationInput | None = None,
    ) -> PreTrainedModel:
        """Prune a model in memory: calibrate, plan, and remove experts; or apply the plan there is.

        Where the recipe says so (``recover``) some of what that costs is given back.

        Args:
            model: A causal language model with real parameters on any device; also compiled or in a ``DataParallel``.
            calibration: Texts, files, records, a dataset, token tensors, or statistics of this model. Not needed by
                methods that need none, nor where a plan was loaded or made before.
            domain_weights: A share for each domain of the calibration; by default every token counts once.
            recovery: Texts to recover with; by default those of the calibration, all of them.

        Returns:
            The same model, now smaller, as it was given.

        Raises:
            RequestError: If anything about the request is wrong; the model is then unchanged.
            RunError: If the model holds NaN or infinite values, and is unchanged; or recovery fails, and it is pruned.
        """
        check_in_memory(self.config)
        given, model = model, usable_model(model, to_change=True)
        plan = None if calibration is not None or domain_weights is not None else self.pruning_plan
        if plan is None:
            made = settled(self._recipe(), model)
            budget_for(made.recipe, *experts_of(model))
        else:
            check_plan(plan.without_heads, model)
        texts = self._to_recover_with(model, plan, calibration, recovery)
        if plan is None:
            plan = self._plan(made, model, calibration, domain_weights, Workspace(), Compute())
        recovered = None if texts is None else Recovery.of_model(model, plan, texts, self._recipe())
        pruned, self.model = apply_plan(plan, given), model
        self.pruning_plan = self._applied_plan = plan.without_recovery  # that is what it is, should the rest fail
        if recovered is not None:
            self.pruning_plan = self._applied_plan = recovered.in_model(model)
        return pruned

    @shared
    def prune_checkpoint(
        self,
        output_dir: str | os.PathLike,
        *,
        source: str | os.PathLike | None = None,
        calibration: Calibration | None = None,
        domain_weights: Mapping[str, float] | None = None,
        recovery: CalibrationInput | None = None,
        max_shard_size: str | int = MAX_SHARD_SIZE,
        overwrite: bool = False,
        restart: bool = False,
        standalone: bool = False,
        mtp: str | None = None,
        **options: Any,
    ) -> Path:
        """Prune a checkpoint's files: calibrate, plan, and write the pruned checkpoint; or apply the plan there is.

        The model is in memory for the calibration at most, and streamed only one layer of it. Tensors are copied as
        bytes, in the precision of the source. An interrupted calibration is continued by the same call. Of several
        processes that were launched all make the call, and the main one writes.

        Args:
            output_dir: The folder to write, absent or empty.
            source: The model's folder or Hub id; by default the bound one.
            calibration: As for :meth:`prune`.
            domain_weights: A share for each domain of the calibration; by default every token counts once.
            recovery: As for :meth:`prune`.
            max_shard_size: The most bytes in a file, as a number or ``"5GB"``.
            overwrite: Replace an earlier output of this package.
            restart: Begin an interrupted calibration anew.
            standalone: As for :meth:`save_pretrained`.
            mtp: What becomes of heads for further tokens, in place of what the recipe, or the plan, says.
            options: Of the card (``publishing.facts.CardFacts``), and of the calibration (:meth:`calibrate`).

        Returns:
            The folder.

        Raises:
            RequestError: If anything about the request is wrong; nothing is written then.
            RunError: If the model holds NaN or infinite values, or something cannot be written. What a calibration
                had finished stays in the sibling ``.<name>.partial``.
        """
        name = self.name_or_path if source is None else os.fspath(source)
        check_target(output_dir, overwrite, [name], PLAN_NAME)
        shard_bytes(max_shard_size)
        read, card, way = self._source(source), CardFacts.taken(options), Compute(**options)
        plan = None if calibration is not None or domain_weights is not None else self.pruning_plan
        if plan is not None:
            check_plan_for_config(plan, read.config)
        layout = self.layout(source)
        texts = self._to_recover_with(layout, plan, calibration, recovery)
        if plan is not None and texts is not None:
            check_routers(plan, layout.fingerprints())  # before the recovery, and not after it
        mtp = mtp or (None if self.config is None else self.config.mtp)
        workspace = Workspace.beside(output_dir, restart)
        with held(way.together, output_dir):
            if plan is None:
                made = settled(self._recipe(), layout, standalone, mtp)
                budget = budget_for(made.recipe, *experts_of(layout))
                check_output(layout, budget, output_dir, standalone, mtp, made.recipe.substitute)
                plan = self._plan(made, layout, calibration, domain_weights, workspace, way)

            means, recovered = statistics_of(self.config, self.stats, domain_weights), None
            if texts is not None:
                kept = workspace.part("recovery")
                recovered = Recovery.of_checkpoint(layout, plan, texts, self._recipe(), way, kept)
            anew = calibration is not None
            parts = dict.fromkeys(("calibration", "sensitivity", "progressive"), anew) | {"recovery": True}

            def write(made: PruningPlan = plan) -> None:
                apply_to_checkpoint(
                    made, layout, output_dir, recipe=self._stored_recipe(), max_shard_size=max_shard_size,
                    overwrite=overwrite, standalone=standalone, mtp=mtp, card=card, substitute=means,
                    finish=None if recovered is None else recovered.in_files,
                )  # fmt: skip
                for part in (part for part, is_done in parts.items() if is_done):
                    workspace.part(part).clear()

            way.together.once(write)
            if recovered is not None and way.together.is_main:
                self.pruning_plan = PruningPlan.load(Path(output_dir))
        self.output_dir = Path(output_dir)
        return self.output_dir

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        model: PreTrainedModel | None = None,
        overwrite: bool = False,
        standalone: bool = False,
        **card: Any,
    ) -> Path:
        """Write the pruned checkpoint with recipe, plan, model card, tokenizer and generation config.

        The config is the source's own with the pruning keys changed. Everything is written beside the target and
        renamed.

        Args:
            save_directory: The target, absent or empty.
            model: The pruned model; by default the one this pruner pruned.
            overwrite: Replace an earlier output of this package.
            standalone: Where layers keep different numbers of experts, add a modelling file, with which
                ``trust_remote_code=True`` loads the checkpoint without this package.
            card: ``base_model`` (its id on the Hub), ``license``, ``language``: what the card says of the original.

        Raises:
            RequestError: If there is no pruned model, it does not match the plan, or the target is in the way.
        """
        model = model if model is not None else self.model
        plan = self._applied_plan if model is self.model else self.pruning_plan
        if model is None or plan is None:
            raise RequestError("there is no pruned model to save; call prune first, or pass the model it returned.")
        self.output_dir = save_pruned(
            model,
            plan,
            save_directory,
            recipe=self._stored_recipe(),
            source=self.source,
            source_config=self.model_config,
            tokenizer=self._tokenizer,
            overwrite=overwrite,
            standalone=standalone,
            card=CardFacts(**card),
        )
        return self.output_dir

    def push_to_hub(self, repo_id: str, folder: str | os.PathLike | None = None, **options: Any) -> CommitInfo:
        """Publish a pruned checkpoint in one commit: weights, tokenizer, recipe, plan, card, evaluation and report.

        Args:
            repo_id: The repository, made if absent.
            folder: The checkpoint; by default the one this pruner wrote last. Its card is made anew, under the
                repository's name.
            options: ``private``, ``token`` (by default the pruner's own, or the one of ``hf auth login``),
                ``revision``, ``commit_message``, ``create_pr``: see ``publishing.hub.push_folder``.

        Raises:
            RequestError: If there is no checkpoint, the repository holds something else, or the Hub refuses.
            RunError: If the Hub cannot be reached or fails; nothing was published then, and the same call continues.
        """
        folder = folder if folder is not None else self.output_dir
        if folder is None:
            raise RequestError("there is no checkpoint to publish; write one (save_pretrained), or pass folder=.")
        write_card(folder, repo_id)
        if options.get("token") is None and self.source is not None:
            options["token"] = self.source.token
        return push_folder(folder, repo_id, **options)

    # -- helpers

    def _recipe(self) -> MoEPrunerConfig:
        if self.config is None:
            raise RequestError("this pruner has no recipe; pass config=MoEPrunerConfig(method=..., num_experts=...).")
        return self.config

    def _stored_recipe(self) -> Json | None:
        """What is kept beside a plan; None where the plan's own says it: one that was fitted has a number there.

        A recovery of a plan that was made by hand has no recipe that says which experts.
        """
        recipe = self.config
        return None if recipe is None or recipe.fit is not None or not recipe.has_budget else recipe.to_dict()

    def _source(self, source: Source | str | os.PathLike | None) -> Source:
        """A checkpoint, by default the bound one."""
        if self.source is not None:
            return self.source if source is None else self.source.at(str(source))
        if source is None:
            raise RequestError("this pruner is not bound to a checkpoint; pass source=, or the model itself.")
        return Source.of(source)

    def _samples_for(self, model: Model, calibration: CalibrationInput, recovers: bool = False) -> CalibrationSet:
        """As :meth:`samples`, by the tokenizer of the model that they are for."""
        source = model.checkpoint.source if isinstance(model, Layout) else self.source
        return CalibrationSet.for_recipe(
            calibration, self._recipe(), self._tokenizer or source, model.config, recovers
        )

    def _to_recover_with(
        self,
        model: Model,
        plan: PruningPlan | None,
        calibration: Calibration | None,
        recovery: CalibrationInput | None,
    ) -> CalibrationSet | None:
        """The texts of the recipe's recovery, checked; None where there is none to do."""
        texts = given_texts(self.config, plan, model, calibration, recovery)
        if texts is None:
            return None
        samples = self._samples_for(model, texts, recovers=True)
        samples.check_vocabulary(text_config(model.config).vocab_size)
        split_samples(samples)
        return samples

    def _plan(
        self,
        made: Settled,
        model: Model,
        calibration: Calibration | None,
        domain_weights: Mapping[str, float] | None,
        workspace: Workspace,
        compute: Compute,
    ) -> PruningPlan:
        """A plan from given statistics, from a calibration, or from the last one."""
        recipe = made.recipe
        texts = None if isinstance(calibration, CalibrationStats) else calibration
        compute = compute if texts is not None else replace(compute, processes=ALONE)  # there is nothing to share
        sensitivity = self.sensitivity if self._sensitivity_is_given or texts is None else None
        measures = recipe.measures and sensitivity is None
        reads = recipe.measures or recipe.needs_text
        samples = None if texts is None or not reads else self._samples_for(model, texts)
        if samples is not None and domain_weights is not None:
            check_domain_weights(samples.samples, domain_weights)
        if isinstance(calibration, CalibrationStats):
            self.stats = calibration
        elif texts is not None or self.stats is None or not recipe.needs_text:
            given = (recipe, model, samples, sensitivity, domain_weights)
            stats, sensitivity = statistics_to_plan(*given, compute=compute, workspace=workspace)
            self.stats = self._with_commit(stats)
        plan, sensitivity = choose_experts(
            model, recipe, self.stats, samples, sensitivity, domain_weights=domain_weights, compute=compute,
            workspace=workspace.part("sensitivity"),
        )  # fmt: skip
        if measures:
            self._sensitivity = sensitivity  # other texts are measured anew
        parent = model.checkpoint.source.stored_plan() if isinstance(model, Layout) else self._parent
        self.pruning_plan = with_parent(made.remembered(plan), parent)
        return self.pruning_plan

    def _with_commit(self, stats: CalibrationStats) -> CalibrationStats:
        """Statistics of a model in memory, with the commit of the repository this pruner is bound to."""
        if stats.model["name_or_path"] != self.name_or_path or stats.model["revision"] or self.source is None:
            return stats
        commit = commit_of_config(self.model_config)
        return stats if commit is None else replace(stats, model={**stats.model, "revision": commit})


def _needed(calibration: CalibrationInput | None) -> CalibrationInput:
    if calibration is None:
        raise RequestError("a calibration is needed; pass calibration=texts.")
    return calibration
