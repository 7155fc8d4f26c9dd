# SPDX-License-Identifier: Apache-2.0
"""The tiny models are what the other tests take them for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures.tiny import EXPERTS, TINY, UPSTREAM, tiny_config, tiny_model
from torch import nn
from transformers import PreTrainedModel

BUILT = [name for name in TINY if name not in UPSTREAM]


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def choices(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of every layer with experts: the expert numbers it called them with."""
    found: list[torch.Tensor] = []

    def called(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs) == 1:  # llama4 scales the input of every expert, with zero for those that were not chosen
            found.append(inputs[0].view(EXPERTS, -1, inputs[0].shape[-1]).abs().sum(-1).T.nonzero()[:, 1])
        elif isinstance(inputs[1], list):  # jetmoe sorts the rows and says how many each expert gets
            found.append(torch.tensor(inputs[1]).nonzero())
        else:
            found.append(inputs[1])

    hooks = [
        module.register_forward_pre_hook(called)
        for name, module in model.named_modules()
        if name.endswith((".experts", ".mlp.input_linear"))
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.slow  # of what the package knows, the walk over all rows does the same
@pytest.mark.parametrize("model_type", BUILT)
def test_runs_reloads_and_generates(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    ids = tokens(2, 32)
    expected = logits(model, ids)
    assert expected.isfinite().all() and torch.equal(expected, logits(model, ids))
    assert torch.equal(expected, logits(tiny_model(model_type), ids))  # nothing is left uninitialised

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, ids), expected, atol=1e-5, rtol=0)
    assert again.config.architectures == [type(model).__name__]

    answer = model.generate(
        input_ids=ids[:, :9], attention_mask=torch.ones_like(ids[:, :9]), max_new_tokens=3, do_sample=False
    )
    assert answer.shape[1] > 9

    chosen = choices(model, tokens(1, 64))
    assert len(chosen) >= 2
    for layer in chosen:
        numbers = layer[layer < EXPERTS]
        assert numbers.min() >= 0 and len(numbers.unique()) > EXPERTS // 2


@pytest.mark.parametrize("model_type", UPSTREAM)
def test_what_transformers_cannot_do(model_type: str) -> None:
    with pytest.raises((AttributeError, TypeError, ValueError)) as error:
        logits(tiny_model(model_type), tokens(1, 4))
    assert str(error.value).splitlines()[0] == UPSTREAM[model_type]


@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen3_5_moe", "deepseek_v4", "nemotron_h"])
def test_bfloat16_is_what_loading_gives(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = tiny_model(model_type, dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(loaded.state_dict().items(), made.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    ids = tokens(1, 16)
    assert torch.equal(logits(loaded, ids), logits(made, ids))


def test_settings_reach_the_text_part() -> None:
    config = tiny_config("kimi_k25", n_group=1, topk_group=1, num_hidden_layers=2)
    assert config.text_config.n_group == 1 and config.text_config.num_hidden_layers == 2
    assert len(tiny_model("kimi_k25", num_hidden_layers=2).get_decoder().layers) == 2
