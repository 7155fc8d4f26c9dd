# SPDX-License-Identifier: Apache-2.0
"""Benchmark tasks: EleutherAI's lm-evaluation-harness on a loaded model, unequal layers included ([eval] extra).

The harness loads, prompts and scores; this module checks names before a model is loaded, and leaves the process as it
was.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from ..errors import RequestError, RunError, nearest_first
from ..models.checks import evaluating
from ..models.widened import precision_of, widened
from ..names import AUTO, dtype_name
from ..progress import Work, working
from ..storage.values import Json, Values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PRESETS: dict[str, tuple[str, ...]] = {
    "papers": (
        *("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "winogrande"),
        *("gsm8k", "minerva_math", "humaneval", "mbpp"),
    )
}
"""Lists of tasks by name. ``papers`` is the table that Mosaic Pruning and MoE Pathfinder have in common: ARC, BoolQ,
HellaSwag, MMLU, OBQA, WinoGrande, GSM8K, MATH (as ``minerva_math``, four examples), HumanEval and MBPP."""

_BOOTSTRAP = 1000  # draws for the standard error of metrics without a formula for it; 2% exact, seconds not minutes


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str],
    *,
    include: Sequence[str | Path] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    allow_code: bool = False,
    seed: int = 0,
    apply_chat_template: bool | str = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool = True,
    gen_kwargs: str | Json | None = None,
    dtype: str = AUTO,
) -> dict[str, dict[str, float]]:
    """Score a model on benchmark tasks by ``lm_eval.simple_evaluate``: the figures are those of ``lm-eval run``.

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
        apply_chat_template: Whether prompts are chats by the tokenizer's template, or one of its templates by name.
        system_instruction: Text before every prompt; with a chat template the system's turn.
        fewshot_as_multiturn: Whether the examples in a chat are turns of their own, or all in the user's one turn.
        gen_kwargs: Settings of generation over the tasks' own, also as ``"temperature=0.6,do_sample=true"``.
        dtype: The precision to calculate in, as for ``evaluate``.

    Returns:
        Figures by task. ``acc``, ``acc_norm``, ``exact_match`` and the like are shares from 0 to 1, and
        ``NAME_stderr`` is the standard error of ``NAME``, where the harness knows one. A metric on answers that a
        filter extracted has the filter's name in brackets, ``exact_match[flexible-extract]``. A group is one entry,
        aggregated as it defines (``mmlu``); a tag, or a group that defines no aggregate, has an entry for each of its
        tasks. Figures that are not finite are left out, and a warning names them.

    Raises:
        RequestError: If the harness is not installed, a task is unknown, is damaged or needs a missing package, two of
            the tasks overlap, one runs programs and ``allow_code`` is not set, the tokenizer lacks what the harness
            needs of it, or the harness refuses a setting.
        RunError: If a task's data cannot be read, or the model's output is NaN.
    """
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise RequestError(f"{name} is {value}; it must be at least {least}.")
    if isinstance(gen_kwargs, str) and not all("=" in part for part in gen_kwargs.split(",")):
        raise RequestError(f"gen_kwargs is {gen_kwargs!r}; it must be of the form NAME=VALUE,NAME=VALUE.")
    precision = precision_of(model, dtype_name(dtype))
    tokenizer = _copied(tokenizer, apply_chat_template)
    manager, names = _resolved(tasks, include, allow_code)
    doing = f"running {'the task' if len(names) == 1 else f'{len(names)} tasks'} {', '.join(names)}"
    with (
        _contained(allow_code),
        widened(model, precision),
        evaluating(model),
        torch.no_grad(),
        working(doing, None, "batch", "ran the tasks") as work,
        _watched(model, work),
    ):
        evaluator, own = _harness("evaluator"), _harness("defaults")
        loaded, entries = _load(manager, names, tokenizer)
        try:
            results = evaluator.simple_evaluate(
                _harness("models.huggingface").HFLM(
                    pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
                ),
                tasks=loaded,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP,
                confirm_run_unsafe_code=allow_code,
                apply_chat_template=bool(apply_chat_template),
                system_instruction=system_instruction,
                fewshot_as_multiturn=fewshot_as_multiturn,
                gen_kwargs=gen_kwargs,
                random_seed=own.DEFAULT_RANDOM_SEED + seed,
                **{f"{of}_random_seed": own.DEFAULT_OTHER_SEED + seed for of in ("numpy", "torch", "fewshot")},
            )["results"]
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise RequestError(f"lm-evaluation-harness cannot run these tasks: {_one_line(error)}.") from error
    return {entry: _figures(entry, results[entry]) for entry in entries}


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


def _harness(module: str) -> Any:
    try:
        importlib.import_module("lm_eval")
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        hint = 'pip install "optimum-moe-prune[eval]"'
        raise RequestError(f"lm-evaluation-harness is not installed ({_one_line(error)}): {hint}") from error


# ------------------------------------------------------------------------------------------- names and definitions


def _resolved(tasks: Sequence[str], include: Sequence[str | Path], allow_code: bool) -> tuple[Any, list[str]]:
    """The harness's ``TaskManager`` with the local folders, and the names of the tasks in it."""
    named = [tasks] if isinstance(tasks, str) else tasks
    specs = list(dict.fromkeys(spec for task in named for spec in PRESETS.get(task, (task,))))
    if not specs:
        raise RequestError("no task is named.")
    files = {spec: Path(spec).expanduser().resolve() for spec in specs if spec.endswith(".yaml")}
    folders = [Path(folder).expanduser().resolve() for folder in include]
    if absent := [spec for spec, path in files.items() if not path.is_file()]:
        raise RequestError(f"{absent[0]} does not exist.")
    if wrong := [folder for folder in folders if not folder.is_dir()]:
        raise RequestError(f"{wrong[0]} is not a folder; name one with task files.")
    folders += [path.parent for path in files.values()]
    with _contained():
        own = _own_index()
        try:
            manager = _harness("tasks").TaskManager(include_path=list(dict.fromkeys(folders)), include_defaults=False)
        except TypeError as error:  # names that cannot be sorted
            raise RequestError(f"a task file beside the named ones is damaged: {_one_line(error)}.") from error
    index = manager.task_index
    local = {name: Path(entry.yaml_path).resolve() for name, entry in index.items() if entry.yaml_path}
    name_of = {path: name for name, path in local.items()}
    if odd := [spec for spec, path in files.items() if path not in name_of]:
        raise RequestError(
            f"{odd[0]} defines no task: it must be YAML with a 'task' or 'group' that no other file there names."
        )
    for name, entry in own.items():
        index.setdefault(name, entry)
    names = list(dict.fromkeys(name_of[files[spec]] if spec in files else spec for spec in specs))
    for name in local.keys() & own.keys() & set(names):
        logger.warning("task %r is the one in %s, not the harness's own.", name, local[name])
    if unknown := [name for name in names if name not in index]:
        known = [*map(str, index), *PRESETS]
        near = {name: nearest_first(name, difflib.get_close_matches(name, known, n=5)) for name in unknown}
        listed = ", ".join(f"{name!r} (nearest: {found})" if found else repr(name) for name, found in near.items())
        raise RequestError(
            f"lm-evaluation-harness has no task {listed}. `lm-eval ls tasks` lists all; the path of a "
            "task file ends in .yaml."
        )
    if (unsafe := [name for name in names if _is_unsafe(index, name)]) and not allow_code:
        raise RequestError(
            f"{', '.join(unsafe)}: these tasks run programs that the model writes, on this machine and with your "
            "rights. Leave them out, or allow it where nothing can be lost (allow_code=True)."
        )
    return manager, names


