# SPDX-License-Identifier: Apache-2.0
"""Change a plan by hand: it is JSON, and what it says is what is done.

    python examples/edit_plan.py [MODEL] [--output OUT]

By default the small trained Mixtral of this repository. The first layer of the plan gets all its experts back, which
that model needs more than any other; the checkpoint then has layers of different sizes.
"""

import argparse
import json
import sys
from pathlib import Path

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, PruningPlan

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "mixtral"), help="folder or Hub id")
parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
parser.add_argument("--output", default="edited")
args = parser.parse_args()

pruner = MoEPruner.from_pretrained(args.model, config=MoEPrunerConfig(method="soft_frequency", sparsity=0.5))
pruner.calibrate(calibration=args.calibration or make_corpus({"train": 10})["train"])
made = pruner.plan()
path = made.save(f"{args.output}-plan.json")

# Any editor will do in place of these lines.
values = json.loads(path.read_text())
layer, entry = next(iter(values["layers"].items()))
entry["retained"] = list(range(entry["original_num_experts"]))
entry["num_experts"] = len(entry["retained"])
path.write_text(json.dumps(values, indent=2))

edited = PruningPlan.load(path)  # checked: experts that are not there, or too few of them, are refused
for changed, (only_now, only_before) in edited.diff(made).items():
    print(f"layer {changed}: added {list(only_now)}, taken away {list(only_before)}")
edited.apply_to_checkpoint(args.model, args.output)
print(f"{args.output}: {edited.sparsity:.0%} of the experts are removed; experts by layer {edited.num_experts}")
