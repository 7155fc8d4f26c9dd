# SPDX-License-Identifier: Apache-2.0
"""Flags that commands share. Those of the recipe are made from its fields: help, placeholders and defaults."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import MoEPrunerConfig
from ..errors import RequestError
from ..storage.values import Json, no_constant

if TYPE_CHECKING:
    from ..checkpoints.source import Source
    from ..models.memory import Compute

T = TypeVar("T", int, float)

METHOD = ("method", "method_options", "protect_super_experts")
BUDGET = ("num_experts", "sparsity", "total_experts", "fit", "bits", "context", "allocation", "count_multiple_of")
CHOICE = ("protect", "skip_layers")
CALIBRATION = (
    "num_samples",
    "max_length",
    "batch_size",
    "max_tokens",
    "sample_selection",
    "num_clusters",
    "pack",
    "sensitivity_samples",
)
READING = ("text_column", "template_args", "skip_bad")
_FIELDS = {setting.name: setting for setting in dataclasses.fields(MoEPrunerConfig)}
_FLAGS = {"method_options": "--option", "template_args": "--template-arg"}
DATA = ".jsonl, .json, .csv, .tsv, .parquet, .txt, .md (also .gz), preset:NAME or hub:name[config](split):samples"
_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float}


def add_settings(group: Any, names: Iterable[str]) -> None:
    """The flags of settings of the recipe. What is not given stays None, and the recipe's default or file decides."""
    for name in names:
        setting = _FIELDS[name]
        flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
        kind = str(setting.type).split(" ")[0]
        default = setting.default
        shown = f" (default {default})" if type(default) in (int, str) else ""
        options: Json = {"dest": name, "help": setting.metadata["help"] + shown, "default": None}
        if kind == "bool":
            group.add_argument(flag, action="store_true", **options)
            continue
        options["metavar"] = setting.metadata["metavar"]
        if setting.default is dataclasses.MISSING:  # of several values
            group.add_argument(flag, action="append", **options)
        else:
            group.add_argument(flag, type=str if name == "num_clusters" else _TYPES.get(kind, str), **options)


def add_recipe(parser: argparse.ArgumentParser, several: bool = False, budget: bool = True) -> None:
    """Method, budget and what must be retained.

    Args:
        parser: The command's.
        several: Whether several methods may be named.
        budget: Whether a plan is made.
    """
    group = parser.add_argument_group("method and budget" if budget else "method")
    if several:
        group.add_argument(
            "--method", action="append", metavar="NAME", help="may be repeated; or all (default mosaic)"
        )
        add_settings(group, METHOD[1:])
    else:
        add_settings(group, METHOD)
    add_config(group)
    if budget:
        add_settings(group, BUDGET)
    add_settings(group, CHOICE)
    group.add_argument(
        "--domain-weight", action="append", default=[], metavar="DOMAIN=W", help="share of a domain; may be repeated"
    )


def add_config(group: Any) -> None:
    """A saved recipe."""
    group.add_argument(
        "--config", metavar="FILE", help="a saved recipe (moe_pruner_config.json); other flags take precedence"
    )


