# SPDX-License-Identifier: Apache-2.0
"""Private and moving names of transformers and huggingface_hub that this package needs, each in one function.

``architectures/unequal.py`` alone names some itself: it travels inside checkpoints and can import nothing from here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ModelConfig = Any
"""A ``PreTrainedConfig``: its keys differ from model to model, so none can be typed."""

LOADING_HOOK = "_finalize_model_loading"
"""The last step of ``from_pretrained``, a static method of ``PreTrainedModel``, before gaps are filled with random
weights (transformers 5.14 to 5.24)."""

PER_LAYER_WARNER = "transformers.integrations.heterogeneity.configuration_utils"
"""The logger that warns when the model-wide value of a key is read that layers have their own of."""


# ------------------------------------------------------------------------------------------- configs


def text_config(config: ModelConfig) -> Any:
    """The config of a model's text part: its own, or the one inside the config of a model that sees or hears as well.

    Args:
        config: A transformers config.
    """
    return config.get_text_config()


def name_of_config(config: ModelConfig) -> str | None:
    """The folder or Hub id a config was read from, or None (``PreTrainedConfig._name_or_path`` is private)."""
    return config._name_or_path or None


def commit_of_config(config: ModelConfig) -> str | None:
    """The commit on the Hub of the model a config is of, or None.

    Why: ``PreTrainedConfig._commit_hash`` is private. transformers fills it in up to 5.22 and not since 5.23; all of
    5.14 to 5.24 leave it out of ``config.json``.
    """
    return getattr(config, "_commit_hash", None)


def set_commit_of_config(config: ModelConfig, commit: str | None) -> None:
    """Remember the commit that a config is of, as transformers does up to 5.22; see :func:`commit_of_config`."""
    config._commit_hash = commit


def causal_lm_class(model_type: str) -> str | None:
    """Name of transformers' own causal language model of a type; the table of them is not exported."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)


def is_quantised(model: Any) -> bool:
    """Whether a model in memory has quantised weights.

    ``hf_quantizer`` is set by ``from_pretrained`` alone, which takes it back from a model that it dequantises; what
    the config of the text part says it leaves as it was, so that is not asked.
    """
    return bool(getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None))


def quantization_of(config: ModelConfig) -> Mapping[str, Any]:
    """What a config says about quantised weights, of the model or of its text part; empty where it says nothing.

    Why: ``quantization_config`` is a key of ``config.json`` that config classes have no field for: a dict as it was
    read, an object once ``from_pretrained`` has used it.
    """
    for part in (config, text_config(config)):
        settings = getattr(part, "quantization_config", None)
        if settings:
            return settings if isinstance(settings, Mapping) else settings.to_dict()
    return {}


