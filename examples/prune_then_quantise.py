# SPDX-License-Identifier: Apache-2.0
"""Prune, then quantise what is left, experts included (needs torchao: pip install torchao).

    python examples/prune_then_quantise.py [MODEL] [--num-experts 8] [--weights int8|float8] [--output OUT]

By default the small trained Qwen2-MoE of this repository. Pruning comes first: experts are chosen with the weights as
they are, and a quantised model is not calibrated with. transformers then quantises the checkpoint while it is loaded,
twice here: by torchao's defaults, which take linear layers and so leave the fused experts of transformers 5, most of
all parameters, as they are; and by name, which takes the experts. That one is saved and loaded again. What was
quantised, the bytes and what was lost are counted, not assumed.

Experts in int8 run with ``experts_implementation="eager"`` alone, in float8 with others as well (torchao 0.18).
"""

import argparse
import sys
import warnings
from pathlib import Path

from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, TorchAoConfig

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, evaluate

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

BY_NAME = (r"re:.*\.experts\.(gate_up_proj|down_proj)", r"re:.*_proj\.weight")
"""Fused experts; linear layers of attention, shared experts and dense layers. Routers and embeddings stay."""


def parts_of(parameter):
    """The tensors that a parameter is made of: a quantised one's numbers, scales and zero points."""
    if not isinstance(parameter.data, TorchAOBaseTensor):
        return [parameter]
    names = [*parameter.tensor_data_names, *getattr(parameter, "optional_tensor_data_names", [])]
    return [part for name in names if (part := getattr(parameter, name)) is not None]


def described(name, model, samples, reference):
    """Share of parameters that are quantised, of all and of experts; bytes; nats a token on held-out text."""
    figures = evaluate(model, samples, reference=reference).domains["all"]
    total, quantised, nbytes = [0, 0], [0, 0], 0
    for path, parameter in model.named_parameters():
        for group in (0, 1) if ".experts." in path else (0,):
            total[group] += parameter.numel()
            quantised[group] += parameter.numel() * isinstance(parameter.data, TorchAOBaseTensor)
        nbytes += sum(part.numel() * part.element_size() for part in parts_of(parameter))
    every, experts = (f"{part / whole:.0%}" for part, whole in zip(quantised, total, strict=True))
    size = f"{nbytes / 1e6:.2f} MB"
    print(f"{name:<32} {every:>4} quantised, {experts:>4} of experts {size:>12} {figures.loss:8.4f} nats")


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "qwen2_moe"), help="folder or Hub id")
parser.add_argument("--num-experts", type=int, default=8, help="to retain in each layer")
parser.add_argument("--weights", choices=["int8", "float8"], default="int8")
parser.add_argument("--heldout", type=int, default=4, help="texts of each domain that are judged")
parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
parser.add_argument("--output", default="pruned-for-quantising", help="and the quantised one beside it")
args = parser.parse_args()
warnings.filterwarnings("ignore", module="torchao|transformers")

texts = make_corpus({"train": 10, "heldout": args.heldout})
pruner = MoEPruner.from_pretrained(
    args.model, config=MoEPrunerConfig(method="enumeration", num_experts=args.num_experts)
)
pruner.prune_checkpoint(args.output, calibration=args.calibration or texts["train"])
heldout = pruner.samples(texts["heldout"])


def load(folder, config=None):
    more = {} if config is None else {"quantization_config": TorchAoConfig(config)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager", **more)


kind = Int8WeightOnlyConfig() if args.weights == "int8" else Float8WeightOnlyConfig()
original = load(args.model)
by_name = load(args.output, FqnToConfig(dict.fromkeys(BY_NAME, kind)))
quantised = f"{args.output}-{args.weights}"
by_name.save_pretrained(quantised)
pruner.tokenizer.save_pretrained(quantised)

described("original", original, heldout, original)
described("pruned", load(args.output), heldout, original)
described(f"pruned, linear layers in {args.weights}", load(args.output, kind), heldout, original)
described(f"pruned, experts in {args.weights} as well", by_name, heldout, original)
described("the same, saved and loaded again", load(quantised), heldout, original)
