# SPDX-License-Identifier: Apache-2.0
"""What the settings of a recipe can be: words, numbers and how they go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from .errors import RequestError, nearest_first
from .names import BY_SENSITIVITY, DISTIL, DROP, ESTIMATED, EXPERTS, GLOBAL, KEEP, NORMS, PRUNE, REFIT, ROUTER, UNIFORM
from .storage.values import is_integer, size_bytes
from .targets.table import get_target

BUDGETS = ("num_experts", "sparsity", "total_experts", "fit")
BITS = (2, 3, 4, 5, 6, 8, 16, 32)
SAMPLE_SELECTIONS = ("first", "random", "kmeans")
ALLOCATIONS = (UNIFORM, GLOBAL, BY_SENSITIVITY, ESTIMATED)
MTP = (PRUNE, KEEP, DROP)
RECOVER = (REFIT, DISTIL)
RECOVER_WHAT = (EXPERTS, ROUTER, NORMS)

MOST = 2**63 - 1  # that other programs can hold


def check_numbers(config: Any) -> None:
    """Refuse numbers out of their bounds, and budgets that exclude one another.

    Raises:
        RequestError: Naming the setting.
    """
    given = [name for name in BUDGETS if getattr(config, name) is not None]
    if len(given) > 1:
        raise one_budget(given)
    if config.sparsity is not None and (not isinstance(config.sparsity, (int, float)) or not 0 < config.sparsity < 1):
        raise RequestError(f"sparsity is {config.sparsity!r}; the fraction of experts to remove lies between 0 and 1.")
    if config.fit is not None:
        size_bytes(config.fit, "fit")
        if config.bits not in (None, *BITS):
            raise RequestError(f"bits is {config.bits!r}; it must be one of {', '.join(map(str, BITS))}.")
    elif config.bits is not None or config.context:
        raise RequestError(f"{'context' if config.bits is None else 'bits'} is for fit=SIZE, and none is given.")
    for setting in dataclasses.fields(config):
        value, least, most = getattr(config, setting.name), setting.metadata["least"], setting.metadata["most"]
        if isinstance(setting.default, bool) and not isinstance(value, bool):
            raise RequestError(f"{setting.name} is {value!r}; it must be true or false.")
        if least is None or (value is None and setting.default is None):
            continue
        or_all = ' or "all"' if setting.name == "max_tokens" else ""
        if (not or_all or value != "all") and (not is_integer(value) or not least <= value <= most):
            too_large = is_integer(value) and value > most
            bounds = f"at least {least}" + (f" and at most {most}" if most < MOST or too_large else "")
            raise RequestError(f"{setting.name} is {value!r}; it must be an integer of {bounds}{or_all}.")


def check_words(config: Any) -> None:
    """Refuse words that are not known, and settings that lack the one that they are for.

    Raises:
        RequestError: Naming the setting.
    """
    for name, known in (("allocation", ALLOCATIONS), ("sample_selection", SAMPLE_SELECTIONS), ("mtp", MTP)):
        value = getattr(config, name)
        if value not in known and not (name in ("allocation", "mtp") and value is None):
            raise RequestError(f"{name} {value!r} is not known. Known: {nearest_first(str(value), [*known])}.")
    check_clusters(config.sample_selection, config.num_clusters)
    if not isinstance(config.text_column, (str, type(None))) or config.text_column == "":
        raise RequestError(f"text_column is {config.text_column!r}; it must be the name of a column.")
    if not isinstance(config.template_args, dict) or not all(isinstance(name, str) for name in config.template_args):
        raise RequestError(f"template_args is {config.template_args!r}; it must give values by name.")
    check_target(config.target, config.parallel_size)
    if not config.recover and config.recovery_samples is not None:
        raise RequestError("recovery_samples is for recover='refit' or 'distil', and nothing is to be recovered.")
    if config.substitute:
        check_served(config.target, config.parallel_size)
    for name in ("recover", "progressive"):
        if config.substitute and getattr(config, name):
            raise RequestError(
                f"{name} is for experts that are removed, and with substitute=True they answer with a constant; leave "
                "one of the two out."
            )
    if config.recover_what and DISTIL not in config.recover:
        raise RequestError("recover_what is for recover='distil'; a refit changes down projections of experts alone.")


def check_target(target: Any, parallel_size: int) -> None:
    """Refuse a program that is not known, and a number of devices that is none, or without one that has a use for it.

    Raises:
        RequestError: Naming the setting.
    """
    known = None if target is None else get_target(target)
    if not is_integer(parallel_size) or parallel_size < 1:
        raise RequestError(f"parallel_size is {parallel_size!r}; it must be an integer of at least 1.")
    if parallel_size > 1 and (known is None or not known.parallel):
        found = "and none is given" if known is None else f"and {known.program} has no use for it"
        raise RequestError(f"parallel_size is for a target that spreads experts over devices, {found}.")


def check_served(target: str | None, parallel_size: int) -> None:
    """Refuse what experts that answer with a constant are not for.

    Raises:
        RequestError: If another program than vLLM is to open them, or several devices are to share them.
    """
    check_target(target, parallel_size)
    if target not in (None, "vllm"):
        raise RequestError(f"substitute=True is for vLLM, and the target is {target!r}.")
    if parallel_size > 1:
        raise RequestError(
            f"parallel_size is {parallel_size}; vLLM takes experts that answer with a constant only where experts are "
            "not spread over devices (tensor parallelism is free)."
        )


def steps_of(recover: Any) -> tuple[str, ...]:
    """The steps of a recovery, in the order in which they are done; ``"refit,distil"`` and lists alike.

    Raises:
        RequestError: If one is not known.
    """
    return _words("recover", recover, RECOVER)


def parts_of(recover_what: Any) -> tuple[str, ...]:
    """What a distillation trains; ``"experts,router"`` and lists alike.

    Raises:
        RequestError: If a part is not known.
    """
    return _words("recover_what", recover_what, RECOVER_WHAT)


def _words(setting: str, given: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    """Words of a list, or of text between commas, in the order of the known ones."""
    if given is None:
        return ()
    words = given.split(",") if isinstance(given, str) else given
    if not isinstance(words, Iterable) or not all(isinstance(word, str) for word in words):
        raise RequestError(f"{setting} is {given!r}; it must be of {', '.join(known)}.")
    words = [word.strip() for word in words if word.strip()]
    if not words and isinstance(given, str) and given.strip():
        raise RequestError(f"{setting} is {given!r}; it must be of {', '.join(known)}.")
    for word in words:
        if word not in known:
            raise RequestError(f"{setting} {word!r} is not known. Known: {nearest_first(word, [*known])}.")
    return tuple(word for word in known if word in words)


def check_clusters(sample_selection: str, num_clusters: Any) -> None:
    """Refuse a number of clusters that cannot be meant.

    Raises:
        RequestError: If it is below 1, or samples are not selected by clusters.
    """
    if num_clusters is None:
        return
    if num_clusters != "auto" and not (is_integer(num_clusters) and num_clusters >= 1):
        raise RequestError(f'num_clusters is {num_clusters!r}; it must be an integer of at least 1, or "auto".')
    if sample_selection != "kmeans":
        raise RequestError(
            f"num_clusters is for sample_selection 'kmeans', and sample_selection is {sample_selection!r}."
        )


def one_budget(given: list[str]) -> RequestError:
    """What is said where not exactly one budget is given."""
    return RequestError(
        "exactly one of num_experts (to retain in each layer), sparsity (fraction to remove), fit (the memory it has "
        "to fit in) and total_experts (to retain in the whole model) is needed; given: "
        f"{' and '.join(given) or 'none'}."
    )
