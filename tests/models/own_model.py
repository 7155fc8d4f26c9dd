# SPDX-License-Identifier: Apache-2.0
"""Models of nobody's: a decoder whose blocks route and hold experts in every way that a config names.

The file is code that comes with a checkpoint as well: tests copy it into folders.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class OwnConfig(PreTrainedConfig):
    model_type = "own_moe"

    def __init__(
        self,
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        num_experts=8,
        num_experts_per_tok=2,
        routing="softmax",
        as_modules=False,
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
        dense_layers=(),
        max_position_embeddings=64,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.routing = routing
        self.as_modules = as_modules
        self.routed_scaling_factor = routed_scaling_factor
        self.n_group = n_group
        self.topk_group = topk_group
        self.dense_layers = list(dense_layers)
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class OwnMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class OwnRouter(nn.Module):
    """Logits, ids, weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.weight = nn.Parameter(torch.randn(config.num_experts, config.hidden_size) * 0.3)
        if config.routing in ("sigmoid", "groups"):
            self.register_buffer("e_score_correction_bias", torch.randn(config.num_experts) * 0.1)
        if config.routing == "cubed":
            self.other = nn.Linear(config.hidden_size, 16, bias=False)

    def forward(self, x):
        x = x.view(-1, x.shape[-1])
        logits = functional.linear(x, self.weight)
        if self.config.routing == "softmax":
            weights, ids = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
            return logits, ids, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)
        if self.config.routing == "cubed":  # of logits below the median those far away count more
            ids = (logits - logits.mean(-1, keepdim=True)).pow(2).topk(self.top_k, dim=-1).indices
            return logits, ids, self.other(x).sigmoid()[:, : self.top_k]
        scores = logits.float().sigmoid()
        key = scores + self.e_score_correction_bias
        if self.config.routing == "groups":
            by_group = key.view(len(key), self.config.n_group, -1)
            best = by_group.topk(2, dim=-1).values.sum(-1).topk(self.config.topk_group, dim=-1).indices
            taken = torch.zeros(by_group.shape[:2], dtype=torch.bool).scatter_(1, best, True)
            key = by_group.masked_fill(~taken[..., None], float("-inf")).flatten(1)
        ids = key.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config.routed_scaling_factor
        return logits, ids, weights.to(logits.dtype)


class OwnExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        shape = (config.num_experts, 2 * config.intermediate_size, config.hidden_size)
        self.gate_up_proj = nn.Parameter(torch.randn(shape) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(shape[0], shape[2], config.intermediate_size) * 0.3)

    def forward(self, x, ids, weights):
        output = torch.zeros_like(x)
        for expert in range(self.num_experts):
            rows, slots = (ids == expert).nonzero(as_tuple=True)
            gate, up = functional.linear(x[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = functional.linear(functional.silu(gate) * up, self.down_proj[expert])
            output.index_add_(0, rows, (y * weights[rows, slots, None]).to(output.dtype))
        return output


class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = OwnRouter(config)
        self.experts = OwnExperts(config)

    def forward(self, x):
        _, ids, weights = self.gate(x)
        return self.experts(x.view(-1, x.shape[-1]), ids, weights).view(x.shape)


class OwnModulesBlock(nn.Module):
    """As code for transformers 4: experts are modules, called one by one; the router is a matrix of the block."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([OwnMLP(config) for _ in range(config.num_experts)])
        self.shared = OwnMLP(config)

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        logits = self.gate(hidden_states)
        weights, chosen = functional.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(hidden_states.dtype)
        mask = functional.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        final = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            slot, rows = torch.where(mask[number])
            current = hidden_states[None, rows].reshape(-1, width)
            final.index_add_(0, rows, self.experts[number](current) * weights[rows, slot, None])
        return (final + self.shared(hidden_states)).view(batch, length, width), logits


class OwnGate(nn.Module):
    """As DeepSeek's own code: a module that gives ids and weights."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.randn(config.num_experts, config.hidden_size) * 0.3)
        self.e_score_correction_bias = nn.Parameter(torch.randn(config.num_experts) * 0.1)

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        scores = functional.linear(x.type(torch.float32), self.weight.type(torch.float32), None).sigmoid()
        ids = (scores + self.e_score_correction_bias.unsqueeze(0)).topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scale


class OwnInferBlock(nn.Module):
    """As DeepSeek's own code: tokens are sorted by expert, and each expert gets a slice of them."""

    def __init__(self, config):
        super().__init__()
        self.experts_per_rank = config.num_experts
        self.gate = OwnGate(config)
        self.experts = nn.ModuleList([OwnMLP(config) for _ in range(config.num_experts)])
        self.shared_experts = OwnMLP(config)

    def forward(self, hidden_states):
        ids, weights = self.gate(hidden_states)
        x = hidden_states.view(-1, hidden_states.shape[-1])
        y = self.moe_infer(x, ids, weights).view(*hidden_states.shape)
        return y + self.shared_experts(hidden_states)

    @torch.no_grad()
    def moe_infer(self, x, ids, weights):
        tokens = ids.new_zeros((ids.shape[0], len(self.experts))).scatter_(1, ids, 1).sum(dim=0)
        order = ids.view(-1).argsort()
        given = x[order // ids.shape[1]]
        outputs, start = [], 0
        for number, count in enumerate(tokens.tolist()):
            if count:
                outputs.append(self.experts[number](given[start : start + count]))
                start += count
        whole = torch.empty_like(given)
        whole[order] = torch.cat(outputs)
        return (whole.view(*ids.shape, -1).type(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1).type(x.dtype)


class OwnLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        kinds = {"linear": OwnModulesBlock, "infer": OwnInferBlock}
        kind = kinds.get(config.routing, OwnBlock)
        self.mlp = OwnMLP(config) if layer_idx in config.dense_layers else kind(config)
        self.returns_tuples = config.as_modules

    def forward(self, hidden_states, attention_mask=None):
        mixed = hidden_states + hidden_states.cumsum(1) / (1 + torch.arange(hidden_states.shape[1])[:, None])
        output = self.mlp(self.norm(mixed))
        output = hidden_states + (output[0] if isinstance(output, tuple) else output)
        return (output,) if self.returns_tuples else output


class OwnPreTrainedModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0, 0.3)


class OwnModel(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OwnLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            outputs = layer(hidden_states, attention_mask=attention_mask)
            hidden_states = outputs[0] if self.config.as_modules else outputs
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))


class OwnForCausalLM(OwnPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden_states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))
