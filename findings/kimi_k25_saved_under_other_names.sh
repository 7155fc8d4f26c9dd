#!/usr/bin/env bash
# transformers 5.24.0: load a Kimi-K2.5 checkpoint, save it unchanged, and its tensors have other names.
#
# Expected: save_pretrained writes the names that from_pretrained read. transformers undoes its renamings on saving.
#
# What happens: Kimi-K2.5 is published with language_model.model.layers.N... Loading takes these names. Saving the
# same model writes language_model.model.blocks.N... The renaming "blocks" to "layers" is meant for the vision part
# alone and is not tied to it; its reverse catches the language model. transformers reads its own file again, so a
# round trip within it looks right.
#
# Versions: torch 2.13.0, transformers 5.24.0.
#
# Why it matters: serving programs, converters and quantisers look for the published names. A model that was pruned or
# fine-tuned and saved with save_pretrained has not one decoder layer for them, although config.json is as before.
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
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
text = {
    "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40,
    "moe_intermediate_size": 24, "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
vision = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
    "pos_emb_height": 4, "pos_emb_width": 4,
}  # fmt: skip
config = AutoConfig.for_model(
    "kimi_k25", text_config=text, vision_config=vision, projection_hidden_size=16, image_token_id=60,
    tie_word_embeddings=False,
)  # fmt: skip
AutoModelForImageTextToText.from_config(config).save_pretrained("base")


def tensors(folder):
    return load_file(next(Path(folder).glob("*.safetensors")))


# A checkpoint with the names of the published one.
OURS, PUBLISHED = "language_model.model.blocks.", "language_model.model.layers."
shutil.copytree("base", "published")
renamed = {name.replace(OURS, PUBLISHED): tensor for name, tensor in tensors("base").items()}
save_file(renamed, next(Path("published").glob("*.safetensors")), metadata={"format": "pt"})

model, report = AutoModelForImageTextToText.from_pretrained("published", output_loading_info=True)
complaints = {key: value for key, value in report.items() if value}
model.save_pretrained("saved")
again, report_again = AutoModelForImageTextToText.from_pretrained("saved", output_loading_info=True)
same = all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())

before, after = set(tensors("published")), set(tensors("saved"))
lost = sorted(name for name in before - after if name.startswith(PUBLISHED))
new = sorted(name for name in after - before if name.startswith(OURS))
layers = sorted(name for name in before if name.startswith(PUBLISHED))
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print(f"published names: loading reports {complaints or 'nothing'}")
print(f"decoder layers: {len(layers)} tensors before; {len(lost)} of these names are gone after saving")
for gone, come in list(zip(lost, new))[-3:]:
    print(f"  {gone}\n    is now {come}")
reads_own = "yes" if same and not any(report_again.values()) else "no"
print(f"transformers reads its own file again: {reads_own}")
holds = not complaints and bool(layers) and lost == layers and len(new) == len(layers) and reads_own == "yes"

print("\nAs stated." if holds else "\nNOT as stated (any more).")
sys.exit(not holds)
PYTHON
"$folder/venv/bin/python" finding.py
