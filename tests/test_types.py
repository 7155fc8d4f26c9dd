# SPDX-License-Identifier: Apache-2.0
"""What people pass in a notebook: other types are refused in words, and names are taken where they can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import load, make_texts, make_tokenizer, save_checkpoint
from oracles import call

from optimum_moe_prune import (
    CalibrationStats,
    MoEPruner,
    MoEPrunerConfig,
    PruningPlan,
    calibrate,
    compare,
    compare_methods,
    evaluate,
    plan_work,
    write_report,
)
from optimum_moe_prune.errors import RequestError, RunError

CONFIG = MoEPrunerConfig(method="reap", num_experts=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral with a tokenizer."""
    return save_checkpoint("mixtral", tmp_path_factory.mktemp("types") / "model", make_tokenizer())


@pytest.fixture(scope="module")
def stats(folder: Path) -> CalibrationStats:
    return calibrate(folder, make_texts(4), "reap")


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda f, s: MoEPruner.from_pretrained(f, {"num_experts": 4}), "a MoEPrunerConfig .* this is a dict"),
        (lambda f, s: MoEPruner.from_pretrained(f, "reap"), "a MoEPrunerConfig .* this is a str"),
        (lambda f, s: MoEPruner.from_pretrained(None), "the folder or Hub id of a model .* this is a NoneType"),
        (lambda f, s: MoEPruner.from_pretrained(load(f)), "a loaded one goes to prune.* this is a MixtralForCausalLM"),
        (lambda f, s: MoEPruner.from_pretrained(f, CONFIG).plan("stats"), r"CalibrationStats\.load reads a folder"),
        (lambda f, s: s.merge("stats"), r"CalibrationStats\.load reads a folder"),
        (lambda f, s: PruningPlan("m", 1, "x", {0: (0,)}, {0: 2}).diff("p"), r"PruningPlan\.load reads a file"),
        (lambda f, s: evaluate(str(f), ["w1 w2"]), "compare takes folders and Hub ids.* this is a str"),
        (lambda f, s: plan_work(load(f), CONFIG), "the folder or Hub id of a model is needed"),
        (lambda f, s: plan_work(f, CONFIG, ["w1 w2"]), r"MoEPruner\.samples makes one of texts"),
        (lambda f, s: write_report("r.pdf", stats=s), r"must end in \.html, and is r\.pdf"),
        (lambda f, s: MoEPrunerConfig(num_experts="4"), r"an integer of at least 1\.$"),
    ],
)
def test_other_types_are_refused_in_words(
    folder: Path, stats: CalibrationStats, ask: Callable[..., object], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        ask(folder, stats)


def test_names_and_single_values_are_taken(folder: Path, stats: CalibrationStats) -> None:
    assert (
        plan_work(str(folder), CONFIG).choice == plan_work(MoEPruner.from_pretrained(folder).layout(), CONFIG).choice
    )
    one = compare_methods(folder, stats, make_texts(3), methods="reap", sparsities="50%", allocations="uniform")
    several = compare_methods(
        folder, stats, make_texts(3), methods=["reap"], sparsities=[0.5], allocations=["uniform"]
    )
    assert one.to_dict() == several.to_dict()


def test_a_loaded_model_is_judged_by_the_tokenizer_of_its_folder(folder: Path) -> None:
    model = load(folder)
    assert evaluate(model, make_texts(3)) == evaluate(model, make_texts(3), make_tokenizer())


def test_models_of_other_tokens_are_not_compared(folder: Path, tmp_path: Path) -> None:
    other = make_tokenizer()
    vocabulary = other.get_vocab()
    save_checkpoint("mixtral", tmp_path / "other", other)
    file = tmp_path / "other" / "tokenizer.json"
    text = file.read_text()
    words = [word for word in vocabulary if word.startswith("w")]
    for word in words:
        text = text.replace(f'"{word}"', f'"x{word}"')
    file.write_text(text)
    with pytest.raises(RequestError, match="give the same numbers to different tokens"):
        compare(tmp_path / "other", make_texts(3), reference=folder)


def test_what_was_found_is_shown_when_publishing_fails(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RunError("the Hub cannot be reached.")

    monkeypatch.setattr(MoEPruner, "push_to_hub", fails)
    run = ("run", "--model", folder, "--method", "random", "--num-experts", 4, "--push-to-hub", "a/b")
    code, out, err = call(capsys, *run, tmp_path / "out")
    assert code == 1 and out.startswith("random: 12 of 24 experts retained") and "load it: " in out
    assert err.splitlines()[-1].startswith("error: the pruned checkpoint is written in")
    code, out, _ = call(capsys, *run, "--json", tmp_path / "json")
    assert (code, out) == (1, "")
