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

from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from .architectures import architecture_of
from .architectures.block import moe_blocks
from .budget import Budget, uniform_budget
from .calibration import CalibrationInput, CalibrationSet, sample_length
from .collect import collect, empty_stats
from .config import CONFIG_NAME, MoEPrunerConfig
from .errors import RequestError
from .files import read_json, written_folder
from .plan import PLAN_NAME, PruningPlan, build_plan, plan_needs, with_parent
from .stats import CalibrationStats
from .surgery import apply_plan

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
        self._plan_was_loaded = plan is not None
        self._tokenizer = tokenizer
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
            overrides: Settings of ``MoEPrunerConfig``, in place of those of ``config`` or of its defaults.

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
        stored = _find(name_or_path, PLAN_NAME, hub)
        plan = None if stored is None else PruningPlan.load(stored)
        if config is None and not overrides and plan is not None:
            recipe = _find(name_or_path, CONFIG_NAME, hub)
            return cls(
                None if recipe is None else MoEPrunerConfig.from_pretrained(recipe),
                plan=plan,
                name_or_path=name_or_path,
                model_config=model_config,
                hub=hub,
            )
        if overrides:
            config = MoEPrunerConfig.from_dict(config.to_dict() if config is not None else {}, **overrides)
        if plan is not None:
            logger.warning("%s was pruned before; with a new recipe it is taken as the model to prune.", name_or_path)
        pruner = cls(config, name_or_path=name_or_path, model_config=model_config, parent=plan, hub=hub)
        if config is not None:  # refuse a budget that the config alone shows to be impossible
            spec = architecture_of(model_config)
            pruner._budget({0: getattr(model_config, spec.count_key)}, spec.routing(model_config).top_k)
        return pruner

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
        config = MoEPrunerConfig.from_dict(plan.config) if plan.config else None
        model_config = load_model_config(name_or_path, **hub)
        return cls(config, plan=plan, name_or_path=name_or_path, model_config=model_config, hub=hub)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, loaded when first asked for; None where there is none."""
        if self._tokenizer is None and self.name_or_path is not None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, **self._hub)
            except (OSError, ValueError) as error:
                logger.info("no tokenizer in %s: %s", self.name_or_path, error)
        return self._tokenizer

    # -- the verbs

    def calibrate(self, model: PreTrainedModel, calibration: CalibrationInput) -> CalibrationStats:
        """Run the model over calibration samples and gather what the recipe's method needs.

        Args:
            model: A causal language model with real parameters.
            calibration: Texts, files, records, a dataset or token tensors.

        Returns:
            The statistics, also readable as ``stats``.
        """
        config = self._recipe()
        samples = CalibrationSet.build(
            calibration,
            None if isinstance(calibration, CalibrationSet) else self.tokenizer,
            num_samples=config.num_samples,
            max_length=sample_length(config.max_length, model.config),
            sample_selection=config.sample_selection,
            pack=config.pack,
            seed=config.seed,
        )
        self.stats = collect(
            model,
            samples,
            plan_needs(config),
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
            seed=config.seed,
        )
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
        self._plan_was_loaded = False
        return self.pruning_plan

    def prune(
        self,
        model: PreTrainedModel,
        calibration: CalibrationInput | CalibrationStats | None = None,
        domain_weights: Mapping[str, float] | None = None,
    ) -> PreTrainedModel:
        """Prune a model in memory: calibrate, plan, and remove experts; or apply the stored plan.

        Args:
            model: A causal language model with real parameters on any device.
            calibration: Texts, files, records, a dataset, token tensors, or statistics of this model. Not needed by
                methods that need none, nor with a stored plan.
            domain_weights: A share for each domain of the calibration; by default every token counts once.

        Returns:
            The same model, now smaller.

        Raises:
            RequestError: If anything about the request is wrong; the model is then unchanged.
            RunError: If the model holds NaN or infinite values; the model is then unchanged.
        """
        if calibration is None and self._plan_was_loaded:
            assert self.pruning_plan is not None
            self.model = apply_plan(self.pruning_plan, model)
            return self.model
        config = self._recipe()
        blocks = moe_blocks(model)
        counts = {block.layer: block.num_experts for block in blocks}
        budget = self._budget(counts, blocks[0].routing.top_k, protect=config.protect, skip_layers=config.skip_layers)
        if len(budget.num_experts) < len(counts):
            raise RequestError(
                "skip_layers leaves layers with different numbers of experts, and such a checkpoint cannot be "
                "reloaded yet; "
                "prune without skip_layers (planning with them works)."
            )
        if calibration is None and plan_needs(config) and self.stats is None:
            raise RequestError(f"method {config.method!r} needs a calibration; pass calibration=texts.")
        if isinstance(calibration, CalibrationStats):
            self.stats = calibration
        elif not plan_needs(config):
            self.stats = empty_stats(model, seed=config.seed)
        elif calibration is not None:
            self.calibrate(model, calibration)
        self.model = apply_plan(self.plan(domain_weights=domain_weights), model)
        return self.model

    def save_pretrained(
        self, save_directory: str | os.PathLike, model: PreTrainedModel | None = None, overwrite: bool = False
    ) -> Path:
        """Write the pruned checkpoint with recipe, plan, tokenizer and generation config.

        The config is the source's own with the pruning keys changed. Everything is written beside the target and
        renamed.

        Args:
            save_directory: The target, absent or empty.
            model: The pruned model; by default the one this pruner pruned.
            overwrite: Replace a target that is not empty.

        Raises:
            RequestError: If there is no pruned model, it does not match the plan, or the target is in the way.
        """
        model = model if model is not None else self.model
        plan = self.pruning_plan
        if model is None or plan is None:
            raise RequestError("there is no pruned model to save; call prune first, or pass the model it returned.")
        counts = {block.layer: block.num_experts for block in moe_blocks(model)}
        if counts != plan.num_experts:
            raise RequestError(
                "this model does not have the numbers of experts of the plan; pass the model that was pruned."
            )
        with written_folder(save_directory, overwrite) as partial:
            model.save_pretrained(partial)
            plan.save(partial / PLAN_NAME)
            if self.config is not None:
                self.config.save_pretrained(partial)
            if self.name_or_path is not None:
                self._carry_files(partial)
                self._restore_config(partial, model)
            elif self._tokenizer is not None:
                self._tokenizer.save_pretrained(partial)
        return Path(save_directory)

    # -- helpers

    def _recipe(self) -> MoEPrunerConfig:
        if self.config is None:
            raise RequestError("this pruner has no recipe; pass config=MoEPrunerConfig(method=..., num_experts=...).")
        return self.config

    def _budget(self, counts: dict[int, int], top_k: int, **layers: Any) -> Budget:
        """The budget of the recipe for layers of so many experts; refuses what cannot be kept to."""
        config = self._recipe()
        return uniform_budget(counts, top_k, num_experts=config.num_experts, sparsity=config.sparsity, **layers)

    def _carry_files(self, folder: Path) -> None:
        """Copy the tokenizer's files, and the generation config where the model wrote none."""
        assert self.name_or_path is not None
        source = Path(self.name_or_path)
        if source.is_dir():
            files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        else:
            from huggingface_hub import list_repo_files

            files = list_repo_files(
                self.name_or_path, revision=self._hub.get("revision"), token=self._hub.get("token")
            )
        for name in files:
            if any(fnmatch(name, pattern) for pattern in (*TOKENIZER_FILES, "generation_config.json")):
                found = _find(self.name_or_path, name, self._hub)
                if found is not None and not (folder / name).exists():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(found, folder / name)

    def _restore_config(self, folder: Path, model: PreTrainedModel) -> None:
        """Write the source's own ``config.json`` with the pruning keys (and a changed dtype) put in."""
        found = None if self.name_or_path is None else _find(self.name_or_path, "config.json", self._hub)
        if found is None:
            return
        spec = architecture_of(model.config)
        values = read_json(found)
        aliases = [alias for alias, key in type(model.config).attribute_map.items() if key == spec.count_key]
        count = getattr(model.config, spec.count_key)
        present = [key for key in (spec.count_key, *aliases) if key in values]
        for key in present or [spec.count_key]:
            values[key] = count
        dtype = str(model.dtype).removeprefix("torch.")
        key = "torch_dtype" if "torch_dtype" in values else "dtype"
        if values.get(key) != dtype:
            values[key] = dtype
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise RequestError(f"no model can be read from {str(name_or_path)!r}: {first}") from error
    architecture_of(config)
    return config


def _find(name_or_path: str | os.PathLike, file_name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a model's folder or Hub repository, or None; a folder is looked at without the network."""
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file_name
        return path if path.is_file() else None
    found = cached_file(str(name_or_path), file_name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)
