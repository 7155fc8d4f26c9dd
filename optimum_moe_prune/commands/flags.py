# SPDX-License-Identifier: Apache-2.0
"""Flags that commands share. Those of the recipe are made from its fields: help, placeholders and defaults."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import MoEPrunerConfig
from ..errors import RequestError
from ..names import AUTO, BY_SENSITIVITY, device_name, dtype_name
from ..progress import say
from ..storage.values import Json, fraction, no_constant
from ..targets.table import opened_in_general
from .parsing import add_general, nearest

if TYPE_CHECKING:
    from ..checkpoints.source import Source
    from ..models.memory import Compute

T = TypeVar("T", int, float)
V = TypeVar("V")

METHOD = ("method", "method_options", "protect_super_experts")
BUDGET = ("num_experts", "sparsity", "total_experts", "fit", "bits", "context", "allocation", "count_multiple_of")
CHOICE = ("protect", "skip_layers")
RECOVERY = ("recover", "recover_what", "recovery_samples")
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
TARGET = ("target", "parallel_size")
READING = ("text_column", "template_args", "skip_bad")
_FIELDS = {setting.name: setting for setting in dataclasses.fields(MoEPrunerConfig)}
_FLAGS = {"method_options": "--option", "template_args": "--template-arg", "target": "--for"}
DATA = ".jsonl, .json, .csv, .tsv, .parquet, .txt, .md (also .gz), preset:NAME or hub:name[config](split):samples"


def value_of(function: Callable[[str], V]) -> Callable[[str], V]:
    """For ``type=``: a function that raises ``RequestError``, whose message argparse would not show."""

    def value(text: str) -> V:
        try:
            return function(text)
        except RequestError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return value


def one_of(*known: str) -> Callable[[str], str]:
    """For ``type=``: one of a few words, in capitals or not."""

    def value(text: str) -> str:
        if text.lower() not in known:
            meant = nearest(text, known)
            raise argparse.ArgumentTypeError(
                f"{text!r} is not known; " + (f"did you mean {meant[0]}?" if meant else f"known: {', '.join(known)}.")
            )
        return text.lower()

    return value


_OR_A_WORD = {"num_clusters": "auto", "max_tokens": "all"}
"""Settings that are a whole number, or this word."""
_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": value_of(fraction)}


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
            group.add_argument(flag, type=str if name in _OR_A_WORD else _TYPES.get(kind, str), **options)


def add_recipe(parser: argparse.ArgumentParser, several: str = "", budget: bool = True) -> Any:
    """Method, budget and what must be retained.

    Args:
        parser: The command's.
        several: Where several methods may be named, the default.
        budget: Whether a plan is made.

    Returns:
        The group of these flags.
    """
    group = parser.add_argument_group("method and budget" if budget else "method")
    if several:
        group.add_argument(
            "--method", action="append", metavar="NAME", help=f"may be repeated; or all (default {several})"
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
    return group


def add_config(group: Any) -> None:
    """A saved recipe."""
    group.add_argument(
        "--config",
        metavar="FILE",
        help="a saved recipe: .json, .yaml or a pruned checkpoint's folder; other flags take precedence",
    )


def add_model(parser: argparse.ArgumentParser, several: bool = False, any_form: bool = False) -> None:
    """The model, or several, and how they are reached."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        action="append" if several else "store",
        metavar="DIR|ID",
        help="the model's folder, or its id on the Hub"
        + ("; may be repeated" if several else "")
        + ("; or the same model as a GGUF file or an MLX folder, or an adapter of it" if any_form else ""),
    )
    group.add_argument("--revision", help="branch, tag or commit on the Hub")
    group.add_argument("--token", help="access token for a private repository on the Hub")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_compute(parser: argparse.ArgumentParser, what: str, stream: bool = True) -> None:
    """Where and in which precision to calculate, how much is in memory, what becomes of interrupted work."""
    group = parser.add_argument_group("how it is run")
    group.add_argument(
        "--device",
        default=AUTO,
        type=value_of(device_name),
        metavar="D",
        help="where to run: cpu, cuda, cuda:1 ... (default auto: the GPU that is there, of several processes each on "
        "its own, else cpu)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        type=value_of(dtype_name),
        metavar="D",
        help=f"precision of {what}: auto, float32, bfloat16 (bf16) or float16 (fp16) (default auto: the checkpoint's, "
        "calculated in float32 where the processor is far faster in that)",
    )
    if stream:
        group.add_argument(
            "--stream",
            action=argparse.BooleanOptionalAction,
            help="hold one decoder layer in memory at a time (default: where the model does not fit)",
        )
        group.add_argument(
            "--restart", action="store_true", help="begin interrupted work anew; by default it is continued"
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
    group = parser.add_argument_group("what is written", textwrap.fill(opened_in_general(), 76))
    group.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="most bytes in a file, as 500MB or 5GB (default 5GB)"
    )
    group.add_argument(
        "--standalone",
        action="store_true",
        help="where layers keep different numbers of experts, add code so that trust_remote_code=True loads it "
        "without this package",
    )
    add_settings(group, ["substitute"])


