# SPDX-License-Identifier: Apache-2.0
"""Experts removed, removed and refitted, or left to answer with a constant: what each loses by the same plans.

    python examples/benchmarks/substitution.py [--models mixtral qwen2_moe qwen3_moe deepseek_v3] [--draws 3]

For each small trained model, each share of experts and each of several disjoint draws of calibration text: one plan,
the model without the experts, the same with its down projections refitted, and the checkpoint in which each of these
experts answers with its mean output over the calibration's text, calculated as vLLM does. Everything is judged in
float32 on the same held-out text. A number is how many nats per token the loss rises, mean over the draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kept_tokens import draws_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe_prune import (
    CalibrationSet,
    Compute,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    calibrate,
    evaluate,
)
from optimum_moe_prune.checkpoints.source import Source
from optimum_moe_prune.evaluation.comparison import markdown_table
from optimum_moe_prune.models.memory import load_model

SMALL = Path(__file__).resolve().parents[1] / "small_models"
sys.path.insert(0, str(SMALL))
from corpus import make_corpus  # noqa: E402

TOKENS = 256
WAYS = ("removed", "removed, refit", "constant")


def lost_by_way(name: str, records: list[dict[str, str]], heldout: list[Any], method: str, sparsity: float) -> Any:
    """What each way loses, by domain.

    Args:
        name: The model.
        records: What it is calibrated, and refitted, on.
        heldout: What it is judged on.
        method: Chooses the experts.
        sparsity: How many go.
    """
    folder = SMALL / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples, judged = (CalibrationSet.build(texts, tokenizer, max_length=TOKENS) for texts in (records, heldout))

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

    original, models = load(), {}
    recipe = MoEPrunerConfig(method=method, sparsity=sparsity, allocation="uniform")
    pruner = MoEPruner(recipe)
    models["removed"] = pruner.prune(load(), samples)
    plan = pruner.pruning_plan
    assert plan is not None
    refit = MoEPruner(replace(recipe, recover=("refit",)), plan=plan)
    models["removed, refit"] = refit.prune(load(), recovery=samples)
    stats = calibrate(load(), samples, [Need.ROUTING, Need.MEAN_OUTPUTS])
    with tempfile.TemporaryDirectory() as place:
        plan.apply_to_checkpoint(folder, f"{place}/out", substitute=stats)
        models["constant"] = load_model(Source(f"{place}/out"), Compute("float32"))
    found = {}
    for way, model in models.items():
        domains = evaluate(model, judged, reference=original).domains
        found[way] = {domain: float(of.lost or 0.0) for domain, of in domains.items() if domain != "all"}
        shown = " ".join(f"{domain} {nats:.3f}" for domain, nats in found[way].items())
        print(f"{name} {method} {sparsity:.0%} {way}: {shown}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
    parser.add_argument("--methods", nargs="+", default=["auto"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples", type=int, default=120, help="that experts are chosen and refitted by")
    parser.add_argument("--heldout", type=int, default=16, help="samples of each domain that all is judged on")
    parser.add_argument("--found", help="a file that what was found is written to")
    a = parser.parse_args()
    torch.set_num_threads(1)
    each = -(-a.samples // 6)
    texts = make_corpus({"train": a.draws * each, "heldout": a.heldout})
    rows: list[list[str]] = []
    every = []
    for name in a.models:
        for method in a.methods:
            for sparsity in a.sparsities:
                draws = [
                    lost_by_way(name, records, texts["heldout"], method, sparsity)
                    for records in draws_of(texts["train"], a.draws, each)
                ]
                every += [{"model": name, "method": method, "sparsity": sparsity, **draw} for draw in draws]
                for way in WAYS:
                    means = {d: statistics.mean(draw[way][d] for draw in draws) for d in draws[0][way]}
                    rows = rows or [["model", "plan", "experts", *means, "mean"]]
                    numbers = [f"{nats:.3f}" for nats in (*means.values(), statistics.mean(means.values()))]
                    rows.append([name, f"{method}, {sparsity:.0%}", way, *numbers])
    print(markdown_table(rows))
    if a.found:
        Path(a.found).write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
