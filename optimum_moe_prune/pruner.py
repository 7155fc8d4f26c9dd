# SPDX-License-Identifier: Apache-2.0
"""The front door: :class:`MoEPruner`. Thin; each verb calls a public function."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from .calibration.calibrate import calibrate_checkpoint
from .calibration.in_memory import collect, empty_stats
from .calibration.samples import CalibrationInput, CalibrationSet, sample_length
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.layout import Layout, find_layout
from .checkpoints.source import load_model_config, stored_plan, without_code
from .config import MoEPrunerConfig
from .errors import RequestError
from .evaluation.measure_sensitivity import measure_checkpoint, measure_sensitivity
from .methods import BY_SENSITIVITY
from .methods.budget import UniformBudget
from .models.blocks import model_facts, moe_blocks, moe_layers
from .models.checks import check_model
from .models.layerwise import LayerByLayer
from .models.skeleton import Skeleton
from .plan import PruningPlan, with_parent
from .planning.build import budget_for, build_plan, plan_needs
from .planning.sensitivity import Sensitivity
from .publishing.card import write_card
from .publishing.hub import push_folder
from .publishing.outputs import apply_to_checkpoint, save_pruned
from .statistics.samples import check_domain_weights
from .statistics.stats import CalibrationStats
from .storage.folders import check_space, check_target, working_on
from .storage.growing import calibration_folder, sensitivity_folder
from .surgery.checks import check_plan_for_config, check_request
from .surgery.files import MAX_SHARD_SIZE, shard_bytes
from .surgery.in_memory import apply_plan

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class MoEPruner:
    """Prunes Mixture-of-Experts models by a recipe, or again by a stored plan.

    Args:
        config: The recipe; not needed to apply a plan.
        plan: A plan to apply.
        name_or_path: The model's folder or Hub id, for its tokenizer and the files a checkpoint carries along.
        tokenizer: In place of the one found there.
        model_config: The config of the model.
        parent: The plan that made the model at ``name_or_path``, if this package pruned it.
        hub: ``revision``, ``token``, ``cache_dir`` and ``trust_remote_code``, as transformers takes them.

    Attributes:
        config: The recipe.
        stats: Statistics of the last calibration.
        pruning_plan: The plan made last, or loaded.
        sensitivity: What was measured last, or is to be planned with where ``allocation="sensitivity"``. Pruning by
            new texts measures anew, unless it was set from outside.
        output_dir: The checkpoint written last.
    """

    def __init__(
        self,
        config: MoEPrunerConfig | None = None,
        *,
        plan: PruningPlan | None = None,
        name_or_path: str | os.PathLike | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model_config: Any = None,
        parent: PruningPlan | None = None,
        hub: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.pruning_plan = plan
        self.name_or_path = None if name_or_path is None else str(name_or_path)
        self.stats: CalibrationStats | None = None
        self.sensitivity: Sensitivity | None = None
        self._measured: Sensitivity | None = None  # by a pruning, for its texts
        self.output_dir: Path | None = None
        self.model: PreTrainedModel | None = None
        self.model_config = model_config
        self._applied_plan: PruningPlan | None = None
        self._tokenizer = tokenizer
        self._tokenizer_given = tokenizer is not None
        self._parent = parent
        self._hub = dict(hub or {})

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        config: MoEPrunerConfig | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
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
        given = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "trust_remote_code": trust_remote_code or None,
        }
        hub = {key: value for key, value in given.items() if value is not None}
        model_config = load_model_config(name_or_path, **hub)
        stored = stored_plan(name_or_path, hub)
        if config is not None or stored is None:
            if overrides:
                config = MoEPrunerConfig.from_dict({} if config is None else config.to_dict(), **overrides)
            if stored is not None:
                logger.warning(
                    "%s was pruned before; with a new recipe it is taken as the model to prune.", name_or_path
                )
            if config is not None:
                budget_for(config, *moe_layers(model_config))  # refuses what can be refused before any work
            return cls(config, name_or_path=name_or_path, model_config=model_config, parent=stored, hub=hub)
        try:
            recipe = MoEPrunerConfig.from_pretrained(name_or_path, **without_code(hub), **overrides)
        except RequestError as error:
            if overrides:
                raise
            # The plan is enough to apply it; a method that is not installed here is no obstacle.
            logger.warning("the recipe in %s cannot be used, only its plan: %s", name_or_path, error)
            recipe = None
        return cls(recipe, plan=stored, name_or_path=name_or_path, model_config=model_config, hub=hub)

    @classmethod
    def from_plan(cls, plan: PruningPlan, name_or_path: str | os.PathLike, **hub: Any) -> MoEPruner:
        """A pruner that applies a plan to the model it was made for.

        Args:
            plan: The plan.
            name_or_path: That model's folder or Hub id.
            hub: ``revision``, ``token``, ``cache_dir``, ``trust_remote_code``.

        Raises:
            RequestError: If there is no model, or its architecture is not known.
        """
        model_config = load_model_config(name_or_path, **hub)
        parent = stored_plan(name_or_path, hub)
        if parent is not None and "parent" not in plan.provenance:
            plan = with_parent(plan, parent)
        return cls(plan=plan, name_or_path=name_or_path, model_config=model_config, hub=hub)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, loaded when first asked for; None where there is none."""
        if self._tokenizer is None and self.name_or_path is not None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, **self._hub)
            except (OSError, ValueError) as error:
                logger.warning("no tokenizer can be loaded from %s: %s", self.name_or_path, str(error).split("\n")[0])
        return self._tokenizer

    # -- the verbs

    def samples(self, calibration: CalibrationInput, model_config: Any = None) -> CalibrationSet:
        """The calibration samples that the recipe's settings make of a calibration.

        Args:
            calibration: Texts, files, records, a dataset or token tensors.
            model_config: Of the model they are for; by default of the bound one.
        """
        config = self._recipe()
        if isinstance(calibration, CalibrationSet):
            return calibration
        return CalibrationSet.build(
            calibration,
            self.tokenizer,
            num_samples=config.num_samples,
            max_length=sample_length(config.max_length, self.model_config if model_config is None else model_config),
            sample_selection=config.sample_selection,
            num_clusters=config.num_clusters,
            pack=config.pack,
            seed=config.seed,
        )

    def calibrate(
        self,
        model: PreTrainedModel | None = None,
        calibration: CalibrationInput | None = None,
        *,
        stream: bool | None = None,
        dtype: str = "auto",
        device: str = "cpu",
    ) -> CalibrationStats:
        """Run the model over calibration samples and gather what the recipe's method needs.

        Args:
            model: A causal language model with real parameters; by default the bound checkpoint is calibrated.
            calibration: Texts, files, records, a dataset or token tensors.
            stream: Without a model: hold one decoder layer in memory at a time; by default where it does not fit.
            dtype: Without a model: the precision to calculate in.
            device: Without a model: where to calculate.

        Returns:
            The statistics, also readable as ``stats``.
        """
        config = self._recipe()
        if calibration is None:
            raise RequestError("a calibration is needed; pass calibration=texts.")
        samples = self.samples(calibration, None if model is None else model.config)
        how: dict[str, Any] = {
            "batch_size": config.batch_size,
            "max_tokens": config.max_tokens,
            "seed": config.seed,
        }
        if model is not None:
            self.stats = self._with_commit(collect(model, samples, plan_needs(config), **how))
        else:
            how.update(stream=stream, dtype=dtype, device=device, hub=self._hub)
            self.stats = calibrate_checkpoint(self.layout(), samples, plan_needs(config), **how)
        self.pruning_plan = None  # one made or loaded before does not rest on these statistics
        return self.stats

    def measure_sensitivity(
        self,
        model: PreTrainedModel | None = None,
        calibration: CalibrationInput | None = None,
        domain_weights: Mapping[str, float] | None = None,
        *,
        stream: bool | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        **settings: Any,
    ) -> Sensitivity:
        """Measure how much is lost when the recipe's method prunes each layer alone, and whole models.

        Args:
            model: The unpruned model; by default the bound checkpoint is measured.
            calibration: As for :meth:`calibrate`; of it ``sensitivity_samples`` samples are measured on. Where there
                are no statistics yet, the model is calibrated on it first.
            domain_weights: A share for each domain in choosing experts.
            stream: Without a model: hold one decoder layer in memory at a time; by default where it does not fit.
            dtype: Without a model: the precision to calculate in.
            device: Without a model: where to calculate.
            settings: ``counts``, ``sparsities`` and ``batch_size`` (``measure.measure_sensitivity``).

        Returns:
            The sensitivity, also readable as ``sensitivity``; ``allocation="sensitivity"`` plans with it.
        """
        config = self._recipe()
        if calibration is None:
            raise RequestError("a calibration is needed; pass calibration=texts.")
        how: dict[str, Any] = {"stream": stream, "dtype": dtype, "device": device}
        samples = self.samples(calibration, None if model is None else model.config)
        if self.stats is None and model is None:
            self.calibrate(None, samples, **how)
        elif self.stats is None:
            self.calibrate(model, samples)
        assert self.stats is not None
        settings = {"domain_weights": domain_weights, "batch_size": config.batch_size, **settings}
        few = samples.take(config.sensitivity_samples)
        if model is None:
            how["hub"] = self._hub
            self.sensitivity = measure_checkpoint(self.layout(), few, self.stats, [config], **how, **settings)
        else:
            check_model(model)
            self.sensitivity = measure_sensitivity(LayerByLayer(model), few, self.stats, [config], **settings)
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
        plan = build_plan(stats, self._recipe(), domain_weights, self.sensitivity)
        self.pruning_plan = plan if self._parent is None else with_parent(plan, self._parent)
        return self.pruning_plan

    def prune(
        self,
        model: PreTrainedModel,
        calibration: CalibrationInput | CalibrationStats | None = None,
        domain_weights: Mapping[str, float] | None = None,
    ) -> PreTrainedModel:
        """Prune a model in memory: calibrate, plan, and remove experts; or apply the plan there is.

        Args:
            model: A causal language model with real parameters on any device.
            calibration: Texts, files, records, a dataset, token tensors, or statistics of this model. Not needed by
                methods that need none, nor where a plan was loaded or made before.
            domain_weights: A share for each domain of the calibration; by default every token counts once.

        Returns:
            The same model, now smaller.

        Raises:
            RequestError: If anything about the request is wrong; the model is then unchanged.
            RunError: If the model holds NaN or infinite values; the model is then unchanged.
        """
        check_model(model)
        plan = self.pruning_plan
        if calibration is not None or domain_weights is not None or plan is None:
            config = self._recipe()
            blocks = moe_blocks(model)
            budget_for(config, {block.layer: block.num_experts for block in blocks}, blocks[0].routing)

            def nothing() -> CalibrationStats:
                counts = {block.layer: block.num_experts for block in blocks}
                return self._with_commit(empty_stats(model_facts(model), counts, blocks[0].routing, seed=config.seed))

            plan = self._plan_from(
                calibration,
                domain_weights,
                model.config,
                nothing,
                lambda samples: self.calibrate(model, samples),
                lambda samples, stats: measure_sensitivity(
                    LayerByLayer(model),
                    samples,
                    stats,
                    [config],
                    domain_weights=domain_weights,
                    sparsities=(),
                    batch_size=config.batch_size,
                ),
            )
        self.model, self._applied_plan = apply_plan(plan, model), plan
        return self.model

    def prune_checkpoint(
        self,
        output_dir: str | os.PathLike,
        *,
        source: str | os.PathLike | None = None,
        calibration: CalibrationInput | CalibrationStats | None = None,
        domain_weights: Mapping[str, float] | None = None,
        stream: bool | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        max_shard_size: str | int = MAX_SHARD_SIZE,
        overwrite: bool = False,
        restart: bool = False,
        standalone: bool = False,
    ) -> Path:
        """Prune a checkpoint's files: calibrate, plan, and write the pruned checkpoint; or apply the plan there is.

        The model is in memory for the calibration at most, and with ``stream`` only one layer of it. Tensors are
        copied as bytes, in the precision of the source. An interrupted calibration is continued by the same call.

        Args:
            output_dir: The folder to write, absent or empty.
            source: The model's folder or Hub id; by default the bound one.
            calibration: As for :meth:`prune`.
            domain_weights: A share for each domain of the calibration; by default every token counts once.
            stream: Hold one decoder layer in memory at a time while calibrating; by default where the model does not
                fit.
            dtype: The precision of the calibration; ``"auto"`` is the checkpoint's.
            device: Where to calibrate.
            max_shard_size: The most bytes in a file, as a number or ``"5GB"``.
            overwrite: Replace an earlier output of this package.
            restart: Begin an interrupted calibration anew.
            standalone: As for :meth:`save_pretrained`.

        Returns:
            The folder.

        Raises:
            RequestError: If anything about the request is wrong; nothing is written then.
            RunError: If the model holds NaN or infinite values, or something cannot be written. What a calibration
                had finished stays in the sibling ``.<name>.partial``.
        """
        if source is not None and str(source) != self.name_or_path:
            other = self._bound_to(source)
            try:
                return other.prune_checkpoint(
                    output_dir,
                    calibration=calibration,
                    domain_weights=domain_weights,
                    stream=stream,
                    dtype=dtype,
                    device=device,
                    max_shard_size=max_shard_size,
                    overwrite=overwrite,
                    restart=restart,
                    standalone=standalone,
                )
            finally:
                self.stats, self.pruning_plan = other.stats, other.pruning_plan
                self.sensitivity, self._measured = other.sensitivity, other._measured
                self.output_dir = other.output_dir
        if self.name_or_path is None:
            raise RequestError("this pruner is not bound to a checkpoint; pass source=.")
        check_target(output_dir, overwrite, [self.name_or_path])
        shard_bytes(max_shard_size)
        plan = None if calibration is not None or domain_weights is not None else self.pruning_plan
        if plan is not None:
            check_plan_for_config(plan, self._model_config())
        layout = self.layout()
        with working_on(output_dir):
            if plan is None:
                how: dict[str, Any] = {"stream": stream, "dtype": dtype, "device": device, "restart": restart}
                plan = self._planned(layout, output_dir, calibration, domain_weights, standalone, how)
            apply_to_checkpoint(
                plan,
                layout,
                output_dir,
                recipe=None if self.config is None else self.config.to_dict(),
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                standalone=standalone,
            )
            if calibration is not None:
                for folder in (calibration_folder(output_dir), sensitivity_folder(output_dir)):
                    shutil.rmtree(folder, ignore_errors=True)
        self.output_dir = Path(output_dir)
        return self.output_dir

    def _planned(
        self,
        layout: Layout,
        output_dir: str | os.PathLike,
        calibration: CalibrationInput | CalibrationStats | None,
        domain_weights: Mapping[str, float] | None,
        standalone: bool,
        how: dict[str, Any],
    ) -> PruningPlan:
        """A plan for the bound checkpoint, when everything that can be refused before a calibration is looked at."""
        config = self._recipe()
        budget = budget_for(config, layout.num_experts, layout.spec.routing(layout.config))
        uniform = isinstance(budget, UniformBudget) and len(set(budget.num_experts.values())) == 1
        check_request(layout, uniform, standalone)
        share = budget.total / sum(layout.num_experts.values())
        check_space(output_dir, int(layout.checkpoint.nbytes - (1 - share) * layout.expert_bytes))

        def nothing() -> CalibrationStats:
            Skeleton(layout, torch.float32)  # looks whether all tensors are there
            routing = layout.spec.routing(layout.config)
            return empty_stats(layout.facts(), layout.num_experts, routing, seed=config.seed)

        def calibrate(samples: CalibrationSet) -> CalibrationStats:
            return calibrate_checkpoint(
                layout,
                samples,
                plan_needs(config),
                batch_size=config.batch_size,
                max_tokens=config.max_tokens,
                seed=config.seed,
                folder=calibration_folder(output_dir),
                hub=self._hub,
                **how,
            )

        def measure(samples: CalibrationSet, stats: CalibrationStats) -> Sensitivity:
            return measure_checkpoint(
                layout,
                samples,
                stats,
                [config],
                domain_weights=domain_weights,
                sparsities=(),
                batch_size=config.batch_size,
                folder=sensitivity_folder(output_dir),
                hub=self._hub,
                **how,
            )

        return self._plan_from(calibration, domain_weights, layout.config, nothing, calibrate, measure)

    def _plan_from(
        self,
        calibration: CalibrationInput | CalibrationStats | None,
        domain_weights: Mapping[str, float] | None,
        model_config: Any,
        nothing: Callable[[], CalibrationStats],
        calibrate: Callable[[CalibrationSet], CalibrationStats],
        measure: Callable[[CalibrationSet, CalibrationStats], Sensitivity],
    ) -> PruningPlan:
        """A plan from given statistics, from those of no calibration, from a calibration, or from the last one's."""
        config = self._recipe()
        given = self.sensitivity is not None and self.sensitivity is not self._measured
        texts = calibration is not None and not isinstance(calibration, CalibrationStats)
        measures = config.allocates == BY_SENSITIVITY and not given and (texts or self.sensitivity is None)
        samples = None
        if isinstance(calibration, CalibrationStats):
            self.stats = calibration
        elif calibration is not None and (measures or plan_needs(config)):
            samples = self.samples(calibration, model_config)
            if domain_weights is not None:
                check_domain_weights(samples.samples, domain_weights)
            self.stats = calibrate(samples) if plan_needs(config) else nothing()
        elif not plan_needs(config):
            self.stats = nothing()
        elif self.stats is None:
            raise RequestError(f"method {config.method!r} needs a calibration; pass calibration=texts.")
        if measures:
            if samples is None:
                raise RequestError(
                    "allocation 'sensitivity' needs texts to measure on; pass calibration=texts, or set "
                    "pruner.sensitivity to what was measured before."
                )
            self.sensitivity = self._measured = measure(samples.take(config.sensitivity_samples), self.stats)
        return self.plan(domain_weights=domain_weights)

    def _bound_to(self, source: str | os.PathLike) -> MoEPruner:
        """The same pruner, for another checkpoint."""
        other = MoEPruner(
            self.config,
            plan=self.pruning_plan,
            name_or_path=source,
            tokenizer=self._tokenizer if self._tokenizer_given else None,
            model_config=load_model_config(source, **self._hub),
            parent=stored_plan(source, self._hub),
            hub=self._hub,
        )
        other.stats, other.sensitivity, other._measured = self.stats, self.sensitivity, self._measured
        return other

    def _model_config(self) -> Any:
        """The config of the bound model."""
        if self.model_config is None:
            self.model_config = load_model_config(str(self.name_or_path), **self._hub)
        return self.model_config

    def layout(self) -> Layout:
        """Where the files of the bound checkpoint hold experts and routers; checked.

        Raises:
            RequestError: If there is none, or its files are damaged.
        """
        if self.name_or_path is None:
            raise RequestError("this pruner is not bound to a model; pass the model to calibrate.")
        config = self._model_config()
        commit = getattr(config, "_commit_hash", None)
        hub = {**self._hub, "revision": commit} if commit else self._hub
        return find_layout(Checkpoint.open(self.name_or_path, hub), config)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        model: PreTrainedModel | None = None,
        overwrite: bool = False,
        standalone: bool = False,
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
            recipe=plan.config if self.config is None else self.config.to_dict(),
            source=self.name_or_path,
            source_config=None if self.name_or_path is None else self._model_config(),
            hub=self._hub,
            tokenizer=self._tokenizer if self._tokenizer_given else None,
            overwrite=overwrite,
            standalone=standalone,
        )
        return self.output_dir

    def push_to_hub(
        self,
        repo_id: str,
        folder: str | os.PathLike | None = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Publish a pruned checkpoint in one commit: weights, tokenizer, recipe, plan, card, evaluation and report.

        Args:
            repo_id: The repository, made if absent.
            folder: The checkpoint; by default the one this pruner wrote last. Its card is made anew, under the
                repository's name.
            private: Whether a new repository is private.
            token: Access token; by default the pruner's own, or the one of ``hf auth login``.
            revision: The branch.
            commit_message: Of the commit.
            create_pr: Open a pull request instead of committing.

        Returns:
            The client's ``CommitInfo``.

        Raises:
            RequestError: If there is no checkpoint, the repository holds something else, or the Hub refuses.
            RunError: If the Hub cannot be reached or fails; nothing was published then, and the same call continues.
        """
        folder = folder if folder is not None else self.output_dir
        if folder is None:
            raise RequestError(
                "there is no checkpoint to publish; write one first (save_pretrained), or pass folder=."
            )
        write_card(folder, repo_id)
        return push_folder(
            folder,
            repo_id,
            private=private,
            token=self._hub.get("token") if token is None else token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    # -- helpers

    def _recipe(self) -> MoEPrunerConfig:
        if self.config is None:
            raise RequestError("this pruner has no recipe; pass config=MoEPrunerConfig(method=..., num_experts=...).")
        return self.config

    def _with_commit(self, stats: CalibrationStats) -> CalibrationStats:
        """Statistics of a model in memory, with the commit of the repository this pruner is bound to."""
        commit = getattr(self.model_config, "_commit_hash", None)
        if commit is None or stats.model["name_or_path"] != self.name_or_path:
            return stats
        return replace(stats, model={**stats.model, "revision": commit})
