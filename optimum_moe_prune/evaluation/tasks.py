# SPDX-License-Identifier: Apache-2.0
"""Benchmark tasks: EleutherAI's lm-evaluation-harness on a loaded model, unequal layers included ([eval] extra).

The harness scores; this module names the tasks, checks what can be checked before a model is loaded, and leaves the
process as it was.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib
import io
import logging
import math
import numbers
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import RequestError, RunError, nearest_first
from ..models.checks import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PRESETS: dict[str, tuple[str, ...]] = {
    "papers": (
        "arc_challenge",
        "arc_easy",
        "boolq",
        "hellaswag",
        "mmlu",
        "openbookqa",
        "winogrande",
        "gsm8k",
        "minerva_math",
        "humaneval",
        "mbpp",
    )
}
"""Lists of tasks by name. ``papers`` is the table that Mosaic Pruning and MoE Pathfinder have in common: ARC, BoolQ,
HellaSwag, MMLU, OBQA, WinoGrande, GSM8K, MATH (as ``minerva_math``, four examples), HumanEval and MBPP."""

_INSTALL = 'lm-evaluation-harness is not installed ({error}): pip install "optimum-moe-prune[eval]"'
_BOOTSTRAP = 1000  # draws for the standard error of metrics without a formula for it; 2% exact, seconds not minutes


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include: Sequence[str | Path] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    allow_code: bool = False,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Score a model on benchmark tasks with lm-evaluation-harness.

    Prompts, filters and metrics are the harness's own, and so are the figures: with the default seed they are those of
    ``lm-eval run`` on the same model.

    Every task's data is there before the model runs. Afterwards the model's mode, the tokenizer, the random states of
    Python, NumPy and torch, the environment variables and the logging level of the harness are as they were.

    Args:
        model: A causal language model, on its device.
        tokenizer: Its tokenizer; the harness works on a copy.
        tasks: Names of the harness's tasks, groups or tags, names of :data:`PRESETS`, or paths of task files that end
            in ``.yaml``.
        include: Folders with further task files.
        limit: Documents of each task at most, for a trial; all by default.
        num_fewshot: Examples in a prompt, in place of the task's own number. A task that says 0 keeps 0.
        batch_size: Prompts in a forward pass.
        allow_code: Whether tasks may run the programs that the model writes (HumanEval, MBPP) on this machine.
        seed: Added to the harness's own seeds, which choose the examples in the prompts and what is sampled.

    Returns:
        Figures by task. ``acc``, ``acc_norm``, ``exact_match`` and the like are shares from 0 to 1, and
        ``NAME_stderr`` is the standard error of ``NAME``, where the harness knows one. A metric on answers that a
        filter extracted has the filter's name in brackets, ``exact_match[flexible-extract]``. A group is one entry,
        aggregated as it defines (``mmlu``); a tag, or a group that defines no aggregate, has an entry for each of its
        tasks. Figures that are not finite are left out, and a warning names them.

    Raises:
        RequestError: If the harness is not installed, a task is unknown, is damaged or needs a missing package, two of
            the tasks overlap, or one runs programs and ``allow_code`` is not set.
        RunError: If a task's data cannot be read, or the model's output is NaN.
    """
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise RequestError(f"{name} is {value}; it must be at least {least}.")
    if tokenizer is None:
        raise RequestError("tasks are texts: a tokenizer is needed, and this model's folder has none.")
    manager, names = _resolved(tasks, include, allow_code)
    with _contained(allow_code):
        found, groups, of_name = _load(manager, names)
        _check_loaded(found, allow_code)
        _seed(seed)
        _set_examples(found, num_fewshot, seed)
        with evaluating(model), torch.no_grad(), _watched(model):
            wrapped = _harness("lm_eval.models.huggingface").HFLM(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size
            )
            results = _harness("lm_eval.evaluator").evaluate(
                wrapped,
                {"tasks": found, "groups": groups, "group_map": {name: g.child_names for name, g in groups.items()}},
                limit=limit,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP,
                confirm_run_unsafe_code=allow_code,
            )["results"]
    told: dict[str, dict[str, float]] = {}
    for name in names:
        entries = [name] if name in groups and groups[name].has_aggregation else of_name[name]
        told |= {entry: _figures(entry, results[entry]) for entry in entries}
    return told


def check_tasks(tasks: Sequence[str], include: Sequence[str | Path] = (), allow_code: bool = False) -> list[str]:
    """Check names of tasks before a model is loaded.

    Args:
        tasks: As in :func:`run_tasks`.
        include: As in :func:`run_tasks`.
        allow_code: As in :func:`run_tasks`.

    Returns:
        The harness's names: presets and files resolved, each once.

    Raises:
        RequestError: As in :func:`run_tasks`, as far as the definitions of the tasks can tell.
    """
    return _resolved(tasks, include, allow_code)[1]