@functools.cache
def _own_index() -> Json:
    """The tasks that come with the harness; reading them takes seconds."""
    return _harness("tasks").TaskManager().task_index


def _is_unsafe(index: Values, name: str) -> bool:
    """Whether a task runs programs, or one of a group's; refuses a definition of which no task can be made."""
    try:
        definitions = list(_definitions(index, name, ()))
    except (AttributeError, TypeError) as error:
        raise RequestError(f"the definition of task {name!r} is damaged: {_one_line(error)}.") from error
    if not definitions:
        raise RequestError(f"the group {name!r} of tasks holds none.")
    return any(definition.get("unsafe_code") for definition in definitions)


def _definitions(index: Values, member: Any, above: tuple[str, ...]) -> Iterator[Json]:
    """The settings of the tasks behind a member of the groups ``above``: a name, or a definition in place."""
    own: Json = member if isinstance(member, dict) else {}
    name: Any = own.get("group", own.get("task")) if own else member
    if name in above:
        raise RequestError(f"the group {name!r} of tasks holds itself.")
    if name not in index and not own:
        raise RequestError(f"the group {above[-1]!r} of tasks names {name!r}, and there is no such task.")
    settings = (index[name].cfg if name in index else own) or {}
    if name in index and index[name].kind.name == "TAG":
        inside: Any = sorted(index[name].tags)
    elif "group" in settings and "class" not in settings:
        inside = settings.get("task") or ()
    else:
        yield {**settings, **own}
        return
    for part in [inside] if isinstance(inside, str) else inside:
        yield from _definitions(index, part, (*above, name))


