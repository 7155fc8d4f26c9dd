#!/usr/bin/env bash
# transformers 5.24.0: a GGUF file of a Mixtral is opened as a dense Llama whose feed-forward layers are random.
#
# Expected: from_pretrained(folder, gguf_file=...) opens the architecture that the file holds, as it does for Qwen3-MoE,
# or refuses it ("GGUF model with architecture ... is not supported yet"), as it does for DeepSeek.
#
# What happens: llama.cpp calls Mixtral's architecture "llama" and tells it by the key llama.expert_count. The loader
# does not read that key: it builds a LlamaForCausalLM, drops routers and experts, and initialises every mlp anew. The
# call succeeds; a table of missing keys is logged, and what the model generates is noise.
#
# Versions: transformers 5.24.0, gguf 0.19.0, torch 2.13.0.
#
# Why it matters: whoever checks a pruned or quantised Mixtral GGUF with transformers measures a random model, and may
# blame the pruning.
#
# Exit status: 0 if this is what happens, 1 if not (any more).
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes the download small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --quiet --no-compile torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import gguf
import numpy as np
from transformers import AutoModelForCausalLM

hidden, inner, experts, vocabulary = 32, 64, 4, 64
writer = gguf.GGUFWriter("mixtral.gguf", "llama")
writer.add_name("Mixtral")
writer.add_block_count(1)
writer.add_context_length(64)
writer.add_embedding_length(hidden)
writer.add_feed_forward_length(inner)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_freq_base(1e6)
writer.add_vocab_size(vocabulary)
writer.add_expert_count(experts)
writer.add_expert_used_count(2)
shapes = {
    "token_embd": (vocabulary, hidden),
    "output": (vocabulary, hidden),
    "output_norm": (hidden,),
    "blk.0.attn_norm": (hidden,),
    "blk.0.ffn_norm": (hidden,),
    **{f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")},
    "blk.0.ffn_gate_inp": (experts, hidden),
    "blk.0.ffn_gate_exps": (experts, inner, hidden),
    "blk.0.ffn_up_exps": (experts, inner, hidden),
    "blk.0.ffn_down_exps": (experts, hidden, inner),
}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", np.full(shape, 0.01, dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
model = AutoModelForCausalLM.from_pretrained(".", gguf_file="mixtral.gguf")
weight = model.model.layers[0].mlp.gate_proj.weight
print(type(model).__name__, "mlp.gate_proj", tuple(weight.shape), "different numbers:", weight.unique().numel())
sys.exit(0 if type(model).__name__ == "LlamaForCausalLM" and weight.unique().numel() > 100 else 1)
PYTHON