# ------------------------------------------------------------------------------------------- names


def _resolved(tasks: Sequence[str], include: Sequence[str | Path], allow_code: bool) -> tuple[Any, list[str]]:
    """The harness's ``TaskManager`` with the local folders, and the names of the tasks in it."""
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if not tasks:
        raise RequestError("no task is named.")
    specs = list(dict.fromkeys(spec for task in tasks for spec in PRESETS.get(task, (task,))))
    files = {spec: Path(spec).expanduser().resolve() for spec in specs if spec.endswith(".yaml")}
    for spec, path in files.items():
        if not path.is_file():
            raise RequestError(f"{spec} does not exist.")
    folders = [Path(folder).expanduser().resolve() for folder in include]
    for folder in folders:
        if not folder.is_dir():
            raise RequestError(f"{folder} is not a folder; name one with task files.")
    folders += [path.parent for path in files.values()]
    with _contained():
        try:
            manager = _harness("lm_eval.tasks").TaskManager(
                include_path=list(dict.fromkeys(folders)), include_defaults=False
            )
        except TypeError as error:  # names that cannot be sorted
            raise RequestError(f"a task file beside the named ones is damaged: {_one_line(error)}.") from error
        index = manager.task_index
        names = list(dict.fromkeys(_name_in(index, spec, files[spec]) if spec in files else spec for spec in specs))
        local = {name: index[name].yaml_path for name in names if name in index}
        own = {}
        if any(_missing(index, name) for name in names):  # only then: reading all the harness's files takes seconds
            own = _own_index()
            for name, entry in own.items():
                index.setdefault(name, entry)
    for name in local.keys() & own.keys():
        logger.warning("task %r is the one in %s, not the harness's own.", name, local[name])
    _check_known([name for name in names if name not in index], index)
    for name in names:
        if missing := _missing(index, name):
            raise RequestError(
                f"the group {name!r} of tasks "
                + ("holds none." if missing == name else f"names {missing!r}, and there is no such task.")
            )
    unsafe = [name for name in names if any(config.get("unsafe_code") for config in _configs(index, name))]
    if unsafe and not allow_code:
        raise _refused(unsafe)
    return manager, names


