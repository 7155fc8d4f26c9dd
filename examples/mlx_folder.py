# SPDX-License-Identifier: Apache-2.0
"""One plan, two forms: a checkpoint for mlx-lm, and an MLX folder in 4 bits (needs mlx-lm: pip install "mlx-lm[cpu]").

    python examples/mlx_folder.py [MODEL] [--num-experts 4] [--output FOLDER]

By default the small trained Mixtral of this repository. The plan is made with the original; mlx_lm.convert makes the
4-bit folder of it, as people have it who run models on a Mac. The plan cuts both, nothing is quantised anew, and
mlx-lm opens both. At the end stands what the cut lost in each, in nats per token of held-out text.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx_lm import convert, generate, load
from transformers import AutoTokenizer

from optimum_moe_prune import MoEPruner, MoEPrunerConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402


def loss(model, tokenizer, texts):
    """Nats per token, of texts one by one."""
    total, tokens = 0.0, 0
    for text in texts:
        ids = mx.array([tokenizer.encode(text["text"])[:128]])
        logits = model(ids[:, :-1]).astype(mx.float32)
        total += nn.losses.cross_entropy(logits, ids[:, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "mixtral"), help="folder or Hub id")
parser.add_argument("--num-experts", type=int, default=4, help="to retain in each layer")
parser.add_argument("--output", type=Path, help="keep what is written in this folder (default: a temporary one)")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as scratch:
    output = args.output or Path(scratch)
    texts = make_corpus({"train": 5, "heldout": 1})
    config = MoEPrunerConfig(method="enumeration", num_experts=args.num_experts, target="mlx")
    pruner = MoEPruner.from_pretrained(args.model, config=config)
    pruner.prune_checkpoint(output / "pruned", calibration=texts["train"])

    convert(args.model, str(output / "four-bits"), quantize=True, q_bits=4, q_group_size=32)
    pruner.pruning_plan.apply_to_checkpoint(output / "four-bits", output / "four-bits-pruned")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for name in ("pruned", "four-bits", "four-bits-pruned"):
        model, _ = load(str(output / name))
        model.set_dtype(mx.float32)  # on a CPU mlx multiplies experts in no other, unless they are quantised
        size = sum(path.stat().st_size for path in (output / name).glob("model*.safetensors"))
        print(f"{name:<18}{size / 1e6:6.2f} MB  {loss(model, tokenizer, texts['heldout']):.3f} nats per token")
    print(generate(model, load(str(output / name))[1], prompt="Compute 37 * 20 + 86.\n", max_tokens=12))
