# SPDX-License-Identifier: Apache-2.0
"""A model of bfloat16 weights calculated in float32: the numbers of the one loaded in float32, without its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from architectures.tiny import TINY, UPSTREAM, model_class, tiny_config, tiny_model
from conftest import make_model
from oracles import assert_same
from own_model import OwnConfig, OwnForCausalLM
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_moe_prune import CalibrationSet, Need
from optimum_moe_prune.architectures import table
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.evaluation.divergence import outcomes
from optimum_moe_prune.models import widened as widening
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.models.layerwise import LayerByLayer
from optimum_moe_prune.models.widened import precision_of, widened

ALWAYS = (
    "gpt_oss", "deepseek_v4", "gemma4_text", "llama4_text", "longcat_flash", "inkling_text", "granitemoehybrid",
    "jetmoe",
)  # fmt: skip
"""Fused experts with biases, identities, scaled inputs; scaled and normed embeddings, hash tables, states; unknown."""
SIZES = (1, 2**40)
"""Weights in the smallest pieces that there are, and in one."""
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def both(model_type: str, **settings: object) -> tuple[Any, Any]:
    """A model in bfloat16, and the same numbers in float32."""
    narrow = tiny_model(model_type, dtype=torch.bfloat16, **settings)
    config = tiny_config(model_type, **settings)
    wide = model_class(config)._from_config(config, dtype=torch.float32).eval()
    wide.load_state_dict(narrow.state_dict())
    return narrow, wide


def own_models() -> tuple[Any, Any]:
    """The same of a model whose experts are modules of their own."""
    torch.manual_seed(0)
    wide = OwnForCausalLM(OwnConfig(routing="linear", as_modules=True)).eval()
    for parameter in wide.parameters():
        parameter.data = parameter.data.bfloat16().float()
    narrow = OwnForCausalLM(wide.config).to(torch.bfloat16).eval()
    narrow.load_state_dict(wide.state_dict())
    return narrow, wide


def as_they_are(model: nn.Module) -> list[tuple[object, ...]]:
    """What could be left behind in modules."""
    return [
        (type(module), *sorted(module.__dict__), *(getattr(module, "num_experts", None),), *map(id, module.buffers()))
        for module in model.modules()
    ]


def assert_close(found: Tensor, expected: Tensor, rtol: float = 3e-4) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize(
    "model_type",
    [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in TINY if n not in UPSTREAM],
)
def test_the_numbers_of_the_model_in_float32(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = both(model_type)
    expected, before, own = logits(wide), logits(narrow), as_they_are(narrow)
    assert float((before.float() - expected).abs().max()) > 1e-3 * float(expected.abs().max())
    for size in SIZES:
        monkeypatch.setattr(widening, "PIECE_BYTES", size)
        with widened(narrow):
            assert narrow.dtype == torch.float32
            assert_close(logits(narrow), expected)
            assert {parameter.dtype for parameter in narrow.parameters()} >= {torch.bfloat16}
        assert as_they_are(narrow) == own and torch.equal(logits(narrow), before)


@pytest.mark.parametrize("kind", ["llama4_text", "longcat_flash", "modules"])
def test_watched_and_restricted_inside(kind: str, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """All statistics, and losses of plans, as of the model in float32; hooks of accelerate stay where they are."""
    monkeypatch.setattr(widening, "PIECE_BYTES", 1)
    known = dict(table._ROWS)
    narrow, wide = own_models() if kind == "modules" else both(kind)
    few = CalibrationSet(samples.samples[:4], samples.token_ids[:4])
    for module in (*(block.experts for block in moe_blocks(narrow)[:1]), narrow.lm_head):
        if not isinstance(module, nn.ModuleList):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    own = as_they_are(narrow)
    needs = set(Need)
    with widened(narrow):
        found = collect(narrow, few, needs, batch_size=2)
    assert_same(found, collect(wide, few, needs, batch_size=2), 1e-3)
    assert found.provenance["dtype"] == "float32" and as_they_are(narrow) == own
    block = moe_blocks(wide)[1]
    plans = [{}, {block.layer: tuple(range(0, block.num_experts, 2))}]
    runners = LayerByLayer(narrow, dtype=torch.float32), LayerByLayer(wide)
    sums, expected = (outcomes(runner, few, plans) for runner in runners)
    for name, values in sums.items():
        torch.testing.assert_close(values, expected[name], rtol=2e-3, atol=1e-4)
    assert as_they_are(narrow) == own
    table._ROWS.clear()
    table._ROWS.update(known)


def test_all_is_as_it_was_after_an_error_and_once_is_enough() -> None:
    narrow, wide = both("mixtral")
    own, expected = as_they_are(narrow), logits(wide)
    with pytest.raises(IndexError), widened(narrow):
        logits(narrow, IDS + 10**6)
    assert as_they_are(narrow) == own
    with widened(narrow), widened(narrow):
        assert_close(logits(narrow), expected)
        generated = narrow.generate(input_ids=IDS[:, :8], max_new_tokens=4, do_sample=False)
    assert as_they_are(narrow) == own
    assert torch.equal(generated, wide.generate(input_ids=IDS[:, :8], max_new_tokens=4, do_sample=False))
    with widened(wide), widened(narrow, torch.bfloat16):
        assert as_they_are(narrow) == own  # nothing to widen


class Widest(TorchDispatchMode):
    """The most numbers of a weight that were widened at once, by what bfloat16 is copied into."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        source = args[1] if "copy_" in str(func) and len(args) > 1 else args[0] if args else None
        if isinstance(source, Tensor) and isinstance(output, Tensor) and source.dtype == torch.bfloat16:
            if output.dtype == torch.float32:
                self.numbers = max(self.numbers, output.numel())
        return output


def test_memory_is_that_of_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a layer's experts nor the embeddings nor the head are ever there in float32."""
    monkeypatch.setattr(widening, "PIECE_BYTES", 4 * 3 * 32 * 24 * 2)  # two experts of the model below
    narrow = make_model("mixtral", vocab_size=4096).to(torch.bfloat16)
    with widened(narrow), Widest() as widest:
        logits(narrow)
    assert 0 < 4 * widest.numbers <= widening.PIECE_BYTES
    experts = moe_blocks(narrow)[0].experts.gate_up_proj
    assert 4 * min(experts.numel(), narrow.lm_head.weight.numel()) > 2 * widening.PIECE_BYTES


def test_embeddings_that_do_more_than_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening, "PIECE_BYTES", 1)

    class Shifted(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward((ids + 5) % self.num_embeddings)

    narrow, wide = both("mixtral")
    for model in (narrow, wide):
        model.model.embed_tokens.__class__ = Shifted
    with widened(narrow):
        assert_close(logits(narrow), logits(wide))


def test_what_cannot_be_widened_is_run_as_it_is(multiplied: Any) -> None:
    multiplied(12.0)
    assert precision_of(both("mixtral")[0]) == torch.float32
    assert precision_of(both("mixtral")[0], "float32") == torch.float32
    assert precision_of(both("mixtral")[0], "bfloat16") == torch.bfloat16
    assert precision_of(make_model("mixtral")) == precision_of(make_model("mixtral"), "bfloat16") == torch.float32
    assert precision_of(both("zaya")[0]) == torch.bfloat16  # its experts are in one tensor, and no row says how
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    ).to(torch.bfloat16)
    assert precision_of(dense) == torch.float32
    offloaded = make_model("mixtral").to(torch.bfloat16)
    cpu_offload(offloaded)
    assert precision_of(offloaded) == torch.bfloat16
