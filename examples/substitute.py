# SPDX-License-Identifier: Apache-2.0
"""Leave experts out and let them answer with their mean output: a checkpoint that vLLM reads.

    python examples/substitute.py [MODEL] [--output OUT]

By default the small trained Mixtral of this repository. The router still ranks all experts; half of them have one
vector in place of their weights. Beside it the same experts are removed, and both are measured on other text.
"""

import argparse
import json
import sys
from pathlib import Path

from optimum_moe_prune import CalibrationSet, CalibrationStats, MoEPruner, MoEPrunerConfig, Source, compare

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "mixtral"), help="folder or Hub id")
parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
parser.add_argument("--output", default="constant")
args = parser.parse_args()

recipe = MoEPrunerConfig(method="reap", sparsity=0.5, substitute=True, max_length=256)
pruner = MoEPruner.from_pretrained(args.model, config=recipe)
texts = make_corpus({"train": 4, "heldout": 2})
pruner.prune_checkpoint(args.output, calibration=args.calibration or texts["train"])
config = json.loads(Path(args.output, "config.json").read_text())
print(f"{args.output}: experts that answer with a constant, by layer: {config['approximate_experts']}")

# The same statistics serve any plan of the model, and any plan removes experts as well.
plan, stats = pruner.pruning_plan, pruner.stats
assert plan is not None and isinstance(stats, CalibrationStats)
plan.apply_to_checkpoint(args.model, f"{args.output}-removed")

tokenizer = Source(args.model).tokenizer
heldout = CalibrationSet.build(texts["heldout"], tokenizer, max_length=256)
print(compare([args.output, f"{args.output}-removed"], heldout, reference=args.model).summary())
print(f"serve it: vllm serve {args.output}")
