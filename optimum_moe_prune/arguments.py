# SPDX-License-Identifier: Apache-2.0
"""The arguments of the command line, and the recipe they ask for. Light: nothing heavy is imported for help."""

from __future__ import annotations

import argparse
from typing import Any

from .errors import RequestError

RECIPE_FLAGS = ("method", "num_experts", "sparsity", "total_experts", "allocation", "protect_super_experts")
CALIBRATION_FLAGS = (
    "num_samples",
    "max_length",
    "batch_size",
    "max_tokens",
    "sample_selection",
    "pack",
    "seed",
    "num_clusters",
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, and how it is reached."""
    parser.add_argument("--model", required=True, metavar="DIR|ID", help="the model's folder, or its id on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--token", help="access token for a private repository on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to calculate."""
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="where to run: cpu, cuda, cuda:1, auto ... (default cpu)"
    )


def add_dtype(parser: argparse.ArgumentParser, what: str) -> None:
    """The precision of something."""
    choices = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", default="auto", choices=choices, help=f"precision of {what} (default auto: the checkpoint's)"
    )


def add_streaming(parser: argparse.ArgumentParser) -> None:
    """How much of the model is in memory, and what becomes of interrupted work."""
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
        help=".jsonl (text or messages, optional domain), .txt (blank line between documents), or "
        "hub:name[config](split):samples; may be repeated",
    )
    group.add_argument(
        "--num-samples", type=int, metavar="N", help="samples to use, in equal shares of the domains (default 128)"
    )
    group.add_argument("--max-length", type=int, metavar="L", help="cut samples to this many tokens (default 2048)")
    group.add_argument("--batch-size", type=int, metavar="B", help="samples in a forward pass (default 8)")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="tokens to keep statistics per token for (default 8192)"
    )
    group.add_argument("--sample-selection", metavar="S", help="first, random or kmeans (default first)")
    group.add_argument(
        "--num-clusters",
        metavar="K",
        help="with kmeans: representatives of each domain, or auto (default: --num-samples)",
    )
    group.add_argument("--pack", action="store_true", default=None, help="join samples and cut them into full lengths")


def add_method(parser: argparse.ArgumentParser, budget: bool = True) -> None:
    """Method and, for a plan, its budget."""
    group = parser.add_argument_group("method and budget" if budget else "what to gather")
    default = "see: list methods (default mosaic)" if budget else "gather what this method needs, or all (default all)"
    group.add_argument("--method", metavar="NAME", help=default)
    group.add_argument(
        "--option", action="append", default=[], metavar="K=V", help="an option of the method; may be repeated"
    )
    group.add_argument(
        "--protect-super-experts", action="store_true", default=None, help="retain experts with extreme outputs"
    )
    group.add_argument(
        "--config", metavar="FILE", help="a saved recipe (moe_pruner_config.json); other flags take precedence"
    )
    if not budget:
        return
    group.add_argument(
        "--num-experts", type=int, metavar="N", help="experts to retain in each layer (global: on average)"
    )
    group.add_argument("--sparsity", type=float, metavar="F", help="or the fraction of experts to remove")
    group.add_argument(
        "--total-experts", type=int, metavar="N", help="or, global: the experts to retain in all layers together"
    )
    group.add_argument(
        "--allocation", metavar="A", help="uniform: the same count in each layer; global: one for the whole model"
    )
    group.add_argument(
        "--protect",
        action="append",
        default=[],
        metavar="LAYER:E,E",
        help="experts to retain in any case; may be repeated",
    )
    group.add_argument("--skip-layers", metavar="L,L", help="layers that keep all their experts")
    group.add_argument(
        "--domain-weight", action="append", default=[], metavar="DOMAIN=W", help="share of a domain; may be repeated"
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """The seed."""
    parser.add_argument("--seed", type=int, metavar="S", help="for whatever is drawn (default 0)")


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


def recipe(args: argparse.Namespace) -> Any:
    """The ``MoEPrunerConfig`` that the arguments ask for."""
    from .config import MoEPrunerConfig

    values: dict[str, Any] = {}
    for flag in (*RECIPE_FLAGS, *CALIBRATION_FLAGS):
        if getattr(args, flag, None) is not None:
            values[flag] = getattr(args, flag)
    if "num_clusters" in values and values["num_clusters"] != "auto":
        values["num_clusters"] = _whole(values["num_clusters"], "--num-clusters (or auto)")
    if args.option:
        values["method_options"] = _pairs(args.option, "--option", "=", "NAME=VALUE")
    if getattr(args, "protect", None):
        pairs = _pairs(args.protect, "--protect", ":", "LAYER:EXPERT,EXPERT")
        values["protect"] = {
            _whole(layer, "the layer in --protect"): [_whole(e, "an expert in --protect") for e in experts.split(",")]
            for layer, experts in pairs.items()
        }
    if getattr(args, "skip_layers", None):
        values["skip_layers"] = [_whole(layer, "a layer in --skip-layers") for layer in args.skip_layers.split(",")]
    if not args.config:
        return MoEPrunerConfig(**values)
    stored = MoEPrunerConfig.from_pretrained(args.config)
    if values.get("method", stored.method) == stored.method:
        values["method_options"] = {**stored.method_options, **values.get("method_options", {})}
    return MoEPrunerConfig.from_dict(stored.to_dict(), **values)


def domain_weights(args: argparse.Namespace) -> dict[str, float] | None:
    """The share of each domain, where any is given."""
    weights = {}
    for domain, weight in _pairs(args.domain_weight, "--domain-weight", "=", "DOMAIN=WEIGHT").items():
        try:
            weights[domain] = float(weight)
        except ValueError as error:
            raise RequestError(f"--domain-weight {domain}={weight}: the weight must be a number.") from error
    return weights or None
