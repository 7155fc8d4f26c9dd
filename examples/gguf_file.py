# SPDX-License-Identifier: Apache-2.0
"""One plan for a checkpoint and for its GGUF file (needs gguf: pip install 'optimum-moe-prune[gguf]').

    python examples/gguf_file.py [MODEL] [--num-experts 4] [--type Q8_0] [--output OUT]

MODEL is the small trained Mixtral or Qwen3-MoE of this repository; its GGUF file is made here. Of a model from the Hub
take a GGUF file that was published: only the lines from the plan on are needed. Where llama-cpp-python is installed,
llama.cpp opens the pruned file, and its logits are compared with those of the pruned checkpoint in transformers; with
experts in F32 nothing but the order of sums differs.
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, PruningPlan

HERE = Path(__file__).resolve().parent


def write_gguf(model, folder, path, experts):
    """A GGUF file of a small model, as llama.cpp's converter writes it, with experts of some type."""
    config, is_llama = model.config, model.config.model_type == "mixtral"
    architecture = gguf.MODEL_ARCH.LLAMA if is_llama else gguf.MODEL_ARCH.QWEN3MOE
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if not is_llama:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    add_tokenizer(writer, folder)
    for name, tensor in model.state_dict().items():
        for part, values in split(name, tensor.float()).items():
            there = names.get_name(part, try_suffixes=(".weight",))
            if is_llama and ".attn_q." in there:
                values = permuted(values, config.num_attention_heads)
            if is_llama and ".attn_k." in there:
                values = permuted(values, config.num_key_value_heads)
            data, kind = values.contiguous().numpy(), gguf.GGMLQuantizationType.F32
            if "_exps." in there:
                data, kind = gguf.quants.quantize(data, experts), experts
            writer.add_tensor(there, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, folder):
    """Its tokens and merges; llama.cpp splits text in its own way before."""
    values = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in values["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)


def split(name, tensor):
    """What llama.cpp holds in tensors of its own."""
    if name.endswith("gate_up_proj"):
        return dict(
            zip(
                [name.replace("gate_up", half) + ".weight" for half in ("gate", "up")], tensor.chunk(2, 1), strict=True
            )
        )
    return {name + ".weight" if name.endswith("experts.down_proj") else name: tensor}


def permuted(weight, heads):
    """Rows in the order in which llama.cpp turns the positions of a llama model."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "mixtral"), help="its folder")
parser.add_argument("--num-experts", type=int, default=4, help="to retain in each layer")
parser.add_argument("--type", default="F32", help="of the experts in the GGUF file: F32, F16, Q8_0, Q4_0 ...")
parser.add_argument("--output", type=Path, default=Path("pruned-gguf"))
args = parser.parse_args()

args.output.mkdir(parents=True, exist_ok=True)
original, pruned = args.output / "original.gguf", args.output / "pruned.gguf"
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
write_gguf(model, args.model, original, gguf.GGMLQuantizationType[args.type])

config = MoEPrunerConfig(method="aimer", num_experts=args.num_experts)  # by weights alone: no text is needed
MoEPruner.from_pretrained(args.model, config=config).prune_checkpoint(args.output / "pruned")

plan = PruningPlan.load(args.output / "pruned")
plan.apply_to_checkpoint(original, pruned)
for path in (original, pruned):
    count = gguf.GGUFReader(path).get_field(f"{'llama' if 'mixtral' in plan.model_type else 'qwen3moe'}.expert_count")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {count.contents()} experts in each layer")

try:
    from llama_cpp import Llama
except ImportError:
    print("llama-cpp-python is not installed: logits were not compared")
else:
    ids = list(range(100, 160))
    llama = Llama(str(pruned), n_ctx=64, logits_all=True, type_k=0, type_v=0, verbose=False)  # a cache in float32
    llama.eval(ids)
    found = np.array(llama.scores[: len(ids)])
    llama.close()
    small = AutoModelForCausalLM.from_pretrained(args.output / "pruned", dtype=torch.float32)
    with torch.no_grad():
        expected = small(torch.tensor([ids])).logits[0].numpy()
    apart = np.abs(found - expected).max()
    print(f"llama.cpp and transformers differ by {apart:.2g} at most in logits up to {np.abs(expected).max():.0f}")
