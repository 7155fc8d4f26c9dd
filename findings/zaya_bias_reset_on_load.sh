#!/usr/bin/env bash
# transformers 5.24.0: from_pretrained puts a constant in place of one trained number per router of a Zaya model.
#
# Expected: what a checkpoint holds is what the loaded model has. from_pretrained fills in what the files lack, and
# nothing else.
#
# What happens: each router of a Zaya model has balancing_biases, one number for each expert and one for "no expert",
# added before the choice. The last number is -1.0 after every from_pretrained, whatever the file holds; the others
# are read. No message. A model that is saved and loaded again is another model: more or fewer tokens skip the layer.
# The step that initialises missing weights writes the last number directly, past the mark of tensors that were loaded.
#
# Versions: torch 2.13.0, transformers 5.24.0.
#
# Why it matters: a balancing bias is trained or adapted precisely so that it does not stay at its start. Whoever
# changes routers (pruning, re-balancing, fine-tuning) and saves gets back other routing than was measured, and sees it
# neither in the files, which are right, nor in a list of missing or unexpected weights.
#
# Exit status: 0 if this is what happens, 1 if not (any more). On Linux without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes the download small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --quiet --no-compile torch==2.13.0 transformers==5.24.0
cd "$folder"
cat > finding.py <<'PYTHON'
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
config = AutoConfig.for_model(
    "zaya", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=1, router_hidden_size=24,
    layer_types=["hybrid", "hybrid_sliding"], sliding_window=8, max_position_embeddings=128, initializer_range=0.3,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config).eval()
names = [name for name, _ in model.named_buffers() if name.endswith("balancing_biases")]
trained = torch.tensor([0.02, -0.01, 0.03, 0.01, 0.05])  # a small bias for each expert, and for "no expert"
for name in names:
    model.get_buffer(name).copy_(trained)
model.save_pretrained("saved")
in_file = load_file(next(Path("saved").glob("*.safetensors")))
loaded, report = AutoModelForCausalLM.from_pretrained("saved", output_loading_info=True)
loaded.eval()

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
as_list = lambda tensor: [round(float(value), 4) for value in tensor]  # noqa: E731
holds = bool(names)
for name in names:
    print(f"{name}\n  saved  {as_list(in_file[name])}\n  loaded {as_list(loaded.get_buffer(name))}")
    holds &= torch.equal(in_file[name], trained)
    holds &= torch.equal(loaded.get_buffer(name)[:-1], trained[:-1]) and loaded.get_buffer(name)[-1] == -1
others = {
    name for name, tensor in model.state_dict().items() if not torch.equal(tensor, loaded.state_dict()[name])
} - set(names)  # fmt: skip
print(f"other weights that changed: {sorted(others) or 'none'}")
complaints = {key: sorted(map(str, value)) for key, value in report.items() if value}
print(f"what from_pretrained reports: {complaints or 'nothing'}")
ids = torch.randint(3, 96, (4, 32))
with torch.no_grad():
    before, after = model(ids).logits, loaded(ids).logits
print(f"largest change of a logit: {float((before - after).abs().max()):.3f} of {float(before.abs().max()):.3f}")
holds &= not others and not complaints and not torch.allclose(before, after, atol=1e-3)

print("\nAs stated." if holds else "\nNOT as stated (any more).")
sys.exit(not holds)
PYTHON
"$folder/venv/bin/python" finding.py
