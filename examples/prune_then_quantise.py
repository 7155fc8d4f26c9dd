# SPDX-License-Identifier: Apache-2.0
"""Prune, then quantise what is left (needs torchao: pip install torchao).

    python examples/prune_then_quantise.py [MODEL] [--num-experts 8] [--output OUT]

By default the small trained Qwen2-MoE of this repository. Pruning comes first: it needs the weights as they are, and a
quantised model is refused. transformers then quantises the checkpoint while it is loaded. torchao takes the linear
layers; the fused experts of transformers 5 are no linear layers and keep their precision, as the bytes printed show.
"""

import argparse
import sys
from pathlib import Path

from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, evaluate

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402


def bytes_of(model):
    """Bytes of a model's parameters, those of a quantised one included."""
    total = 0
    for parameter in model.parameters():
        inner = [getattr(parameter, name) for name in ("qdata", "scale") if hasattr(parameter, name)]
        total += sum(tensor.numel() * tensor.element_size() for tensor in inner or [parameter])
    return total


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "qwen2_moe"), help="folder or Hub id")
parser.add_argument("--num-experts", type=int, default=8, help="to retain in each layer")
parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
parser.add_argument("--output", default="pruned-for-quantising")
args = parser.parse_args()

texts = make_corpus({"train": 10, "heldout": 4})
pruner = MoEPruner.from_pretrained(
    args.model, config=MoEPrunerConfig(method="enumeration", num_experts=args.num_experts)
)
pruner.prune_checkpoint(args.output, calibration=args.calibration or texts["train"])

original = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
pruned = AutoModelForCausalLM.from_pretrained(args.output, dtype="auto")
small = AutoModelForCausalLM.from_pretrained(
    args.output, dtype="auto", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
)
heldout = pruner.samples(texts["heldout"])
for name, model in (("original", original), ("pruned", pruned), ("pruned, linear layers in int8", small)):
    figures = evaluate(model, heldout, reference=original).domains["all"]
    print(f"{name:<30}{bytes_of(model) / 1e6:8.2f} MB  perplexity {figures.perplexity:.3f}")
