#!/usr/bin/env bash
# transformers 5.24.0 dequantises block-scaled FP8 weights with blocks of the wrong size.
#
# Expected: a checkpoint says in quantization_config that each scale belongs to a block of 128 x 128 values
# (weight_block_size). The last block of a row or column is smaller where 128 does not divide the dimension: 576 rows
# have 5 rows of scales, of which the last is for 64 rows. DeepSeek-V3 is published so (kv_a_proj_with_mqa: 576 rows).
#
# What happens: from_pretrained(..., FineGrainedFP8Config(dequantize=True)), which is also what happens of itself where
# there is no suitable GPU, does not ask weight_block_size. It divides the rows by the rows of scales.
#   576 rows, 5 rows of scales: 576 is not divisible by 5, and the model cannot be loaded.
#   192 rows, 2 rows of scales: it takes blocks of 96. Rows 96 to 127 get the scale of rows 128 to 191. No error and no
#   warning; the weights are wrong.
#
# Versions: torch 2.13.0, transformers 5.24.0, accelerate 1.15.0.
#
# Why it matters: whoever prunes, fine-tunes or evaluates such a model on plain numbers has to dequantise it first.
# Either that stops, or one matrix in each layer is off by several times the rounding error of FP8, and any comparison
# of the smaller model with the original is one with a damaged original.
#
# Exit status: 0 if this is what happens, 1 if not (any more). On Linux without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes the download small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --quiet --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat > finding.py <<'PYTHON'
import io
import json
import logging
import sys
from pathlib import Path

import accelerate
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, FineGrainedFP8Config

BLOCK = 128
MATRIX = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
transformers.utils.logging.disable_progress_bar()
said = io.StringIO()
logging.getLogger("transformers").addHandler(logging.StreamHandler(said))
logging.getLogger("transformers").propagate = False
for handler in list(logging.getLogger("transformers").handlers)[:-1]:
    logging.getLogger("transformers").removeHandler(handler)


def quantised(weight):
    """FP8 values, the scale of each block, and the plain numbers these stand for."""
    grid = [-(-size // BLOCK) for size in weight.shape]
    values, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(grid)
    plain = torch.empty_like(weight)
    for row in range(grid[0]):
        for column in range(grid[1]):
            block = tuple(slice(place * BLOCK, (place + 1) * BLOCK) for place in (row, column))
            scales[row, column] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scales[row, column]).to(torch.float8_e4m3fn)
            plain[block] = values[block].float() * scales[row, column]
    return values, scales, plain


def checkpoint(folder, kv_lora_rank):
    """A small DeepSeek-V3 whose attention is quantised; the weights as they were, and what the files stand for."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=1,
        first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=128, kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():  # rows of different size, as trained ones are
        matrix = model.get_parameter(MATRIX)
        matrix.mul_(torch.linspace(1, 30, len(matrix))[:, None])
    model.save_pretrained(folder)
    file = next(Path(folder).glob("*.safetensors"))
    tensors, was, means = load_file(file), {}, {}
    for name in [name for name in tensors if name.endswith("weight") and "_proj" in name]:
        was[name] = tensors[name]
        tensors[name], tensors[f"{name}_scale_inv"], means[name] = quantised(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    settings = Path(folder, "config.json")
    values = json.loads(settings.read_text())
    values["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
    }  # fmt: skip
    settings.write_text(json.dumps(values))
    return was, means, list(tensors[f"{MATRIX}_scale_inv"].shape)


def load(folder):
    dequantise = FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK))
    return DeepseekV3ForCausalLM.from_pretrained(folder, quantization_config=dequantise, dtype=torch.float32)


def error(found, right):
    return float((found.float() - right).norm() / right.norm())


print(f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}")
holds = True

was, means, grid = checkpoint("a", kv_lora_rank=128)
said.truncate(0)
loaded = load("a").state_dict()
print(f"\n{list(was[MATRIX].shape)} values, {grid} scales, blocks of 128: loads. Relative error of each matrix:")
for name in was:
    by_blocks, by_library = error(means[name], was[name]), error(loaded[name], was[name])
    print(f"  {name:58} blocks of 128: {by_blocks:.3f}   transformers: {by_library:.3f}")
    wrong = by_library > 4 * by_blocks
    holds &= wrong == (name == MATRIX)
warned = [word for word in ("block", "scale", "Error", MATRIX) if word in said.getvalue()]
print(f"  warnings about it: {warned or 'none'}")
holds &= not warned
off = (loaded[MATRIX] - means[MATRIX]).abs().amax(1) > 1e-6
rows = off.nonzero().flatten()
print(f"  rows that are wrong: {int(rows.min())} to {int(rows.max())}, {len(rows)} of them" if len(rows) else "  none")
holds &= rows.tolist() == list(range(96, 128))

was, means, grid = checkpoint("b", kv_lora_rank=512)
said.truncate(0)
print(f"\n{list(was[MATRIX].shape)} values, {grid} scales, blocks of 128 (rows as in DeepSeek-V3):")
try:
    load("b")
    print("  loads")
    holds = False
except RuntimeError as stopped:
    reason = [line for line in said.getvalue().splitlines() if "not divisible by scale grid" in line]
    print(f"  RuntimeError: {stopped}\n  {reason[0] if reason else said.getvalue()}")
    holds &= bool(reason)

print("\nAs stated." if holds else "\nNOT as stated (any more).")
sys.exit(not holds)
PYTHON
"$folder/venv/bin/python" finding.py
