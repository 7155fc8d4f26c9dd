# SPDX-License-Identifier: Apache-2.0
"""A model as a draft: forward passes counted against what assisted generation must take."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer
from transformers import PreTrainedModel

from optimum_moe_prune import RequestError, RunError, compare
from optimum_moe_prune.calibration.samples import CalibrationSet
from optimum_moe_prune.evaluation.comparison import Comparison
from optimum_moe_prune.evaluation.draft import Drafting, measure_draft

PROPOSED, NEW = 4, 21


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    model = make_model(seed=3)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    return CalibrationSet.build(make_texts(), make_tokenizer(), max_length=64)


def sure(model: PreTrainedModel) -> PreTrainedModel:
    """A draft that proposes whatever it thinks of it."""
    draft = copy.deepcopy(model)
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


def test_a_perfect_draft(reference: PreTrainedModel, samples: CalibrationSet) -> None:
    """Each pass of the original takes all that was proposed and adds a token of its own."""
    draft = sure(reference).train()
    settings = draft.generation_config
    found = measure_draft(
        reference, draft, samples, prompts=4, prompt_tokens=8, new_tokens=NEW, rounds=2, draft_tokens=PROPOSED
    )
    assert found.tokens == 4 * NEW and found.same == 1 and found.gap == 0
    assert found.target_forwards == 4 * math.ceil(NEW / (PROPOSED + 1))
    assert found.tokens_per_forward == found.tokens / found.target_forwards
    assert set(found.by_domain.values()) == {found.tokens_per_forward}
    assert draft.training and draft.generation_config is settings
    assert not draft._forward_pre_hooks and not reference._forward_pre_hooks
    assert "after every prompt" in found.sentence() and "apart" not in found.sentence()


def test_a_draft_that_is_always_wrong(reference: PreTrainedModel, samples: CalibrationSet) -> None:
    draft = sure(reference)
    with torch.no_grad():
        draft.lm_head.weight.neg_()
    found = measure_draft(reference, draft, samples, prompts=3, prompt_tokens=8, new_tokens=6, rounds=1)
    assert found.target_forwards == found.tokens == 18 and found.same == 1
    assert found.speedup < 1  # it costs, and gives nothing


def test_where_other_tokens_come_out(
    reference: PreTrainedModel, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as the original's logits differ where they part is said."""
    draft = sure(reference)
    generate = type(reference).generate

    def wrong(self: PreTrainedModel, *ids: torch.Tensor, **options: object) -> torch.Tensor:
        output = generate(self, *ids, **options)
        if "assistant_model" in options:
            output[0, ids[0].shape[1] + 1] = (output[0, ids[0].shape[1] + 1] + 1) % 5
        return output

    monkeypatch.setattr(type(reference), "generate", wrong)
    found = measure_draft(reference, draft, samples, prompts=1, prompt_tokens=8, new_tokens=4, rounds=1)
    monkeypatch.undo()
    first = min(range(len(samples)), key=lambda i: samples.samples[i].domain)
    ids = samples.token_ids[first][:8][None]
    right = generate(reference, ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    with torch.no_grad():
        logits = reference(torch.cat([ids, right[:1][None]], 1)).logits[0, -1]
    assert found.same == 0 and found.gap == pytest.approx(float(logits[right[1]] - logits[(right[1] + 1) % 5]), 1e-5)
    assert "after 0% of 1 prompts; where others come out" in found.sentence()


def test_with_other_results(reference: PreTrainedModel) -> None:
    """Beside losses, in tables, files and words."""
    texts, settings = make_texts(), {"tokenizer": make_tokenizer(), "new_tokens": 4}
    found = compare(sure(reference), texts, reference=reference, draft=True, draft_tokens=2, **settings)
    name = next(iter(found.compared))
    result = found.models[name].draft
    assert isinstance(result, Drafting) and result.new_tokens == 4
    assert found.models[str(found.reference)].draft is None
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    summary = found.summary()
    assert f"as a draft of {found.reference}" in summary and "tokens per forward" in summary
    plain = compare(sure(reference), texts, reference=reference, **settings)
    assert found.updated(plain).models[name].draft == result
    assert "draft" not in plain.summary()
    for missing in ({"reference": reference}, {"data": texts}):
        with pytest.raises(RequestError, match="name data, and reference"):
            compare(sure(reference), speed=False, draft=True, tasks=("x",), **missing)
    with pytest.raises(RequestError, match=r"new_tokens is 5000, and the reference .* texts of (\d+) tokens"):
        compare(sure(reference), texts, reference=reference, draft=True, **{**settings, "new_tokens": 5000})
    with pytest.raises(RequestError, match="draft_tokens"):
        compare(sure(reference), texts, reference=reference, draft_tokens=2)


def test_what_transformers_cannot_draft_with(reference: PreTrainedModel, samples: CalibrationSet) -> None:
    draft, original = sure(reference), copy.deepcopy(reference)
    original._is_stateful = True
    with pytest.raises(RunError, match="cannot generate with this draft"):
        measure_draft(original, draft, samples, new_tokens=2, rounds=1)
