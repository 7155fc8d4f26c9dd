# SPDX-License-Identifier: Apache-2.0
"""Measure a method's options on a small model: nats lost on the split for choosing defaults, not the held-out one.

    python examples/method_options.py [--method pathfinder] [--try tau=0.1,0.2,0.3] [--model DIR]

Every row is the mean over domains and over three disjoint calibration draws. Several ``--try`` are combined.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import tempfile
from pathlib import Path

import quickstart
from quickstart import CONTEXT, HERE, calibrated, corpus, draw, losses, texts_by_domain
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_moe_prune import CalibrationSet, MoEPrunerConfig, Need
from optimum_moe_prune.planning.build import build_plan

DRAWS = 3
TUNE_SAMPLES = 12  # of each domain
TRIES = {
    "mosaic": ["num_generalists=0,1,2", "num_domains=none,16"],
    "pathfinder": ["tau=none,0.2,1,5", "ends=inner,all", "outliers=none,3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "small_models" / "mixtral")
    parser.add_argument("--method", default="mosaic")
    parser.add_argument("--try", dest="tries", action="append", metavar="NAME=V,V", help="an option and its values")
    parser.add_argument("--allocation", help="uniform or global (default: the method's own)")
    arguments = parser.parse_args()
    disable_progress_bar()
    logging.getLogger("optimum_moe_prune").setLevel(logging.ERROR)

    tries = [entry.partition("=") for entry in arguments.tries or TRIES.get(arguments.method, [])]
    names = [name for name, _, _ in tries]
    grid = list(itertools.product(*(values.split(",") for _, _, values in tries)))
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    counts = {"train": DRAWS * quickstart.CALIBRATION_SAMPLES, "tune": TUNE_SAMPLES, "heldout": 0}
    with tempfile.TemporaryDirectory() as scratch:
        paths = corpus.write_corpus(Path(scratch), counts)
        tune = CalibrationSet.build(paths["tune"], tokenizer, max_length=CONTEXT)
        text = texts_by_domain(paths["train"])
    base = losses(model, tune)
    stats = [calibrated(model, draw(text, n, corpus.DOMAINS), set(Need), tokenizer)[0] for n in range(DRAWS)]
    widths = [max(len(name), *(len(values[i]) for values in grid)) for i, name in enumerate(names)]
    print(
        "  ".join(["removed", *(f"{n:>{w}}" for n, w in zip(names, widths, strict=True)), "nats lost", "worst draw"])
    )
    for sparsity, values in itertools.product((0.25, 0.5), grid):
        options = dict(zip(names, values, strict=True))
        config = MoEPrunerConfig(
            method=arguments.method, sparsity=sparsity, allocation=arguments.allocation, method_options=options
        )
        lost = []
        for each in stats:
            after = losses(build_plan(each, config).apply(copy.deepcopy(model)), tune)
            lost.append(sum(after[d] - base[d] for d in corpus.DOMAINS) / len(corpus.DOMAINS))
        cells = [f"{sparsity:>7.0%}", *(f"{v:>{w}}" for v, w in zip(values, widths, strict=True))]
        print("  ".join([*cells, f"{sum(lost) / DRAWS:9.3f}", f"{max(lost):10.3f}"]), flush=True)


if __name__ == "__main__":
    main()
