# SPDX-License-Identifier: Apache-2.0
"""Teach the package an architecture: one row of facts.

    python examples/add_architecture.py

The model is one of this file: an OLMoE whose routers score experts by sigmoids, choose with a bias and weigh without.
The row says how its routers choose, which no shape tells; where it has its experts, what has to be cut and what counts
them is found. (Without a row the rule is found by trial as well, and layers then keep the same number of experts.)
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, OlmoeConfig
from transformers.models.olmoe import modeling_olmoe

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, MoESpec, register_architecture
from optimum_moe_prune.architectures.rules import Form

# ------------------------------------------------------------------------------------------- a model of one's own


class SigmoidConfig(OlmoeConfig):
    model_type = "sigmoid_olmoe"


class SigmoidRouter(modeling_olmoe.OlmoeTopKRouter):
    def __init__(self, config):
        super().__init__(config)
        self.choice_bias = nn.Buffer(torch.zeros(self.num_experts))

    def forward(self, hidden_states):
        logits = functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        scores = logits.float().sigmoid()
        chosen = torch.topk(scores + self.choice_bias.float(), self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        return logits, (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), chosen


class SigmoidForCausalLM(modeling_olmoe.OlmoeForCausalLM):
    config_class = SigmoidConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.gate = SigmoidRouter(config)
        self.post_init()


AutoConfig.register("sigmoid_olmoe", SigmoidConfig)
AutoModelForCausalLM.register(SigmoidConfig, SigmoidForCausalLM)

# ------------------------------------------------------------------------------------------- its row

register_architecture(
    MoESpec(
        model_type="sigmoid_olmoe",
        form=Form(score="sigmoid", bias="choice_bias"),  # weights are divided by their sum, as is the default
    )
)

with tempfile.TemporaryDirectory() as folder:
    torch.manual_seed(0)
    config = SigmoidConfig(
        vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, num_experts=16, num_experts_per_tok=4, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    SigmoidForCausalLM(config).save_pretrained(Path(folder) / "whole")
    recipe = MoEPrunerConfig(method="enumeration", sparsity=0.5, method_options={"max_sets": 1000})
    pruner = MoEPruner.from_pretrained(Path(folder) / "whole", config=recipe)
    pruner.prune_checkpoint(Path(folder) / "pruned", calibration=torch.randint(2, 128, (8, 32)))
    print(pruner.pruning_plan.summary())
    reloaded = AutoModelForCausalLM.from_pretrained(Path(folder) / "pruned")
    print(f"{type(reloaded).__name__} with {reloaded.config.num_experts} experts in each layer")
