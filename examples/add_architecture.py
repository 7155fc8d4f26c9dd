# SPDX-License-Identifier: Apache-2.0
"""Teach the package an architecture: one row of facts.

    python examples/add_architecture.py [allenai/OLMoE-1B-7B-0924]

By default a tiny OLMoE with random weights, made on the spot, and random token ids. The row says where a decoder layer
keeps its experts and its router; everything else (calibration, streaming, surgery, unequal layers) follows from it.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, MoESpec, list_architectures, register_architecture

if "olmoe" not in list_architectures():
    register_architecture(
        MoESpec(
            model_type="olmoe",
            block_class="OlmoeSparseMoeBlock",
            layer_class="OlmoeDecoderLayer",
            count_key="num_experts",  # in config.json
            renormalise="norm_topk_prob",  # whether chosen weights are divided by their sum: as this key says
            cast_weights=True,  # the router rounds them to the model's precision
            file_experts=(
                ("gate_proj", "intermediate_size", "hidden_size"),
                ("up_proj", "intermediate_size", "hidden_size"),
                ("down_proj", "hidden_size", "intermediate_size"),
            ),
        )
    )

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", help="an OLMoE's folder or Hub id")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    model, calibration = args.model, ["Text of every kind that the model has to stay good at.", "More of it."]
    if model is None:
        torch.manual_seed(0)
        config = OlmoeConfig(
            vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, num_experts=16, num_experts_per_tok=4, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model, calibration = Path(folder) / "olmoe", torch.randint(2, 128, (8, 32))
        OlmoeForCausalLM(config).save_pretrained(model)
    else:
        AutoTokenizer.from_pretrained(model)
    config = MoEPrunerConfig(method="enumeration", sparsity=0.5, method_options={"max_sets": 1000})
    pruner = MoEPruner.from_pretrained(model, config=config)
    pruner.prune_checkpoint(Path(folder) / "pruned", calibration=calibration)
    print(pruner.pruning_plan.summary())
    reloaded = AutoModelForCausalLM.from_pretrained(Path(folder) / "pruned")
    print(f"{type(reloaded).__name__} with {reloaded.config.num_experts} experts in each layer")
