# SPDX-License-Identifier: Apache-2.0
"""Prune a Mixtral and use what came out.

    python examples/prune_mixtral.py [mistralai/Mixtral-8x7B-Instruct-v0.1] [--calibration mix.jsonl] [--num-experts 6]

By default the small trained Mixtral of this repository, and text made on the spot. The model is in memory here;
larger_than_memory.py is for those that do not fit.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from optimum_moe_prune import MoEPruner, MoEPrunerConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "mixtral"), help="folder or Hub id")
parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
parser.add_argument("--num-experts", type=int, default=6, help="to retain in each layer")
parser.add_argument("--output", default="mixtral-pruned")
args = parser.parse_args()

pruner = MoEPruner.from_pretrained(args.model, config=MoEPrunerConfig(method="mosaic", num_experts=args.num_experts))
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto")
before = model.num_parameters()
model = pruner.prune(model, calibration=args.calibration or make_corpus({"train": 20})["train"])
print(pruner.pruning_plan.summary())
print(f"{before:,} -> {model.num_parameters():,} parameters")
pruner.save_pretrained(args.output)

# From here on nothing needs this package: the checkpoint is a Mixtral with fewer experts.
writer = pipeline("text-generation", model=args.output, tokenizer=AutoTokenizer.from_pretrained(args.output))
print(writer("SELECT name, city\nFROM", max_new_tokens=20, do_sample=False)[0]["generated_text"])
