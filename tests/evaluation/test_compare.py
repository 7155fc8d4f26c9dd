# SPDX-License-Identifier: Apache-2.0
"""Several models side by side: from files, or loaded; what is refused before any is loaded."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_moe_prune import RequestError, Source, compare
from optimum_moe_prune.compat import text_config
from optimum_moe_prune.evaluation import compare as compare_models
from optimum_moe_prune.evaluation.comparison import Comparison
from optimum_moe_prune.evaluation.losses import evaluate


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A reference and two other models, each with a tokenizer."""
    found = []
    for number, name in enumerate(("reference", "a", "b")):
        make_model(seed=number).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        found.append(tmp_path / name)
    return found


def test_files_and_loaded_models_are_compared_alike(folders: list[Path]) -> None:
    reference, *others = folders
    found = compare([others[0], Source(str(others[1]))], make_texts(), reference=str(reference))
    assert list(found.models) == ["a", "b", "reference"] and found.reference == "reference"
    original, *models = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    expected = evaluate(models[1], make_texts(), make_tokenizer(), reference=original)
    assert found.models["b"].evaluation == expected
    assert found.models["reference"].evaluation.domains["all"].loss == expected.domains["all"].reference_loss
    assert found.models["a"].parameters == models[0].num_parameters()
    assert found.settings["max_length"] == 2048 and found.settings["dtype"] == "auto"
    loaded = compare(models, make_texts(), reference=original)
    assert loaded.models == found.models and loaded.reference == "reference"
    assert (loaded.settings["dtype"], loaded.settings["device"]) == ("float32", "cpu")
    assert all(model is not None and not model.training for model in models)
    fresh = make_model(seed=1)
    alone = compare(fresh, make_texts(), tokenizer=make_tokenizer())
    assert list(alone.models) == ["MixtralForCausalLM"] and alone.reference is None
    texts = [torch.tensor([1, 5, 9, 4, 30])] * 2
    assert compare(fresh, texts).models["MixtralForCausalLM"].evaluation.domains["default"].samples == 1
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_one_model_is_in_memory_beside_the_reference(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref] = []
    most = []
    kind = type(AutoModelForCausalLM.from_pretrained(folders[0]))
    load = kind.from_pretrained

    def counted(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        held.append(weakref.ref(model))
        gc.collect()
        most.append(sum(found() is not None for found in held))
        return model

    monkeypatch.setattr(kind, "from_pretrained", counted)
    compare(folders[1:], make_texts(), reference=folders[0])
    assert most == [1, 2, 2]


def test_what_is_refused_before_a_model_is_loaded(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model is loaded")

    make_model(vocab_size=100).save_pretrained(tmp_path / "larger")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    one, texts = folders[1], make_texts(2)
    for models, data, how, message in (
        ([], texts, {}, "no model is named"),
        (one, None, {}, r"nothing to evaluate on; name texts \(data\), tasks, or speed"),
        ([one, str(one)], texts, {}, "a is named twice"),
        (one, texts, {"reference": one}, "a is named twice"),
        (one, texts, {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (one, None, {"speed": True, "new_tokens": 1}, "new_tokens is 1; it must be at least 2"),
        (make_model(), None, {"speed": True}, "speed is measured in a process of its own"),
        (tmp_path / "none", texts, {}, "no model can be read from"),
        (one, tmp_path / "none.jsonl", {}, r"none\.jsonl"),
        (one, texts, {"reference": tmp_path / "larger"}, "different vocabularies .*a 96, .*larger 100"),
        (make_model(), texts, {}, "tokenizer"),
    ):
        with pytest.raises(RequestError, match=message):
            compare(models, data, **how)
    with pytest.raises(TypeError, match="unexpected keyword argument 'limt'"):
        compare(one, texts, limt=3)
    pytest.importorskip("lm_eval")
    with pytest.raises(RequestError, match="no task 'arc_chalenge'"):
        compare(one, tasks=["arc_chalenge"])


def test_tasks_have_their_settings(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(model: Any, tokenizer: Any, tasks: Any, **how: Any) -> dict[str, dict[str, float]]:
        asked.append((len(tokenizer), tasks, how))
        return {"t": {"acc": len(asked) / 4}}

    monkeypatch.setattr(compare_models, "check_tasks", lambda *args: [])
    monkeypatch.setattr(compare_models, "run_tasks", run)
    found = compare(folders[1], tasks=["t"], reference=folders[0], batch_size=3, seed=5)
    assert {name: result.tasks["t"]["acc"] for name, result in found.models.items()} == {"a": 0.25, "reference": 0.5}
    assert asked == [(96, ["t"], {"batch_size": 3, "seed": 5})] * 2
    assert not found.models["a"].evaluation.domains and found.models["a"].parameters


def test_how_a_source_is_reached() -> None:
    assert Source("me/model").for_transformers == {}
    source = Source("me/model", revision="main", token=False, cache_dir="/tmp/x", trust_remote_code=True)
    assert source.for_transformers == {
        "revision": "main",
        "token": False,
        "cache_dir": "/tmp/x",
        "trust_remote_code": True,
    }


def test_the_config_of_the_text_part() -> None:
    from transformers import LlavaConfig, MixtralConfig

    plain = MixtralConfig(vocab_size=7)
    assert text_config(plain) is plain
    assert text_config(LlavaConfig(text_config=plain)).vocab_size == 7
