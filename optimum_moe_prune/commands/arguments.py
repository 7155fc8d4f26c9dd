# SPDX-License-Identifier: Apache-2.0
"""The arguments of the command line, and the recipe they ask for. Light: nothing heavy is imported for help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import RequestError

T = TypeVar("T", int, float)

RECIPE_FLAGS = ("method", "num_experts", "sparsity", "total_experts", "allocation", "protect_super_experts")
CALIBRATION_FLAGS = (
    "num_samples",
    "max_length",
    "batch_size",
    "max_tokens",
    "sample_selection",
    "pack",
    "sensitivity_samples",
    "seed",
    "num_clusters",
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
    group.add_argument(
        "--sensitivity-samples", type=int, metavar="N", help="samples to measure divergences on (default 32)"
    )


def add_method(parser: argparse.ArgumentParser, budget: bool = True, several: bool = False) -> None:
    """Method and, for a plan, its budget; or several methods with what they must retain."""
    group = parser.add_argument_group("method and budget" if budget else "method")
    if several:
        group.add_argument(
            "--method", action="append", metavar="NAME", help="may be repeated; or all (default mosaic)"
        )
    else:
        shown = "see: list methods (default mosaic)" if budget else "gather what it needs, or all (default all)"
        group.add_argument("--method", metavar="NAME", help=shown)
    group.add_argument(
        "--option", action="append", default=[], metavar="K=V", help="an option of the method; may be repeated"
    )
    group.add_argument(
        "--protect-super-experts", action="store_true", default=None, help="retain experts with extreme outputs"
    )
    group.add_argument(
        "--config", metavar="FILE", help="a saved recipe (moe_pruner_config.json); other flags take precedence"
    )
    if budget:
        _add_budget(group)
    if budget or several:
        _add_choice(group)


def _add_budget(group: Any) -> None:
    group.add_argument(
        "--num-experts", type=int, metavar="N", help="experts to retain in each layer (global: on average)"
    )
    group.add_argument("--sparsity", type=float, metavar="F", help="or the fraction of experts to remove")
    group.add_argument(
        "--total-experts", type=int, metavar="N", help="or, global: the experts to retain in all layers together"
    )
    group.add_argument(
        "--allocation",
        metavar="A",
        help="uniform: the same count in each layer; global: one for the whole model; sensitivity: one for the whole "
        "model, spread by measured divergences",
    )


def _add_choice(group: Any) -> None:
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


def add_sensitivity(parser: argparse.ArgumentParser) -> None:
    """What was measured, to plan with."""
    parser.add_argument(
        "--sensitivity", metavar="FILE", help="with --allocation sensitivity: what the command sensitivity wrote"
    )


def add_grid(parser: argparse.ArgumentParser) -> None:
    """What is measured of a model's sensitivity."""
    group = parser.add_argument_group("what to measure")
    group.add_argument("--stats", metavar="STATS_DIR", help="statistics that score saved, in place of a calibration")
    group.add_argument(
        "--counts", metavar="N,N", help="numbers of experts to measure in each layer (default: all, or twelve of them)"
    )
    group.add_argument("--sparsities", metavar="F,F", help="of whole models (default 0.125,0.25,0.375,0.5,0.625,0.75)")


def add_report(parser: argparse.ArgumentParser) -> None:
    """What a report shows."""
    parser.add_argument("--stats", metavar="STATS_DIR", help="statistics that score saved")
    parser.add_argument(
        "--plan", action="append", metavar="PLAN.json", help="a plan, or a pruned checkpoint's folder; may be repeated"
    )
    parser.add_argument("--sensitivity", metavar="FILE", help="what the command sensitivity wrote")
    parser.add_argument("--evaluation", metavar="FILE", help="what evaluate --output wrote")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--pictures", metavar="DIR", help="folder of the pictures (default: OUTPUT_pictures)")


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """What models are evaluated on."""
    parser.add_argument("--reference", metavar="DIR|ID", help="the model to compare with, usually the unpruned one")
    parser.add_argument("--data", action="append", metavar="FILE", help=".jsonl or .txt; may be repeated")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="samples in a forward pass (default 8)")
    parser.add_argument(
        "--max-length", type=int, default=2048, metavar="L", help="cut samples to this many tokens (default 2048)"
    )
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--speed", action="store_true", help="measure generation and peak memory, each model in a process of its own"
    )
    group.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens to generate (default 64)")
    group = parser.add_argument_group("tasks of lm-evaluation-harness")
    group.add_argument(
        "--tasks", action="append", metavar="T,T", help="names, papers (the two papers' table), or .yaml files"
    )
    group.add_argument("--task-include", action="append", metavar="DIR", help="folder of further tasks")
    group.add_argument("--task-limit", type=int, metavar="N", help="documents of each task at most")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples in a prompt (default: the task's own)")
    group.add_argument("--allow-code", action="store_true", help="let tasks run programs that the model writes")
    group = parser.add_argument_group("results")
    group.add_argument("--output", metavar="FILE.json", help="write the results")
    group.add_argument("--overwrite", action="store_true", help="replace earlier results")
    group.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    group.add_argument(
        "--update-card", action="store_true", help="put the results into the pruned checkpoint and its model card"
    )


def add_publishing(parser: argparse.ArgumentParser) -> None:
    """What is added to a pruned checkpoint, and where it is published."""
    group = parser.add_argument_group("results and publishing")
    group.add_argument(
        "--evaluate",
        action="append",
        metavar="FILE",
        help="held-out text (.jsonl or .txt): compare with the original afterwards, and put the results into the "
        "model card; may be repeated",
    )
    group.add_argument("--report", action="store_true", help="add report.html and its pictures")
    group.add_argument("--push-to-hub", metavar="REPO", help="publish the finished folder, in one commit")
    group.add_argument("--private", action="store_true", default=None, help="make a new repository private")


def numbers(text: str | None, flag: str, kind: Callable[[str], T]) -> list[T] | None:
    """Comma-separated numbers."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(f"{flag} must be numbers with commas between them, and is {text!r}.") from error


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
    from ..config import MoEPrunerConfig

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
