# SPDX-License-Identifier: Apache-2.0
"""Measure Mosaic's options on a small model: nats lost on the split for choosing defaults, never on the held-out one.

    python examples/mosaic_options.py [--model examples/small_models/qwen2_moe]

Every row is the mean over domains and over three disjoint calibration draws.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from pathlib import Path

import quickstart
from quickstart import CONTEXT, HERE, calibrated, corpus, draw, losses, texts_by_domain
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_moe_prune import CalibrationSet, MoEPrunerConfig, Need
from optimum_moe_prune.plan import build_plan

DRAWS = 3
TUNE_SAMPLES = 12  # of each domain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "small_models" / "mixtral")
    parser.add_argument("--generalists", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--domains", nargs="+", default=["none", "16"], help="numbers, none (as published) or auto")
    arguments = parser.parse_args()
    disable_progress_bar()
    logging.getLogger("optimum_moe_prune").setLevel(logging.ERROR)

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    counts = {"train": DRAWS * quickstart.CALIBRATION_SAMPLES, "tune": TUNE_SAMPLES, "heldout": 0}
    with tempfile.TemporaryDirectory() as scratch:
        paths = corpus.write_corpus(Path(scratch), counts)
        tune = CalibrationSet.build(paths["tune"], tokenizer, max_length=CONTEXT)
        text = texts_by_domain(paths["train"])
    base = losses(model, tune)
    stats = [calibrated(model, draw(text, n, corpus.DOMAINS), set(Need), tokenizer)[0] for n in range(DRAWS)]
    print("removed  generalists  domains  nats lost")
    for sparsity in (0.25, 0.5):
        for generalists in arguments.generalists:
            for domains in arguments.domains:
                options = {"num_generalists": generalists, "num_domains": domains}
                config = MoEPrunerConfig(method="mosaic", sparsity=sparsity, method_options=options)
                lost = 0.0
                for each in stats:
                    after = losses(build_plan(each, config).apply(copy.deepcopy(model)), tune)
                    lost += sum(after[d] - base[d] for d in corpus.DOMAINS) / len(corpus.DOMAINS) / DRAWS
                print(f"{sparsity:>7.0%}  {generalists:>11}  {domains:>7}  {lost:9.2f}", flush=True)


if __name__ == "__main__":
    main()