def add_model(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The model, or several, and how they are reached."""
    parser.add_argument(
        "--model",
        required=True,
        action="append" if several else "store",
        metavar="DIR|ID",
        help="the model's folder, or its id on the Hub" + ("; may be repeated" if several else ""),
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--token", help="access token for a private repository on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_compute(parser: argparse.ArgumentParser, what: str, stream: bool = True) -> None:
    """Where and in which precision to calculate, how much is in memory, what becomes of interrupted work."""
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="where to run: cpu, cuda, cuda:1, auto ... (default cpu)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help=f"precision of {what} (default auto: the checkpoint's)",
    )
    if stream:
        parser.add_argument(
            "--stream",
            action=argparse.BooleanOptionalAction,
            help="hold one decoder layer in memory at a time (default: where the model does not fit)",
        )
        parser.add_argument(
            "--restart", action="store_true", help="begin an interrupted calibration anew; by default it is continued"
        )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The calibration's texts and settings."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        action="append",
        metavar="FILE",
        help=f"records of text, messages or questions and answers (optional domain): {DATA}; may be repeated",
    )
    add_settings(group, (*CALIBRATION, *READING))


def add_writing(parser: argparse.ArgumentParser) -> None:
    """How the pruned checkpoint is written."""
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="most bytes in a file, as 500MB or 5GB (default 5GB)"
    )
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="where layers keep different numbers of experts, add code so that trust_remote_code=True loads it "
        "without this package",
    )


def add_common(parser: argparse.ArgumentParser, output: str | None = None, output_help: str = "") -> None:
    """The output, and how results and errors are shown."""
    if output is not None:
        parser.add_argument("output", metavar=output, help=output_help)
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this package")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


# ------------------------------------------------------------------------------------------- what flags say


def source_of(args: argparse.Namespace, name_or_path: str | None = None) -> Source:
    """The model that is named, and how it is reached."""
    from ..checkpoints.source import Source

    name = args.model if name_or_path is None else name_or_path
    return Source(name, args.revision, args.token, trust_remote_code=args.trust_remote_code)


def compute_of(args: argparse.Namespace) -> Compute:
    """How the model is run.

    Raises:
        RequestError: If the device is not there.
    """
    from ..models.memory import Compute

    compute = Compute(args.dtype, args.device, getattr(args, "stream", None))
    compute.check()
    return compute


def recipe(args: argparse.Namespace) -> MoEPrunerConfig:
    """The recipe that the flags ask for, those of a saved one taking second place."""
    values = {name: value for name in _FIELDS if (value := getattr(args, name, None)) not in (None, [])}
    if values.get("num_clusters", "auto") != "auto":
        values["num_clusters"] = _whole(values["num_clusters"], "--num-clusters (or auto)")
    if "method_options" in values:
        values["method_options"] = _pairs(values["method_options"], "--option", "=", "NAME=VALUE")
    if "template_args" in values:
        values["template_args"] = template_args(values["template_args"])
    if "protect" in values:
        pairs = _pairs(values["protect"], "--protect", ":", "LAYER:EXPERT,EXPERT")
        values["protect"] = {
            _whole(layer, "the layer in --protect"): [_whole(e, "an expert in --protect") for e in experts.split(",")]
            for layer, experts in pairs.items()
        }
    if "skip_layers" in values:
        values["skip_layers"] = [_whole(part, "a layer in --skip-layers") for part in values["skip_layers"].split(",")]
    if not args.config:
        return MoEPrunerConfig(**values)
    stored = MoEPrunerConfig.from_pretrained(args.config)
    if values.get("method", stored.method) == stored.method:
        values["method_options"] = {**stored.method_options, **values.get("method_options", {})}
    if "template_args" in values:
        values["template_args"] = {**stored.template_args, **values["template_args"]}
    return MoEPrunerConfig.from_dict(stored.to_dict(), **values)


def template_args(given: list[str] | None) -> Json:
    """Arguments of a chat template by name: values that are JSON as they are, others as text."""
    return {name: _json_or_text(value) for name, value in _pairs(given or [], "--template-arg", "=", "K=V").items()}


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value, parse_constant=no_constant)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(value, value)


def domain_weights(args: argparse.Namespace) -> dict[str, float] | None:
    """The share of each domain, where any is given."""
    weights = {}
    for domain, weight in _pairs(args.domain_weight, "--domain-weight", "=", "DOMAIN=WEIGHT").items():
        try:
            weights[domain] = float(weight)
        except ValueError as error:
            raise RequestError(f"--domain-weight {domain}={weight}: the weight must be a number.") from error
    return weights or None


def numbers(text: str | None, flag: str, kind: Callable[[str], T]) -> list[T] | None:
    """Comma-separated numbers."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(f"{flag} must be numbers with commas between them, and is {text!r}.") from error


def _whole(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise RequestError(f"{what} must be a whole number, and is {text!r}.") from error


def _pairs(items: list[str], flag: str, separator: str, form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in items:
        key, found, value = item.partition(separator)
        if not found or not key or not value:
            raise RequestError(f"{flag} {item} is not of the form {form}.")
        pairs[key] = value
    return pairs