# ------------------------------------------------------------------------------------------- tasks and figures


def _load(manager: Any, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[Any], list[str]]:
    """The harness's tasks and groups with their data, and the names of their results."""
    loaded: list[Any] = []
    entries: list[str] = []
    for name in names:
        try:
            found = manager.load([name])
        except ImportError as error:
            raise RequestError(f"task {name!r} needs a package that is missing: {_one_line(error)}.") from error
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise RequestError(f"task {name!r} cannot be used: {_one_line(error)}.") from error
        except Exception as error:  # of the Hub's, the data sets' or the network's library
            raise RunError(f"the data of task {name!r} cannot be read: {_one_line(error)}.") from error
        writes = any(task.OUTPUT_TYPE == "generate_until" for task in found["tasks"].values())
        if tokenizer.eos_token_id is None and (writes or tokenizer.bos_token_id is None):
            needed = "an eos token" if writes else "a bos or eos token"
            raise RequestError(f"task {name!r} needs a tokenizer with {needed}, and this one has none; set it.")
        group = found["groups"].get(name)
        loaded += found["tasks"].values() if group is None else [group]
        entries += [name] if group is not None and group.has_aggregation else found["tasks"]
    return loaded, entries


def _copied(tokenizer: PreTrainedTokenizerBase | None, template: bool | str) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer for the harness, its chat template the one that is asked for."""
    if tokenizer is None:
        raise RequestError("tasks are texts: a tokenizer is needed, and this model's folder has none.")
    tokenizer = copy.deepcopy(tokenizer)
    known = tokenizer.chat_template
    if isinstance(template, str) and not (isinstance(known, dict) and template in known):
        names = ", ".join(known) if isinstance(known, dict) else "one without a name" if known else "none"
        raise RequestError(f"the tokenizer has no chat template {template!r}; it has {names}.")
    if template:  # by its name the harness would only note it, and use the default
        try:
            tokenizer.chat_template = tokenizer.get_chat_template(template if isinstance(template, str) else None)
        except ValueError as error:
            raise RequestError(f"apply_chat_template: {_one_line(error)}.") from error
    return tokenizer


def _figures(task: str, metrics: Json) -> dict[str, float]:
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
    loggers = logging.getLogger("lm_eval")
    python, arrays, level = random.getstate(), np.random.get_state(), loggers.level
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    settings = {"DISABLE_MULTIPROC": "1"}  # to the harness: no processes for the bootstrap
    settings |= {"HF_ALLOW_CODE_EVAL": "1"} if allow_code else {}
    # A description of the machine for the harness's own files takes time, and git speaks on the terminal.
    undescribed: Json = {"add_env_info": lambda results: None, "get_git_commit_hash": lambda: None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(mock.patch.dict(os.environ, settings))
        stack.enter_context(mock.patch.multiple(_harness("evaluator"), create=True, **undescribed))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if sys.stderr is None or not sys.stderr.isatty():  # its progress bars are for terminals
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            loggers.setLevel(logging.ERROR)
            yield
        finally:
            loggers.setLevel(level)
            random.setstate(python)
            np.random.set_state(arrays)


@contextlib.contextmanager
def _watched(model: PreTrainedModel, work: Work) -> Iterator[None]:
    """Count batches, and raise where the model's output is NaN.

    The harness would count it as a wrong answer, or even as a right one.
    """

    def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if torch.isnan(output.logits).any():
            raise RunError("the model's output is NaN: it holds NaN or infinite values.")
        work.update()

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _one_line(error: BaseException) -> str:
    """The start of an error's message; some are pages."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
