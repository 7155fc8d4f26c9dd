# SPDX-License-Identifier: Apache-2.0
"""The front door: :class:`MoEPruner`. Thin; each verb calls a public function."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from .architectures import architecture_of, list_architectures
from .architectures.block import moe_blocks
from .calibration import CalibrationInput, CalibrationSet, sample_length
from .card import model_card
from .collect import check_model, collect, empty_stats
from .config import CONFIG_NAME, MoEPrunerConfig
from .errors import RequestError
from .files import read_json, written_folder
from .plan import PLAN_NAME, PruningPlan, budget_for, build_plan, plan_needs, with_parent
from .standalone import standalone_class, write_standalone
from .stats import CalibrationStats, check_domain_weights
from .surgery import apply_plan
from .unequal import without_standalone

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Files of a model's folder that go into a pruned checkpoint as they are."""


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
        stored = _stored_plan(name_or_path, hub)
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
            recipe = MoEPrunerConfig.from_pretrained(name_or_path, **_of_files(hub), **overrides)
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
        parent = _stored_plan(name_or_path, hub)
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
        self, model: PreTrainedModel | None = None, calibration: CalibrationInput | None = None
    ) -> CalibrationStats:
        """Run the model over calibration samples and gather what the recipe's method needs.

        Args:
            model: A causal language model with real parameters; by default the bound one is loaded for it.
            calibration: Texts, files, records, a dataset or token tensors.

        Returns:
            The statistics, also readable as ``stats``.
        """
        config = self._recipe()
        if calibration is None:
            raise RequestError("a calibration is needed; pass calibration=texts.")
        samples = self.samples(calibration, None if model is None else model.config)
        if model is None:
            if self.name_or_path is None:
                raise RequestError("this pruner is not bound to a model; pass the model to calibrate.")
            model = AutoModelForCausalLM.from_pretrained(self.name_or_path, **self._hub)
        self.stats = collect(
            model,
            samples,
            plan_needs(config),
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
            seed=config.seed,
        )
        self.pruning_plan = None  # one made or loaded before does not rest on these statistics
        return self.stats

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
        plan = build_plan(stats, self._recipe(), domain_weights)
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
            budget_for(config, {block.layer: block.num_experts for block in blocks}, blocks[0].routing.top_k)
            if isinstance(calibration, CalibrationStats):
                self.stats = calibration
            elif not plan_needs(config):
                self.stats = empty_stats(model, seed=config.seed)
            elif calibration is not None:
                samples = self.samples(calibration, model.config)
                if domain_weights is not None:
                    check_domain_weights(samples.samples, domain_weights)
                self.calibrate(model, samples)
            elif self.stats is None:
                raise RequestError(f"method {config.method!r} needs a calibration; pass calibration=texts.")
            plan = self.plan(domain_weights=domain_weights)
        self.model, self._applied_plan = apply_plan(plan, model), plan
        return self.model

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
        counts = {block.layer: block.num_experts for block in moe_blocks(model)}
        if counts != plan.num_experts:
            raise RequestError(
                "this model does not have the numbers of experts of the plan; pass the model that was pruned."
            )
        standalone = standalone and plan.uniform_num_experts is None  # elsewhere nothing is needed
        if standalone:
            standalone_class(model.config)
        with written_folder(save_directory, overwrite, sources=[self.name_or_path]) as partial:
            model.save_pretrained(partial)
            plan.save(partial / PLAN_NAME)
            recipe = plan.config if self.config is None else self.config.to_dict()
            (partial / CONFIG_NAME).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
            if self.name_or_path is not None:
                self._carry_files(partial)
                self._restore_config(partial, model)
            if self._tokenizer is not None and self._tokenizer_given:
                self._tokenizer.save_pretrained(partial)
            if standalone:
                write_standalone(partial, model.config)
            model_card(plan, Path(save_directory).resolve().name, standalone).save(partial / "README.md")
        return Path(save_directory)

    # -- helpers

    def _recipe(self) -> MoEPrunerConfig:
        if self.config is None:
            raise RequestError("this pruner has no recipe; pass config=MoEPrunerConfig(method=..., num_experts=...).")
        return self.config

    def _carry_files(self, folder: Path) -> None:
        """Copy the tokenizer's files, and the generation config where the model wrote none."""
        assert self.name_or_path is not None
        source = Path(self.name_or_path)
        files: list[str] = []
        if not source.is_dir():
            from huggingface_hub import list_repo_files

            try:
                files = list_repo_files(
                    self.name_or_path, revision=self._hub.get("revision"), token=self._hub.get("token")
                )
            except Exception as error:  # offline, or the Hub does not answer: what is in the cache was enough so far
                logger.info("the files of %s cannot be listed: %s", self.name_or_path, error)
                cached = _find(self.name_or_path, "config.json", self._hub)
                source = source if cached is None else cached.parent
        if source.is_dir():
            files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        for name in files:
            carried = (*TOKENIZER_FILES, "generation_config.json")
            if any(fnmatch(name, p) and name.count("/") == p.count("/") for p in carried):
                found = _find(self.name_or_path, name, self._hub)
                if found is not None and not (folder / name).exists():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(found, folder / name)

    def _restore_config(self, folder: Path, model: PreTrainedModel) -> None:
        """Write the source's own ``config.json``, with the pruning keys and what was changed in memory put in."""
        found = None if self.name_or_path is None else _find(self.name_or_path, "config.json", self._hub)
        if found is None:
            return
        spec = architecture_of(model.config)
        values = read_json(found)
        aliases = [alias for alias, key in type(model.config).attribute_map.items() if key == spec.count_key]
        for key in [key for key in (spec.count_key, *aliases) if key in values] or [spec.count_key]:
            values[key] = getattr(model.config, spec.count_key)
        dtype = str(model.dtype).removeprefix("torch.")
        key = "torch_dtype" if "torch_dtype" in values else "dtype"
        if values.get(key) != dtype:
            values[key] = dtype
        if self.model_config is None:
            self.model_config = load_model_config(str(self.name_or_path), **self._hub)
        before, now = self.model_config.to_dict(), model.config.to_dict()
        own = {spec.count_key, "dtype", "torch_dtype", "_name_or_path", "transformers_version", "architectures"}
        for name in now.keys() - own:
            if now[name] != before.get(name):
                values[name] = now[name]
        if "per_layer_config" not in now:
            values.pop("per_layer_config", None)
        if auto_map := without_standalone(values.pop("auto_map", {})):
            values["auto_map"] = auto_map
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def moe_layers(model_config: Any) -> tuple[dict[int, int], int]:
    """Experts in each MoE layer, and the experts used per token, from a config alone (a model without weights)."""
    with torch.device("meta"):
        blocks = moe_blocks(AutoModelForCausalLM.from_config(model_config))
    return {block.layer: block.num_experts for block in blocks}, blocks[0].routing.top_k