def add_common(parser: argparse.ArgumentParser, output: str | None = None, output_help: str = "") -> None:
    """The output, and how results and errors are shown."""
    if output is not None:
        parser.add_argument("output", metavar=output, help=output_help)
    group = parser.add_argument_group("general")
    if output is not None:
        group.add_argument("--overwrite", action="store_true", help="replace an earlier output of this package")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")
    group.add_argument("--debug", action="store_true", help="show tracebacks, and what other libraries say")
    add_general(parser, group)


# ------------------------------------------------------------------------------------------- what flags say


def source_of(args: argparse.Namespace, name_or_path: str | None = None) -> Source:
    """The model that is named, and how it is reached."""
    from ..checkpoints.source import Source

    name = args.model if name_or_path is None else name_or_path
    return Source(name, args.revision, args.token, trust_remote_code=args.trust_remote_code)


def compute_of(args: argparse.Namespace, says: bool = True) -> Compute:
    """How the model is run; says where, if that is no processor.

    Args:
        args: What was given.
        says: Whether it is said.

    Raises:
        RequestError: If the device is not there.
    """
    from ..models.devices import in_words
    from ..models.memory import Compute

    compute = Compute(args.dtype, args.device, getattr(args, "stream", None), getattr(args, "processes", None))
    compute.check()
    own = compute.on_own_device()
    if says and own.together.is_main and (used := in_words(own.device)):
        others = ", each other process's on a card of its own" if own.device != compute.device else ""
        say(f"the model runs on {used}{others}" + (" (--device auto)." if compute.device == AUTO else "."))
    return compute


def recipe(args: argparse.Namespace) -> MoEPrunerConfig:
    """The recipe that the flags ask for, those of a saved one taking second place."""
    values = {name: value for name in _FIELDS if (value := getattr(args, name, None)) not in (None, [])}
    for name, word in _OR_A_WORD.items():
        if values.get(name, word) != word:
            values[name] = _whole(values[name], f"--{name.replace('_', '-')} (or {word})")
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


def check_sensitivity(args: argparse.Namespace, config: MoEPrunerConfig, is_shown: bool = False) -> None:
    """Refuse ``--sensitivity`` where nothing reads it.

    Args:
        args: The command's.
        config: The recipe.
        is_shown: Whether a report shows it.

    Raises:
        RequestError: With what it is for.
    """
    if args.sensitivity is not None and not config.measures and not is_shown:
        raise RequestError(
            f"--sensitivity is for --allocation {BY_SENSITIVITY}, and the allocation is {config.allocates!r}."
        )


def given_reading(args: argparse.Namespace) -> list[str]:
    """The flags that are given of those that say how texts are read."""
    said = {"--text-column": args.text_column, "--template-arg": args.template_args, "--skip-bad": args.skip_bad}
    return [flag for flag, value in said.items() if value]


def recipes(args: argparse.Namespace, methods: list[str] | None, default: str, advice: str) -> list[MoEPrunerConfig]:
    """The recipes of several methods, which share all other settings; ``args.method`` is the last one's then.

    Args:
        args: What was given.
        methods: The methods that were named, ``"all"`` among them.
        default: In place of none, where no saved recipe names one.
        advice: What to do where options of one method are given for several.

    Raises:
        RequestError: If they are.
    """
    from ..methods import every_method

    given: list[str | None] = [*methods] if methods else [None if args.config else default]
    names = every_method() if "all" in given else list(dict.fromkeys(given))
    if len(names) > 1 and args.method_options:
        raise RequestError(f"--option is for one method, and several are named; {advice}.")
    found = []
    for args.method in names:
        found.append(recipe(args))
    return found


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
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError as error:
        why = f": {error}" if isinstance(error, RequestError) else "."
        raise RequestError(f"{flag} must be numbers with commas between them, and is {text!r}{why}") from error


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
        if pairs.setdefault(key, value) != value:
            raise RequestError(f"{flag} gives {key} twice, as {pairs[key]} and as {value}; give it once.")
    return pairs
