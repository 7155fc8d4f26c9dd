# SPDX-License-Identifier: Apache-2.0
"""One calibration, many methods: what each loses, and which experts it retains.

    python examples/compare_methods.py [MODEL] [--methods mosaic reap] [--sparsity 0.25 0.5] [--output DIR]

By default the small trained Qwen2-MoE of this repository, and text made on the spot. Every plan is judged on held-out
text against the original by masking its experts, so that the model is neither copied nor cut; with --output there are
tables, a picture and the plans as files. On the command line: optimum-cli moe-prune compare.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe_prune import compare_methods, write_method_comparison
from optimum_moe_prune.models.devices import one_device
from optimum_moe_prune.names import device_name, dtype_name

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "qwen2_moe"), help="folder or Hub id")
parser.add_argument("--methods", nargs="+", default=["mosaic", "pathfinder", "reap", "soft_frequency", "random"])
parser.add_argument("--sparsity", nargs="+", type=float, default=[0.25])
parser.add_argument(
    "--dtype", default="float32", type=dtype_name, help="precision to calculate in, or auto: the model's own"
)
parser.add_argument("--device", default="auto", type=device_name, help="where to run (default: the GPU that is there)")
parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
parser.add_argument("--heldout", type=Path, help=".jsonl with text and domain")
parser.add_argument("--output", help="folder for results.json, table.md, picture.png and the plans")
args = parser.parse_args()

texts = make_corpus({"train": 10, "heldout": 6})
found = compare_methods(
    AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map=one_device(args.device)),
    args.calibration or texts["train"],
    args.heldout or texts["heldout"],
    methods=args.methods,
    sparsities=args.sparsity,
    tokenizer=AutoTokenizer.from_pretrained(args.model),
)
print(found.summary(bold=sys.stdout.isatty()))
print("\nlost on all text, 95% interval, and experts by layer:")
for name, plan in found.plans.items():
    figures = list(found.comparison.models[name].evaluation.domains.values())[-1]
    low, high = figures.lost_interval
    counts = " ".join(str(len(experts)) for experts in plan.retained.values())
    print(f"  {name:<24}{figures.lost:>8.3f}   {low:.3f} to {high:.3f}   {counts}")
if args.output:
    print(write_method_comparison(args.output, found))
