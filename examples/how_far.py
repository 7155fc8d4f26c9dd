# SPDX-License-Identifier: Apache-2.0
"""How far can this model be pruned, what is lost, and where? With a page of pictures (pip install matplotlib).

    python examples/how_far.py [MODEL] [--method soft_frequency] [--output how-far.html]

By default the small trained Mixtral of this repository, and text made on the spot. The same on the command line:
``optimum-cli moe-prune sensitivity`` and ``report``.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, write_report

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "mixtral"), help="folder or Hub id")
parser.add_argument("--method", default="soft_frequency")
parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
parser.add_argument("--samples", type=int, default=12, help="to measure on")
parser.add_argument("--output", default="how-far.html")
args = parser.parse_args()

config = MoEPrunerConfig(
    method=args.method, sparsity=0.5, allocation="sensitivity", sensitivity_samples=args.samples, num_samples=60
)
pruner = MoEPruner.from_pretrained(args.model, config=config)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
print(pruner.measure_sensitivity(model, args.calibration or make_corpus({"train": 10})["train"]).summary())
plan = pruner.plan()
print(plan.summary())
write_report(args.output, stats=pruner.stats, plans=[plan], sensitivity=pruner.sensitivity, overwrite=True)
print(args.output)