def _harness(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(_INSTALL.format(error=_one_line(error))) from error


@functools.cache
def _own_index() -> dict[str, Any]:
    """The tasks that come with the harness."""
    return _harness("lm_eval.tasks").TaskManager().task_index


def _name_in(index: dict[str, Any], spec: str, path: Path) -> str:
    """The name of the task or group that a file defines."""
    for name, entry in index.items():
        if entry.yaml_path is not None and Path(entry.yaml_path).resolve() == path:
            return name
    raise RequestError(
        f"{spec} defines no task: it must be YAML with a 'task' or 'group', named as no other file in its folder."
    )


def _missing(index: dict[str, Any], name: str) -> str | None:
    """What an index lacks of a task or group: its name, or that of a member."""
    try:
        return None if list(_configs(index, name)) else name
    except KeyError as error:
        return str(error.args[0])
    except (AttributeError, TypeError) as error:
        raise RequestError(f"the definition of task {name!r} is damaged: {_one_line(error)}.") from error


def _configs(index: dict[str, Any], member: Any, above: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The configs of the tasks behind a name, or behind a member of a group: a name, or a definition in place.

    Raises:
        KeyError: Naming the first that the index has not.
        RequestError: If a group holds itself.
    """
    if isinstance(member, dict):
        name = member.get("group", member.get("task"))
        if name not in index:
            inside = member.get("task") if "group" in member else None
            if inside is None:
                yield member
            for part in inside or ():
                yield from _configs(index, part, above)
            return
        member = name
    if member in above:
        raise RequestError(f"the group {member!r} of tasks holds itself.")
    entry = index[member]
    if entry.kind.name not in ("GROUP", "TAG"):
        yield entry.cfg or {"task": member}
        return
    inside = entry.tags if entry.kind.name == "TAG" else entry.cfg.get("task") or ()
    for part in [inside] if isinstance(inside, str) else inside:
        yield from _configs(index, part, (*above, member))


def _check_known(unknown: list[str], index: dict[str, Any]) -> None:
    if not unknown:
        return
    told = []
    for name in unknown:
        near = nearest_first(name, difflib.get_close_matches(name, [*map(str, index), *PRESETS], n=5))
        told.append(f"{name!r}" + (f" (nearest: {near})" if near else ""))
    raise RequestError(
        f"lm-evaluation-harness has no task {', '.join(told)}. `lm-eval ls tasks` lists all; the path of a task file "
        "ends in .yaml."
    )


def _refused(names: list[str]) -> RequestError:
    return RequestError(
        f"{', '.join(names)}: these tasks run programs that the model writes, on this machine and with your rights. "
        "Leave them out, or allow it where nothing can be lost (allow_code, --allow-code)."
    )


# ------------------------------------------------------------------------------------------- tasks


def _load(manager: Any, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[str]]]:
    """The tasks with their data, the groups, and the tasks of each name."""
    found: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    of_name: dict[str, list[str]] = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except ImportError as error:
            raise RequestError(f"task {name!r} needs a package that is missing: {_one_line(error)}.") from error
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise RequestError(f"task {name!r} cannot be used: {_one_line(error)}.") from error
        except Exception as error:  # of the Hub's, the data sets' or the network's library
            raise RunError(f"the data of task {name!r} cannot be read: {_one_line(error)}.") from error
        twice = found.keys() & loaded["tasks"].keys()
        if twice:
            other = next(earlier for earlier, tasks in of_name.items() if twice & set(tasks))
            raise RequestError(f"{min(twice)} is in both {other!r} and {name!r}; name one of them.")
        found |= loaded["tasks"]
        groups |= loaded.get("groups", {})
        of_name[name] = list(loaded["tasks"])
    return found, groups, of_name


def _check_loaded(tasks: dict[str, Any], allow_code: bool) -> None:
    """Refuse what only the loaded task tells."""
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not allow_code:
        raise _refused(unsafe)
    seen = [name for name, task in tasks.items() if getattr(task, "MULTIMODAL", False)]
    if seen:
        raise RequestError(f"{', '.join(seen)}: these tasks show images or sounds, and the model reads texts.")


def _set_examples(tasks: dict[str, Any], num_fewshot: int | None, seed: int) -> None:
    """Examples in the prompts, by the harness's own rule (its ``simple_evaluate``)."""
    own_seed = _harness("lm_eval.defaults").DEFAULT_OTHER_SEED
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=own_seed + seed)


def _figures(task: str, metrics: dict[str, Any]) -> dict[str, float]:
    """What the harness says of a task, as plain numbers by clean names."""
    figures = {}
    for key, value in metrics.items():
        metric, comma, applied = key.partition(",")
        if not comma or not isinstance(value, numbers.Real):  # an alias, a count; "N/A"
            continue
        name = metric.removesuffix("_stderr") + ("" if applied == "none" else f"[{applied}]")
        name += "_stderr" if metric.endswith("_stderr") else ""
        if math.isfinite(value):
            figures[name] = float(value)
        else:
            logger.warning("%s of task %r is %s and is left out.", name, task, value)
    return figures


# ------------------------------------------------------------------------------------------- what must not change


@contextlib.contextmanager
def _contained(allow_code: bool = False) -> Iterator[None]:
    """Keep what the harness does to the process, and what it says, inside a ``with``."""
    _harness("lm_eval")
    environment = dict(os.environ)
    python, arrays = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    loggers = logging.getLogger("lm_eval")
    level = loggers.level
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(contextlib.redirect_stdout(said))
        if sys.stderr is None or not sys.stderr.isatty():  # its progress bars are for terminals
            stack.enter_context(contextlib.redirect_stderr(said))
        try:
            loggers.setLevel(logging.ERROR)
            os.environ["DISABLE_MULTIPROC"] = "1"  # to the harness: no processes for the bootstrap
            if allow_code:
                os.environ["HF_ALLOW_CODE_EVAL"] = "1"
            yield
        finally:
            loggers.setLevel(level)
            for key in os.environ.keys() - environment.keys():
                del os.environ[key]
            os.environ.update(environment)
            random.setstate(python)
            np.random.set_state(arrays)


def _seed(seed: int) -> None:
    """The harness's own seeds, ``seed`` further on."""
    own = _harness("lm_eval.defaults")
    random.seed(own.DEFAULT_RANDOM_SEED + seed)
    np.random.seed(own.DEFAULT_OTHER_SEED + seed)
    torch.manual_seed(own.DEFAULT_OTHER_SEED + seed)


@contextlib.contextmanager
def _watched(model: PreTrainedModel) -> Iterator[None]:
    """Raise where the model's output is NaN: the harness would count it as a wrong answer, or even as a right one."""

    def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if torch.isnan(output.logits).any():
            raise RunError("the model's output is NaN: it holds NaN or infinite values.")

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _one_line(error: BaseException) -> str:
    """The start of an error's message; some are pages."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
