# SPDX-License-Identifier: Apache-2.0
"""A pruned model as the draft of its original: the original's own output, in fewer of its forward passes.

    python examples/draft.py [MODEL] [--sparsity 0.25] [--output OUT]

By default the small trained Mixtral of this repository. Prunes it, generates with both, and measures how many tokens
the original takes in a forward pass, by domain. How much faster that is depends on what a pass of each costs: here
both are small and in memory, and nothing is gained; where the draft fits an accelerator and the original does not, a
pass of the draft is nearly free.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, compare

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "mixtral"), help="folder or Hub id")
parser.add_argument("--sparsity", type=float, default=0.25, help="fraction of the experts to remove")
parser.add_argument("--output", default="mixtral-draft")
args = parser.parse_args()

texts = make_corpus({"train": 6, "heldout": 1})
pruner = MoEPruner.from_pretrained(
    args.model, config=MoEPrunerConfig(method="reap", allocation="global", sparsity=args.sparsity)
)
pruner.prune_checkpoint(args.output, calibration=texts["train"])

tokenizer = AutoTokenizer.from_pretrained(args.model)
original = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
draft = AutoModelForCausalLM.from_pretrained(args.output, dtype="float32")
prompt = tokenizer("SELECT name, city\nFROM", return_tensors="pt")
alone = original.generate(**prompt, max_new_tokens=30, do_sample=False)
together = original.generate(**prompt, max_new_tokens=30, do_sample=False, assistant_model=draft)
print(tokenizer.decode(together[0]))
print("the same as alone" if alone.tolist() == together.tolist() else "other tokens: these tie within rounding")

print(compare(draft, texts["heldout"], reference=original, draft=True, new_tokens=16).summary())
