# SPDX-License-Identifier: Apache-2.0
"""What PEFT makes of an adapter in a model: built without weights, so that every tensor's place is PEFT's own word.

Which parameter a level of nested wrappers is for, what targets and patterns reach, how files of transformers 4 are
read: all of it is asked here, of the original and of the pruned model, and nothing is guessed from names.
"""

from __future__ import annotations

import copy
import importlib.metadata
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...compat import ModelConfig
from ...compat.adapters import built_for_task, is_turned
from ...errors import RequestError
from ...storage.tensor_files import TensorEntry, dtype_of
from ...storage.values import Json

PREFIX = "base_model.model."
"""What stands before a model's own names in the files of an adapter."""
_NAME = "default"
_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The classes that adapters of a task are trained in; of all others it is the one that loads the checkpoint."""
_HEADS = re.compile(r"(?:^|\.)(?:score|classifier)\.weight$")
_NOT_TO_LOAD = {"init_lora_weights": True, "loftq_config": {}, "megatron_config": None}
"""How an adapter began, and a library that need not be there; neither changes which tensors it has."""


@dataclass(frozen=True)
class Loaded:
    """How an adapter's tensors fit into a model.

    Attributes:
        missing: Tensors that its settings ask for and it lacks.
        misread: Those that it has, and PEFT looks for under another name, by transformers' renaming of checkpoints.
        unexpected: Those that PEFT leaves aside.
    """

    missing: tuple[str, ...]
    misread: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass(frozen=True)
class Wrapped:
    """A module or parameter with an adapter.

    Attributes:
        module: The module, by its path in the model.
        parameter: The parameter of it.
        rank: Of the adapter.
        alpha: What its product is multiplied by, times the rank.
        by_parameter: Whether it was named as a parameter, and not as a module.
        stacked: Whether the parameter has three dimensions, and each of the first an adapter of its own.
        transposed: Whether PEFT takes the parameter to hold inputs before outputs.
    """

    module: str
    parameter: str
    rank: int
    alpha: float
    by_parameter: bool = False
    stacked: bool = False
    transposed: bool = False


def peft_version() -> str:
    """The version of PEFT.

    Raises:
        RequestError: If it is not installed.
    """
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError as error:
        raise RequestError(
            'cutting an adapter needs peft, which is not installed; pip install "optimum-moe-prune[peft]".'
        ) from error


def skeletons(config: ModelConfig, settings: Json, tensors: Mapping[str, TensorEntry], code: bool) -> Iterator[Any]:
    """Models, without weights, that an adapter may have been trained in; the likeliest first.

    Args:
        config: The model's.
        settings: ``adapter_config.json``, which may name the class or the task.
        tensors: The adapter's, of which a classifier's give the number of classes.
        code: Whether code that comes with the model may run.
    """
    config = copy.deepcopy(config)
    classes = next((entry.shape[0] for name, entry in tensors.items() if _HEADS.search(name)), None)
    if classes is not None:
        config.num_labels = classes
    named = str((settings.get("auto_mapping") or {}).get("base_model_class") or "")
    return built_for_task(config, named, _TASKS.get(str(settings.get("task_type"))), code)


class Injected:
    """An adapter in a model, both without weights.

    Args:
        model: The model, on the meta device; it is changed.
        settings: ``adapter_config.json``.
        what: The model in words, for messages.

    Raises:
        RequestError: If PEFT cannot put it there.
    """

    def __init__(self, model: Any, settings: Json, what: str) -> None:
        from peft import LoraConfig, get_peft_model

        self._what = what
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig.from_peft_type(
                    **copy.deepcopy({**settings, **_NOT_TO_LOAD})
                )  # it changes what it gets
                self._model = get_peft_model(model, config, adapter_name=_NAME, low_cpu_mem_usage=True)
        except Exception as error:  # of a config there are as many faults as settings
            raise RequestError(
                f"PEFT {peft_version()} cannot put this adapter into {what}: {_first(error)}"
            ) from error
        self.layers = {wrapped.module + "." * bool(inside) + inside: wrapped for wrapped, inside in self._wrapped()}

    def _wrapped(self) -> Iterator[tuple[Wrapped, str]]:
        """Every module with an adapter, and the words by which wrappers stand inside one another."""
        from peft.tuners.lora import LoraLayer, ParamWrapper

        for name, module in self._model.named_modules():
            if not isinstance(module, LoraLayer) or _NAME not in module.r:
                continue
            path, *inside = name.removeprefix(PREFIX).split(".base_layer")
            named = isinstance(module, ParamWrapper)
            parameter = module.parameter_name if named else "weight"
            stacked = named and module.get_param().ndim == 3
            transposed = stacked and is_turned(module)
            rank, alpha = module.r[_NAME], module.lora_alpha[_NAME]
            found = Wrapped(path, parameter, rank, alpha, named, stacked, transposed)
            yield found, ".".join(["base_layer"] * len(inside))

    def load(self, tensors: Mapping[str, TensorEntry]) -> Loaded:
        """What PEFT makes of tensors of these names and shapes.

        Raises:
            RequestError: If one has another shape than the model asks for, or they cannot be read.
        """
        from peft import set_peft_model_state_dict

        state = {
            name: torch.empty(entry.shape, dtype=dtype_of(entry), device="meta") for name, entry in tensors.items()
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = set_peft_model_state_dict(self._model, state, adapter_name=_NAME, low_cpu_mem_usage=True)
        except KeyError as error:  # a module of modules_to_save
            lacks = str(error.args[0]) not in tensors
            said = "lacks" if lacks else f"has, and PEFT {peft_version()} does not find again,"
            raise RequestError(f"the adapter {said} {error}, which its adapter_config.json asks for.") from error
        except Exception as error:
            raise RequestError(self._of_another(error)) from error
        missing = [_plain(name) for name in result.missing_keys if ".lora_" in name and f".{_NAME}" in name]
        return Loaded(
            tuple(name for name in missing if PREFIX + name not in tensors),
            tuple(name for name in missing if PREFIX + name in tensors),
            tuple(_plain(name) for name in result.unexpected_keys),
        )

    def _of_another(self, error: Exception) -> str:
        found = re.search(
            r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, the shape in "
            r"current model is torch\.Size\((.*?)\)",
            str(error),
        )
        if found is None:
            return f"the adapter's tensors cannot be read as ones for {self._what}: {_first(error)}"
        return (
            f"{_plain(found[1])} of the adapter has shape {found[2]}, and one for {self._what} has {found[3]}: it is "
            "of another model, or of another rank than its adapter_config.json says."
        )


def _plain(name: str) -> str:
    """A name in PEFT's model as files have it."""
    return name.removeprefix(PREFIX).replace(f".modules_to_save.{_NAME}", "").replace(f".{_NAME}", "")


def _first(error: Exception) -> str:
    lines: Iterable[str] = str(error).strip().splitlines() or [type(error).__name__]
    return next(iter(lines)).rstrip(".:") + "."
