# SPDX-License-Identifier: Apache-2.0
"""The last matrix of an expert, and what goes into it, whatever the model's experts look like."""

from __future__ import annotations

import pytest
import torch
from architectures.tiny import tiny_model
from own_model import OwnConfig, OwnForCausalLM
from torch import Tensor

from optimum_moe_prune.architectures.structure import part
from optimum_moe_prune.models.blocks import MoEBlock, moe_blocks
from optimum_moe_prune.models.down import Down, SingleExpert, down_projection
from optimum_moe_prune.models.widened import widened

# fused, of one token's expert and more; transposed with biases; scores on the input; no gate; two experts at least
KINDS = ("mixtral", "gpt_oss", "llama4_text", "nemotron_h", "longcat_flash", "granitemoe", "gemma4_text", "own")


def block_of(kind: str) -> MoEBlock:
    if kind == "own":
        torch.manual_seed(0)
        return moe_blocks(OwnForCausalLM(OwnConfig(as_modules=True)).eval())[-1]
    return moe_blocks(tiny_model(kind))[-1]


def matrix(block: MoEBlock, down: Down, expert: int) -> Tensor:
    """``(I, H)``."""
    if block.structure.numbered:
        found = part(block.experts[expert], down.path)
    else:
        found = part(block.decoder_layer, down.path)[expert]
    return found if down.transposed else found.T


@pytest.mark.parametrize("kind", KINDS)
def test_features_times_the_matrix_are_the_output(kind: str) -> None:
    """Of many tokens: some kernels sort the rows of an expert, and not stably."""
    block = block_of(kind)
    down = down_projection(block)
    assert down is not None
    single = SingleExpert(block, 1)
    width = int(matrix(block, down, 1).shape[1])
    x = torch.randn(2000, width, generator=torch.Generator().manual_seed(1))
    if single.scored:
        x = torch.cat([x, torch.rand(2000, block.num_experts)], dim=1)
    with torch.no_grad():
        features, output = single.features(x, down)
        bias = output - features @ matrix(block, down, 1)
    assert features.shape == (2000, down.width)
    assert (bias - bias[0]).abs().max() < 1e-4  # the same for every token
    assert (kind == "gpt_oss") == bool(bias[0].abs().max() > 1e-3)


def test_an_output_that_is_not_linear_has_none() -> None:
    """Muse Spark normalises what each expert gives."""
    assert down_projection(block_of("muse_spark")) is None


def test_what_stands_in_for_the_experts_is_left_alone() -> None:
    """A single expert is a copy: of a model whose experts are widened, watched or hooked as well."""
    model = tiny_model("mixtral", dtype=torch.bfloat16)
    block = moe_blocks(model)[0]
    down = down_projection(block)
    assert down is not None
    x = torch.randn(7, 32)
    with torch.no_grad():
        plain, _ = SingleExpert(block, 2).features(x, down)
        with widened(model), block.observed(lambda logits: None, lambda own, *args: own(*args)):
            single = SingleExpert(block, 2)
            features, _ = single.features(x, down)
    assert torch.equal(plain, features)
    assert single.module.config is not block.experts.config
    assert single.module.config._experts_implementation == "eager" != block.experts.config._experts_implementation
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.parameters())
