# SPDX-License-Identifier: Apache-2.0
"""Prune a checkpoint that does not fit in memory: one layer is held at a time, files are rewritten as bytes.

    python examples/larger_than_memory.py [mistralai/Mixtral-8x22B-v0.1] [--sparsity 0.5] [--output OUT]

By default the small trained Qwen2-MoE of this repository, and text made on the spot. Interrupt it and run it again: it
goes on after the last finished layer.
"""

import argparse
import resource
import sys
from pathlib import Path

from optimum_moe_prune import MoEPruner, MoEPrunerConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "qwen2_moe"), help="folder or Hub id")
parser.add_argument("--method", default="mosaic")
parser.add_argument("--sparsity", type=float, default=0.5)
parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
parser.add_argument("--output", default="pruned")
args = parser.parse_args()

config = MoEPrunerConfig(method=args.method, sparsity=args.sparsity, num_samples=60)
pruner = MoEPruner.from_pretrained(args.model, config=config)
texts = args.calibration or make_corpus({"train": 10})["train"]
pruner.prune_checkpoint(args.output, calibration=texts, stream=True)

print(pruner.pruning_plan.summary())
size = sum(path.stat().st_size for path in Path(args.output).glob("*.safetensors"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"{args.output}: {size / 1e9:.3g} GB of weights; the most memory this process had: {peak / 1e9:.3g} GB")
