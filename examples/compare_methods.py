# SPDX-License-Identifier: Apache-2.0
"""One calibration, many methods: which experts each retains, and what is lost.

    python examples/compare_methods.py [MODEL] [--methods mosaic reap soft_frequency] [--sparsity 0.25]

By default the small trained Qwen2-MoE of this repository, and text made on the spot. Plans cost seconds once the
statistics are there; each pruned model is judged on held-out text against the original, with 95% intervals.
"""

import argparse
import copy
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, calibrate, evaluate

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "qwen2_moe"), help="folder or Hub id")
parser.add_argument("--methods", nargs="+", default=["mosaic", "pathfinder", "reap", "soft_frequency", "random"])
parser.add_argument("--sparsity", type=float, default=0.25)
parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
parser.add_argument("--heldout", type=Path, help=".jsonl with text and domain")
args = parser.parse_args()

texts = make_corpus({"train": 10, "heldout": 6})
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
pruner = MoEPruner.from_pretrained(args.model, config=MoEPrunerConfig(sparsity=args.sparsity))
stats = calibrate(model, pruner.samples(args.calibration or texts["train"]), "all")
heldout = pruner.samples(args.heldout or texts["heldout"])

print(f"{'method':<16}{'KL (nats)':>10}{'lost (nats)':>12}  95% interval     experts by layer")
for name in args.methods:
    config = MoEPrunerConfig(method=name, sparsity=args.sparsity)
    plan = MoEPruner(config).plan(stats)
    found = evaluate(plan.apply(copy.deepcopy(model)), heldout, reference=model).domains["all"]
    low, high = found.lost_interval
    counts = " ".join(str(len(experts)) for experts in plan.retained.values())
    print(f"{name:<16}{found.kl_divergence:>10.3f}{found.lost:>12.3f}  {low:.3f} to {high:.3f}   {counts}")