def load_model_config(name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """The config of a model whose architecture is known.

    Args:
        name_or_path: Its folder or Hub id.
        kwargs: Passed to ``AutoConfig.from_pretrained``.

    Raises:
        RequestError: If there is no model, or it is not a known Mixture-of-Experts model.
    """
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise RequestError(f"{name_or_path} is not a model's folder: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    except Exception as error:  # a config can be wrong in as many ways as there are model types
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"no model can be read from {str(name_or_path)!r}: {first} Known architectures: "
            f"{', '.join(list_architectures())}."
        ) from error
    architecture_of(config)
    return config


def _stored_plan(name_or_path: str | os.PathLike, hub: Mapping[str, Any]) -> PruningPlan | None:
    """The plan in a checkpoint that this package made, or None."""
    stored = _find(name_or_path, PLAN_NAME, hub)
    return None if stored is None else PruningPlan.load(stored)


def _find(name_or_path: str | os.PathLike, file_name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a model's folder or Hub repository, or None; a folder is looked at without the network."""
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file_name
        return path if path.is_file() else None
    found = cached_file(str(name_or_path), file_name, _raise_exceptions_for_missing_entries=False, **_of_files(hub))
    return None if found is None else Path(found)


def _of_files(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is said about the Hub, what concerns files and not code."""
    return {key: value for key, value in hub.items() if key != "trust_remote_code"}
