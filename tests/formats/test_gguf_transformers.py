# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of a model, cut: transformers' own loader opens it, and it computes what the masked model computes."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import SHAPE
from tests.formats.gguf_models import quantised
from tests.oracles import masked_routers, plan_for

INNER = 768  # transformers' loader takes it from no key, so it has to be the config's default


def make_qwen() -> PreTrainedModel:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **{**SHAPE, "head_dim": 8},
            num_hidden_layers=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=INNER,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(0, 0.3)
    return model


def write_qwen(model: PreTrainedModel, path: Path, experts: Type = Type.F32) -> Path:
    """As llama.cpp's converter writes it, and its quantiser: experts alone are of another type."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 2)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for name, tensor in model.state_dict().items():
        parts = {name.replace("down_proj", "down_proj.weight") if "experts" in name else name: tensor}
        if name.endswith("gate_up_proj"):
            halves = zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True)
            parts = {f"{name.removesuffix('gate_up_proj')}{half}.weight": values for half, values in halves}
        for part, values in parts.items():
            there = names.get_name(part, try_suffixes=(".weight",))
            kind = experts if "_exps" in there else Type.F32
            data, kind = quantised(values.contiguous().numpy(), kind)
            writer.add_tensor(there, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_transformers_opens_source_and_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Type) -> None:
    source = write_qwen(model := make_qwen(), tmp_path / "a.gguf", kind)
    plan = plan_for(model, num_experts=2)
    plan.apply_to_checkpoint(source, tmp_path / "out.gguf")
    whole, pruned = (
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.float32)
        for name in ("a.gguf", "out.gguf")
    )
    assert pruned.config.num_experts == 2
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), masked_routers(whole, plan, monkeypatch):
        expected = whole(ids).logits
    with torch.no_grad():
        assert torch.allclose(pruned(ids).logits, expected, rtol=1e-5, atol=1e-5)
        if kind is Type.F32:
            assert torch.allclose(whole(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    for layer, experts in plan.retained.items():
        mine, theirs = (m.model.layers[layer].mlp.experts.down_proj for m in (pruned, whole))
        assert torch.equal(mine, theirs[list(experts)])
