# SPDX-License-Identifier: Apache-2.0
"""Statistics of every expert's output from one token in eight, beside those from all: what the plans lose.

    python examples/benchmarks/kept_tokens.py [--models mixtral qwen2_moe] [--draws 3] [--samples 13]

For each small trained model and each of several disjoint draws of calibration text, the methods that read outputs of
experts which were not chosen plan twice: from statistics of all tokens and of one in eight. Both plans are judged on
the same held-out text. The bar for what is lost more, averaged over the draws, is what another draw changes: the
standard deviation of the loss over the draws, with all tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from common import report
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe_prune import CalibrationSet, MoEPrunerConfig, calibrate, compare_methods

SMALL = Path(__file__).resolve().parents[1] / "small_models"
sys.path.insert(0, str(SMALL))
from corpus import make_corpus  # noqa: E402

METHODS = ("mosaic", "enumeration", "pathfinder", "importance")
ONE_IN = 8


def draws_of(records: list[dict[str, str]], draws: int, samples: int) -> list[list[dict[str, str]]]:
    """Disjoint lists of records, each with so many of every domain."""
    by_domain: dict[str, list[dict[str, str]]] = {}
    for record in records:
        by_domain.setdefault(record["domain"], []).append(record)
    return [[r for of in by_domain.values() for r in of[n * samples : (n + 1) * samples]] for n in range(draws)]


def losses(model: Any, tokenizer: Any, texts: list[Any], heldout: list[Any], a: argparse.Namespace) -> dict[Any, Any]:
    """By method, sparsity and tokens kept: nats lost of all tokens, in the worst domain, and what is retained."""
    calibration = CalibrationSet.build(texts, tokenizer, max_length=256)
    found: dict[Any, Any] = {}
    for kept in ("all", -(-calibration.num_tokens // ONE_IN)):
        recipes = [MoEPrunerConfig(method=name) for name in a.methods]
        stats = calibrate(model, calibration, recipes, max_tokens=kept)  # type: ignore[arg-type]
        result = compare_methods(model, stats, heldout, methods=a.methods, sparsities=a.sparsity, tokenizer=tokenizer)
        for name, column in result.columns.items():
            domains = result.comparison.models[name].evaluation.domains
            lost = {domain: of.lost for domain, of in domains.items()}
            key = (column.method, column.sparsity, "all" if kept == "all" else "few")
            worst = max(value for domain, value in lost.items() if domain != "all")
            found[key] = (lost["all"], worst, result.plans[name].retained)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples", type=int, default=13, help="of each domain in a draw")
    parser.add_argument("--heldout", type=int, default=16, help="samples of each domain that plans are judged on")
    a = parser.parse_args()
    texts = make_corpus({"train": a.draws * a.samples, "heldout": a.heldout})
    rows: list[dict[str, object]] = []
    for name in a.models:
        model = AutoModelForCausalLM.from_pretrained(SMALL / name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(SMALL / name)
        found = [
            losses(model, tokenizer, draw, texts["heldout"], a)
            for draw in draws_of(texts["train"], a.draws, a.samples)
        ]
        for method, sparsity, kept in found[0]:
            if kept != "all":
                continue
            both = [(draw[method, sparsity, "all"], draw[method, sparsity, "few"]) for draw in found]
            whole, few = (statistics.mean(pair[i][0] for pair in both) for i in (0, 1))
            worst = [statistics.mean(pair[i][1] for pair in both) for i in (0, 1)]
            total = sum(map(len, both[0][0][2].values()))
            others = [sum(len(set(x[2][n]) - set(y[2][n])) for n in x[2]) for x, y in both]
            rows.append(
                {
                    "model": name,
                    "method": method,
                    "removed": f"{sparsity:.0%}",
                    "lost, all": whole,
                    "lost, 1 in 8": few,
                    "worst domain, all": worst[0],
                    "worst domain, 1 in 8": worst[1],
                    "other experts": f"{statistics.mean(others):.1f} of {total}",
                    "more": few - whole,
                    "bar": statistics.stdev(pair[0][0] for pair in both) if len(both) > 1 else "",
                }
            )
            print(rows[-1], flush=True)
    report("plans from one token in eight", rows, vars(a), "more")


if __name__ == "__main__":
    main()
