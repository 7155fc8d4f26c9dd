# SPDX-License-Identifier: Apache-2.0
"""What half of the experts cost, what a measured choice saves of it, and what recovery gives back.

    python examples/benchmarks/recovery.py [--models mixtral qwen2_moe qwen3_moe deepseek_v3] [--draws 3]

For each small trained model and each of several disjoint draws of calibration text: plans by single methods and by
measurement, and from the measured ones a refit, a distillation and both, with 80 and with 240 samples. Everything is
judged on the same held-out text. A row is the mean over the draws, with the standard deviation; *left* is its share of
what the row that it starts from loses, *most* the largest such share of any domain of any draw.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import report
from kept_tokens import draws_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe_prune import (
    CalibrationSet,
    MoEPruner,
    MoEPrunerConfig,
    PruningPlan,
    evaluate,
)

SMALL = Path(__file__).resolve().parents[1] / "small_models"
sys.path.insert(0, str(SMALL))
from corpus import make_corpus  # noqa: E402

SINGLE = ("enumeration", "mosaic", "reap", "soft_frequency")
TOKENS = 256
SMALL_LOSS = 0.01  # nats: shares of less are noise


@dataclass(frozen=True)
class Lost:
    """What a model lost, by domain, and how long making it took."""

    domains: dict[str, float]
    seconds: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.domains.values())

    @property
    def worst(self) -> float:
        return max(self.domains.values())


class Draw:
    """One model and one draw of text.

    Args:
        name: Of the model.
        records: The draw.
        heldout: The text that everything is judged on.
        a: The script's arguments.
    """

    def __init__(self, name: str, records: list[dict[str, str]], heldout: list[Any], a: argparse.Namespace) -> None:
        self.name, self.a = name, a
        self.tokenizer = AutoTokenizer.from_pretrained(SMALL / name)
        self.original = self.load()
        self.records = records
        self.heldout = CalibrationSet.build(heldout, self.tokenizer, max_length=TOKENS)
        self.found: dict[str, Lost] = {}

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(SMALL / self.name, dtype="float32")

    def samples(self, count: int) -> CalibrationSet:
        """So many samples, the same number of each domain."""
        domains = sorted({record["domain"] for record in self.records})
        each = {d: [r for r in self.records if r["domain"] == d][: -(-count // len(domains))] for d in domains}
        return CalibrationSet.build([r for rs in each.values() for r in rs], self.tokenizer, max_length=TOKENS)

    def judge(self, row: str, model: Any, seconds: float) -> None:
        """Measure a model."""
        domains = evaluate(model, self.heldout, reference=self.original).domains
        lost = {domain: float(of.lost or 0.0) for domain, of in domains.items() if domain != "all"}
        self.found[row] = Lost(lost, seconds)
        print(f"{self.name:12} {row:44} {self.found[row].mean:.3f} worst {self.found[row].worst:.3f} {seconds:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip

    def plans(self) -> dict[str, PruningPlan]:
        """Plans of half of the experts, each judged."""
        calibration, made, sparsity = self.samples(self.a.samples), {}, self.a.sparsity
        measured: list[MoEPruner] = []
        for allocation in ("sensitivity", "uniform"):
            pruner = MoEPruner(MoEPrunerConfig(method="auto", sparsity=sparsity, allocation=allocation))
            begun = time.process_time()
            model = pruner.prune(self.load(), calibration)
            self.judge(f"auto, {allocation}", model, time.process_time() - begun)
            assert pruner.pruning_plan is not None
            made[f"auto, {allocation}"] = pruner.pruning_plan
            measured.append(pruner)
        for method in SINGLE:  # by the same statistics and the same measurements
            for allocation in ("sensitivity", "uniform"):
                pruner = MoEPruner(MoEPrunerConfig(method=method, sparsity=sparsity, allocation=allocation))
                pruner.sensitivity = measured[0].sensitivity
                made[f"{method}, {allocation}"] = pruner.plan(measured[0].stats)
        for row, plan in made.items():
            if row not in self.found:
                self.judge(row, plan.apply(self.load()), 0.0)
        return made

    def recovered(self, row: str, plan: PruningPlan, steps: str, samples: CalibrationSet) -> dict[str, Any]:
        """Recover a plan's model and judge it; what the plan then remembers."""
        recipe = MoEPrunerConfig(method="random", sparsity=self.a.sparsity, recover=steps)  # type: ignore[arg-type]
        pruner = MoEPruner(recipe, plan=plan)
        begun = time.process_time()
        model = pruner.prune(self.load(), recovery=samples)
        self.judge(row, model, time.process_time() - begun)
        assert pruner.pruning_plan is not None
        return pruner.pruning_plan.provenance["recovery"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples", type=int, default=120, help="that plans are made with")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--recovery", nargs="+", type=int, default=[80, 240], help="samples to recover with")
    parser.add_argument("--heldout", type=int, default=16, help="samples of each domain that all is judged on")
    parser.add_argument("--found", help="a file that what was found is written to")
    a = parser.parse_args()
    torch.set_num_threads(1)
    each = -(-max(*a.recovery, a.samples) // 6)
    texts = make_corpus({"train": a.draws * each, "heldout": a.heldout})
    rows: list[dict[str, object]] = []
    every: dict[str, Any] = {}
    for name in a.models:
        draws, guards = [], []
        for records in draws_of(texts["train"], a.draws, each):
            draw = Draw(name, records, texts["heldout"], a)
            plans = draw.plans()
            for count in a.recovery:
                samples = draw.samples(count)
                for steps in ("refit", "distil", *(["refit,distil"] if count == a.recovery[-1] else [])):
                    draw.recovered(f"auto, sensitivity, {steps} ({count})", plans["auto, sensitivity"], steps, samples)
            row = f"auto, uniform, refit,distil ({a.recovery[-1]})"
            draw.recovered(row, plans["auto, uniform"], "refit,distil", draw.samples(a.recovery[-1]))
            one = [r for r in records if r["domain"] == records[0]["domain"]][:20]
            few = CalibrationSet.build(one, draw.tokenizer, max_length=TOKENS)
            for steps in ("refit", "distil"):
                said = draw.recovered(
                    f"auto, sensitivity, {steps} (20 of one domain)", plans["auto, sensitivity"], steps, few
                )
                guards.append(said["kl_after"]["all"] <= said["kl_before"]["all"])
            draws.append(draw)
        rows += table(name, draws)
        every[name] = {"rows": [{row: vars(of) for row, of in draw.found.items()} for draw in draws], "guards": guards}
        pairs = [(draw.found["auto, sensitivity"], draw.found["reap, uniform"]) for draw in draws]
        share = statistics.mean(auto.mean / reap.mean for auto, reap in pairs)
        most = max(auto.domains[d] / nats for auto, reap in pairs for d, nats in reap.domains.items())
        print(
            f"{name}: auto leaves {share:.2f} of what REAP uniform loses, {most:.2f} at most in a domain", flush=True
        )
        print(f"{name}: held-back divergence never higher with 20 samples of one domain: {all(guards)}", flush=True)
        if a.found:
            Path(a.found).write_text(json.dumps(every, indent=1))
    report("half of the experts, and what is given back", rows, {name: of["guards"] for name, of in every.items()})


def table(name: str, draws: list[Draw]) -> list[dict[str, object]]:
    """Rows over the draws of a model."""
    found = [draw.found for draw in draws]
    single = min((f"{m}, sensitivity" for m in SINGLE), key=lambda row: statistics.mean(of[row].mean for of in found))
    rows = []
    for row in found[0]:
        start = row.partition(", refit")[0].partition(", distil")[0]
        start = (
            start if start != row else {"auto, sensitivity": single, "auto, uniform": "reap, uniform"}.get(row, row)
        )
        lost = [of[row] for of in found]
        before = [of[start] for of in found]
        means = [of.mean for of in lost]
        shares = [a.mean / b.mean for a, b in zip(lost, before, strict=True) if b.mean > 0]
        most = [
            a.domains[d] / b.domains[d]
            for a, b in zip(lost, before, strict=True)
            for d in a.domains
            if b.domains[d] > 0.01
        ]
        rows.append(
            {
                "model": name,
                "row": row,
                "lost": f"{statistics.mean(means):.3f} +- {statistics.stdev(means) if len(means) > 1 else 0:.3f}",
                "worst": f"{statistics.mean(of.worst for of in lost):.3f}",
                "of": "" if start == row else start,
                "left": "" if start == row else f"{statistics.mean(shares):.2f}",
                "most": "" if start == row or not most else f"{max(most):.2f}",
                "CPU s": f"{statistics.mean(of.seconds for of in lost):.0f}",
            }
        )
    return rows


if __name__ == "__main__":
    main()