def unquantised(config: ModelConfig) -> Any:
    """A copy of a config that says nothing about quantised weights."""
    config = copy.deepcopy(config)
    for part in (config, text_config(config)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


# ------------------------------------------------------------------------------------------- the Hub


def cached_file(name_or_path: str | os.PathLike, file_name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a model's folder, or of the Hub, which is downloaded where the cache lacks it; None if it is absent.

    Why: ``transformers.utils.cached_file`` raises for a file that is absent, unless a private keyword says otherwise
    (``_raise_exceptions_for_missing_entries``; in transformers 5.14 to 5.24).

    Args:
        name_or_path: The folder or Hub id.
        file_name: The file.
        hub: ``revision``, ``token``, ``cache_dir``.

    Raises:
        OSError: If the repository cannot be read.
    """
    from transformers import utils

    found = utils.cached_file(str(name_or_path), file_name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def cached_commit(repo_id: str, file: Path) -> str | None:
    """The commit of a file in the Hub's cache, ``models--org--name/snapshots/<commit>/...``; None if it is elsewhere.

    Why: what the client downloads comes back as a path alone; its functions for the names in that path
    (``huggingface_hub.file_download``: ``repo_folder_name``, ``REGEX_COMMIT_HASH``; in 1.0 to 2.4) are not exported.

    Args:
        repo_id: The repository the file is from.
        file: The file, links not followed.
    """
    from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name

    repository = repo_folder_name(repo_id=repo_id, repo_type="model")
    for snapshot, snapshots in zip(file.parents, file.parents[1:], strict=False):
        if snapshots.name == "snapshots" and snapshots.parent.name == repository:
            return snapshot.name if REGEX_COMMIT_HASH.fullmatch(snapshot.name) else None
    return None


def http_error() -> type[Exception]:
    """What the Hub's client raises where a connection fails.

    Why: it is that of the HTTP library below the client (``httpx`` in huggingface_hub 1.0, ``httpx2`` in 2.4), which
    ``huggingface_hub.errors`` imports and does not name among its own.
    """
    from huggingface_hub import errors

    return errors.HTTPError


# ------------------------------------------------------------------------------------------- loading


class WeightNames:
    """transformers' own mapping from tensors in files to parameters of a model, and what makes the ones of the others.

    Why: ``transformers.conversion_mapping`` and ``transformers.core_model_loading`` (5.14 to 5.24) are not exported;
    ``from_pretrained`` alone uses them, for a whole model.

    Args:
        model: The model, on any device.
        mapping: Renamings and conversions, in place of those of its own.
    """

    def __init__(self, model: Any, mapping: Sequence[Any] | None = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model) if mapping is None else mapping
        self._model = model
        self._parameters = model.state_dict()
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._of_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def sorted(self, names: Iterable[str]) -> list[str]:
        """Names in the order in which ``from_pretrained`` reads them."""
        from transformers.core_model_loading import dot_natural_key

        return sorted(names, key=dot_natural_key)

    def parameter_of(self, name: str) -> tuple[str, str | None, Any]:
        """The parameter that a tensor in a file is for, the pattern that matched it, and its converter.

        The parameter may be one that the model has not; pattern and converter are None where it is only renamed.
        """
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._parameters)
        if target not in self._parameters and name in self._parameters:
            target, pattern = name, None
        return target, pattern, None if pattern is None else self._of_pattern[pattern]

    def in_files(self, parameter: str) -> list[str]:
        """The names under which files may hold a parameter, the one that transformers saves it under first."""
        names = [parameter]
        for entry in self._renamings:
            for source, target in zip(entry.source_patterns, entry.target_patterns, strict=False):
                if target in parameter and not set(source) & set("^$()\\*+?[]|"):
                    names.insert(0, parameter.replace(target, source))
        return list(dict.fromkeys(names))

    @staticmethod
    def stacks_experts(converter: Any) -> bool:
        """Whether a converter makes each expert's part of that expert's tensors alone."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        first, *others = converter.operations
        return (
            isinstance(first, MergeModulelist)
            and first.dim == 0
            and all(isinstance(operation, Concatenate) and operation.dim != 0 for operation in others)
        )

    def has(self, parameter: str) -> bool:
        """Whether the model has a parameter or buffer of this name."""
        return parameter in self._parameters

    def parameter_shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter of the model."""
        return tuple(self._parameters[parameter].shape)

    def source_shapes(self, converter: Any, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """What each expert has in files of a parameter of all: names below the expert, and shapes where they follow.

        Args:
            converter: What makes the parameter.
            shape: Its shape, expert first.
        """
        one = list(shape[1:])
        if self.stacks_experts(converter):
            for operation in converter.operations[1:]:
                one[operation.dim - 1] //= len(converter.source_patterns)
        else:
            one = []
        ends = (pattern.rpartition("*.")[2].removesuffix("$") for pattern in converter.source_patterns)
        return {end.removesuffix(".weight"): tuple(one) for end in ends}

    @staticmethod
    def made_with(target: str, converter: Any) -> list[str]:
        """The parameters that a converter makes together with its first one."""
        targets = [] if converter is None else converter.target_patterns
        return [target, *(target.replace(targets[0], other) for other in targets[1:])]

    def converted(
        self, parameter: str, converter: Any, tensors: Mapping[str, list[Tensor]], first: str | None = None
    ) -> Tensor:
        """A parameter made by a converter of tensors, by pattern.

        Args:
            parameter: Its name.
            converter: The converter.
            tensors: What it is made of.
            first: The first of the parameters that the converter makes; by default this one.
        """
        converter, first = copy.deepcopy(converter), first or parameter  # it collects what it is given
        for pattern, values in tensors.items():
            for value in values:
                converter.add_tensor(first, first, pattern, value)
        made = converter.convert(first, model=self._model, config=self._model.config)[parameter]
        return made[0] if isinstance(made, list) else made


def initialise(model: Any, module: nn.Module) -> None:
    """Fill in what no checkpoint holds in a module, as transformers does (``PreTrainedModel._init_weights``)."""
    model._init_weights(module)


def keep_from_initialising(value: Tensor) -> None:
    """Mark a tensor as loaded: :func:`initialise` leaves it as it is (it looks for ``_is_hf_initialized``)."""
    value._is_hf_initialized = True  # type: ignore[attr-defined]


class _Made:
    """A tensor that is made when ``from_pretrained`` asks for it; see :func:`load_made`."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make

    def __getitem__(self, whole: Any) -> Tensor:
        return self._make()


def load_made(config: ModelConfig, tensors: Mapping[str, Callable[[], Tensor]], name: str, settings: Any) -> Any:
    """A model of tensors that are made one by one, as ``from_pretrained`` loads an unquantised one of its files.

    Why: ``from_pretrained(None, state_dict=...)`` takes all tensors at once, in memory. It asks for each with
    ``value[...]`` only when a layer needs it (``core_model_loading._materialize_copy``, 5.14 to 5.24), which is how it
    reads slices of files, so anything that answers to that will do.

    Args:
        config: The model's config; what it says about quantised weights is left out.
        tensors: By name in files.
        name: The folder or Hub id, for its generation config, and to be remembered.
        settings: Of ``from_pretrained``: ``dtype``, ``device_map``, and how the model is reached.
    """
    from transformers import GenerationConfig

    settings, config = dict(settings), unquantised(config)
    loading = {key: settings.pop(key) for key in ("dtype", "device_map")}
    remote = settings.pop("trust_remote_code", False)
    try:
        loading["generation_config"] = GenerationConfig.from_pretrained(name, **settings)
    except OSError:  # it has none
        pass
    loader = type(build_on_meta(config, trust_remote_code=True)) if remote else loader_of(config)
    model = loader.from_pretrained(
        None, config=config, state_dict={key: _Made(make) for key, make in tensors.items()}, **loading
    )
    model.config.name_or_path = name
    return model


# ------------------------------------------------------------------------------------------- building


def model_class(config: ModelConfig) -> Any:
    """The class that a checkpoint's config says it is of, else the one that reads text, else one that sees as well.

    Why: ``AutoModelForCausalLM`` gives the text part alone of some models that see, and has no class for others. The
    tables of the auto classes are not exported.

    Raises:
        LookupError: If transformers has none.
    """
    import transformers

    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if named is not None and hasattr(named, "from_pretrained"):
            return named
    for _, classes in _classes_of(config):
        return classes[0]
    raise LookupError(config.model_type)


def _classes_of(config: ModelConfig) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The auto classes that know a config, the one that reads text first, with the classes they give."""
    import transformers

    for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        found = getattr(getattr(transformers, auto, None), "_model_mapping", {}).get(type(config), None)
        if found is not None:
            yield auto, found if isinstance(found, tuple) else (found,)


def auto_class(config: ModelConfig) -> str:
    """The name of the auto class that gives the class a checkpoint's config says it is of.

    Raises:
        LookupError: If transformers has none.
    """
    wanted = model_class(config)
    for auto, classes in _classes_of(config):
        if wanted in classes:
            return auto
    raise LookupError(config.model_type)


def loader_of(config: ModelConfig, trust_remote_code: bool = False) -> Any:
    """What has ``from_pretrained`` for a config: the class it is of, or an auto class where code comes with it.

    Raises:
        LookupError: If transformers has none.
    """
    from transformers import AutoModelForCausalLM

    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    return model_class(config)


def default_config(model_type: str) -> ModelConfig:
    """The config of a model type with the values it has of itself.

    Raises:
        ValueError: If transformers does not know it, or it has no such values.
    """
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type)


def build_on_meta(config: ModelConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """A model without weights, of the class that loads its checkpoints, in evaluation mode.

    Why: ``PreTrainedModel._from_config`` is private, and ``from_config`` is of auto classes alone.
    """
    import torch

    loader, config = loader_of(config, trust_remote_code), copy.deepcopy(config)
    with torch.device("meta"):
        if hasattr(loader, "_from_config"):
            return loader._from_config(config, dtype=dtype).eval()
        return loader.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()


def built_like(model: Any, config: ModelConfig, dtype: torch.dtype | None = None) -> Any:
    """A model of the same class with another config, without weights; in a precision, by default the config's."""
    import torch

    with torch.device("meta"):
        return type(model)._from_config(config, **({} if dtype is None else {"dtype": dtype}))
