# SPDX-License-Identifier: Apache-2.0
"""An adapter follows the cut (needs peft: pip install "optimum-moe-prune[peft]").

    python examples/adapters.py [MODEL] [--num-experts 6] [--steps 40] [--output OUT]

A LoRA of experts, routers and attention teaches the small Mixtral, in a few steps, to read capital letters. Then one
plan prunes the model and cuts the adapter, which loads on the pruned model and does there what it did before.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, evaluate

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "mixtral"), help="folder or Hub id")
parser.add_argument("--num-experts", type=int, default=6, help="to retain in each layer")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--samples", type=int, default=40, help="of each domain")
parser.add_argument("--output", type=Path, default=Path("adapters"), help="three folders are made in it")
args = parser.parse_args()

texts = make_corpus({"train": args.samples, "heldout": -(-args.samples // 8)})
capitals = {split: [{**text, "text": text["text"].upper()} for text in some] for split, some in texts.items()}
pruner = MoEPruner.from_pretrained(
    args.model, config=MoEPrunerConfig(method="enumeration", num_experts=args.num_experts)
)
heldout = pruner.samples(capitals["heldout"])

# The adapter, trained on the original. all-linear reaches experts and routers of a Mixtral; of other families they are
# named: target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"].
torch.manual_seed(0)
original = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
model = get_peft_model(original, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
for step in range(args.steps):
    text = capitals["train"][7 * step % len(capitals["train"])]["text"]
    ids = pruner.tokenizer(text, truncation=True, max_length=256, return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(args.output / "adapter")

# One plan cuts both.
stats = pruner.calibrate(calibration=texts["train"])
plan = pruner.plan(stats)
plan.apply_to_checkpoint(args.model, args.output / "pruned")
plan.apply_to_checkpoint(args.output / "adapter", args.output / "adapter-cut", base_model=args.output / "pruned")


def loss(folder, adapter=None):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    return evaluate(loaded, heldout).domains["all"].loss


for name, folder, adapter in (("original", args.model, "adapter"), ("pruned", args.output / "pruned", "adapter-cut")):
    adapter = args.output / adapter
    size = (adapter / "adapter_model.safetensors").stat().st_size / 1e6
    with_it = loss(folder, adapter)
    print(f"{name:<9} {loss(folder):.3f} nats a token, with its adapter ({size:.2f} MB) {with_it:.3f}")
