# SPDX-License-Identifier: Apache-2.0
"""The command lines that make a pruned checkpoint again."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import PurePath

from ..config import MoEPrunerConfig
from ..config_checks import BUDGETS, parts_of, steps_of
from ..errors import RequestError
from ..methods import list_methods
from ..names import BY_SENSITIVITY, ESTIMATED, PLAN_NAME
from ..plan import PruningPlan
from ..recovery.verdict import recovery_of
from ..storage.values import is_integer
from .plain import mapping, texts

RECOVERY = ("recover", "recover_what", "recovery_samples")
_DEFAULTS = {f.name: f.default for f in fields(MoEPrunerConfig) if f.name != "version"}


def run_command(plan: PruningPlan, model: str, extra: list[str]) -> list[str]:
    """The command line that calibrates and prunes as a plan's recipe says, in words; nothing where it has none.

    Args:
        plan: The plan.
        model: What to call the original.
        extra: Further arguments.
    """
    if all(plan.config.get(name) is None for name in BUDGETS):  # made by hand
        return []
    calibration = mapping(plan.provenance.get("calibration"))
    own, of_recovery = (texts(mapping(part).get("sources")) for part in (calibration, plan.provenance.get("recovery")))
    # Of the cut alone, or one recovered afterwards or on other text, it is the command that gives the cut.
    recovered = "recovery" in plan.provenance and bool(plan.config.get("recover"))
    recovered = recovered and (not own or not of_recovery or own == of_recovery)
    by_sensitivity = plan.config.get("allocation") == BY_SENSITIVITY
    command = ["optimum-cli", "moe-prune", "run", "--model", model, *extra]
    if _needs_text(plan) or by_sensitivity or plan.config.get("allocation") == ESTIMATED or recovered:
        sources = own
        if not sources and by_sensitivity:
            sources = texts(mapping(plan.provenance.get("sensitivity")).get("sources"))
        sources = sources or (of_recovery if recovered else [])
        for source in sources or ["CALIBRATION.jsonl"]:
            command += ["--calibration", _name(source)]
        if isinstance(dtype := calibration.get("dtype"), str) and dtype:
            command += ["--dtype", dtype]
    for name, value in plan.config.items():
        flag = "--for" if name == "target" else f"--{name.replace('_', '-')}"
        if name not in _DEFAULTS or (value == _DEFAULTS[name] and name != "method") or value in ({}, [], None, False):
            continue
        if name in RECOVERY and not recovered:
            continue
        if name == "method_options" and isinstance(value, dict):
            command += [part for key, option in value.items() for part in ("--option", f"{key}={option}")]
        elif name == "template_args" and isinstance(value, dict):
            given = [f"{key}={json.dumps(argument)}" for key, argument in value.items()]
            command += [part for argument in given for part in ("--template-arg", argument)]
        elif name == "protect" and isinstance(value, dict):
            for layer, experts in value.items():
                command += ["--protect", f"{layer}:{','.join(map(str, experts))}"]
        elif isinstance(value, (list, tuple)):
            command += [flag, ",".join(map(str, value))]
        elif value is True:
            command.append(flag)
        else:
            command += [flag, str(value)]
    for domain, weight in mapping(calibration.get("domain_weights")).items():
        command += ["--domain-weight", f"{domain}={weight}"]
    return [*command, "OUTPUT"]


def recover_command(plan: PruningPlan, model: str, extra: list[str]) -> list[str]:
    """The command line that applies a plan and recovers as it says that was done; nothing where it was not.

    Args:
        plan: The plan.
        model: What to call the original.
        extra: Further arguments.
    """
    found = recovery_of(plan)
    if found is None:
        return []
    try:
        asked = steps_of(found.get("asked")) or tuple(found["steps"])
        settings = {"recover": asked, "recover_what": parts_of(mapping(found.get("settings")).get("recover_what"))}
    except RequestError:
        return []
    settings |= {name: value for name, value in mapping(found.get("settings")).items() if is_integer(value)}
    command = ["optimum-cli", "moe-prune", "apply", "--model", model, *extra, "--plan", PLAN_NAME]
    for name in ("recover", "recover_what", "recovery_samples", "max_length", "batch_size", "seed"):
        value = settings.get(name)
        if value in (None, ()) or (name != "recover" and plan.config.get(name, _DEFAULTS[name]) == value):
            continue
        command += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, tuple) else str(value)]
    reading = {**plan.config, **mapping(found.get("settings"))}  # how texts are read has to be said anew
    if isinstance(column := reading.get("text_column"), str):
        command += ["--text-column", column]
    for key, argument in mapping(reading.get("template_args")).items():
        command += ["--template-arg", f"{key}={json.dumps(argument)}"]
    command += ["--skip-bad"] if reading.get("skip_bad") is True else []
    for source in texts(found.get("sources")) or ["CALIBRATION.jsonl"]:
        command += ["--calibration", _name(source)]
    return [*command, "OUTPUT"]


def _name(source: str) -> str:
    """A source without its folder, which is nobody else's business."""
    return source if source.startswith("hub:") else PurePath(source.replace("\\", "/")).name or source


def _needs_text(plan: PruningPlan) -> bool:
    """Whether a plan's method reads a calibration; one that is not known here is taken to."""
    try:
        return plan.method not in list_methods() or MoEPrunerConfig.from_dict(plan.config).needs_text
    except (TypeError, ValueError):
        return True
