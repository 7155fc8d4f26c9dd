# SPDX-License-Identifier: Apache-2.0
"""What a card says of the original, of the choice and of nobody's folders; and its pictures."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_model, make_texts, make_tokenizer
from huggingface_hub import ModelCard

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, PruningPlan, RequestError
from optimum_moe_prune.evaluation.comparison import Comparison
from optimum_moe_prune.publishing import card_parts
from optimum_moe_prune.publishing.card import model_card, write_card
from optimum_moe_prune.publishing.facts import CardFacts, names_of, origin_of, to_publish

SAID = {"base_model": "someone/some-moe", "license": "apache-2.0", "language": ["en", "de"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in ``anna/model`` and a pruned copy of it in ``out``, for which nothing was said."""
    place = tmp_path_factory.mktemp("card")
    make_model().save_pretrained(place / "anna" / "model")
    make_tokenizer().save_pretrained(place / "anna" / "model")
    (place / "anna" / "texts.jsonl").write_text("".join(f'{{"text": "{t["text"]}"}}\n' for t in make_texts()))
    pruner = pruner_of(place)
    pruner.prune_checkpoint(place / "out", calibration=[place / "anna" / "texts.jsonl"])
    return place


def pruner_of(place: Path, **settings: Any) -> MoEPruner:
    config = MoEPrunerConfig(**{"method": "frequency", "num_experts": 4, **settings})
    return MoEPruner.from_pretrained(place / "anna" / "model", config=config)


def pruned_again(folder: Path, output: Path) -> None:
    MoEPruner.from_pretrained(folder, MoEPrunerConfig(method="random", num_experts=3)).prune_checkpoint(output)


def with_provenance(folder: Path, **provenance: Any) -> PruningPlan:
    plan = PruningPlan.load(folder)
    return replace(plan, provenance={**plan.provenance, **provenance})


def headings(card: ModelCard) -> list[str]:
    return [line for line in card.text.splitlines() if line.startswith("## ")]


def test_sections_come_in_the_order_in_which_they_are_needed(place: Path) -> None:
    assert headings(ModelCard.load(place / "out" / "README.md")) == [
        "## How to load it",
        "## Results",
        "## What to know before you use it",
        "## How it was made",
        "## Calibration",
        "## Licence",
    ]


def test_nobodys_folders_are_published(place: Path, tmp_path: Path) -> None:
    """However it was written: no file says where the model and the texts lay."""
    texts = [place / "anna" / "texts.jsonl"]
    pruner = pruner_of(place)
    pruner.prune(make_model(), calibration=texts)
    pruner.save_pretrained(tmp_path / "memory")
    pruner_of(place).prune_checkpoint(tmp_path / "files", calibration=texts)
    pruned_again(tmp_path / "files", tmp_path / "again")
    old = with_provenance(
        tmp_path / "again",
        model={"name_or_path": "/home/anna/secret", "revision": None},
        parent={"provenance": {"model": {"name_or_path": str(place / "anna")}, "parent": 3}},
    )
    assert old != to_publish(old) == to_publish(to_publish(old))
    old.apply_to_checkpoint(tmp_path / "files", tmp_path / "old")
    for name in ("memory", "files", "again", "old"):
        found = [
            path.name
            for path in (tmp_path / name).rglob("*")
            for secret in (str(place), str(tmp_path), "/home/anna")
            if path.is_file() and secret.encode() in path.read_bytes()
        ]
        assert not found, name
    assert pruner.pruning_plan.provenance["calibration"]["sources"] == ["texts.jsonl"]


def test_without_an_id_nothing_is_claimed(place: Path) -> None:
    card = ModelCard.load(place / "out" / "README.md")
    assert not {"base_model", "base_model_relation", "license", "language"} & set(card.data.to_dict())
    assert "does not know which it is" in card.text and "--model ORIGINAL " in card.text
    for name in ("/home/anna/m", "a/b/c", "..", "C:\\m", "a b", "-x", 7, None):  # whatever a plan's commit says
        plan = with_provenance(place / "out", model={"name_or_path": name, "revision": "0" * 40})
        assert origin_of(plan).base_model is None and origin_of(plan).first_model is None


@pytest.mark.parametrize("way", ["files", "memory", "plan"])
def test_what_a_person_says_of_the_original(place: Path, tmp_path: Path, way: str) -> None:
    if way == "files":
        pruner_of(place, method="random").prune_checkpoint(tmp_path / "out", **SAID)
    elif way == "memory":
        pruner = pruner_of(place, method="random")
        pruner.prune(make_model())
        pruner.save_pretrained(tmp_path / "out", **SAID)
    else:
        PruningPlan.load(place / "out").apply_to_checkpoint(place / "anna" / "model", tmp_path / "out", **SAID)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "someone/some-moe" and card.data.base_model_relation == "finetune"
    assert card.data.license == "apache-2.0" and card.data.language == ["en", "de"]
    assert "Experts of [someone/some-moe](https://huggingface.co/someone/some-moe) were removed" in card.text
    assert "The licence of the original, `apache-2.0`," in card.text
    assert "--model someone/some-moe --plan" in card.text and "--revision" not in card.text
    plan = PruningPlan.load(tmp_path / "out")
    assert plan.provenance["card"] == SAID and "someone/some-moe" in names_of(plan)
    # Made anew it says the same, and so does that of a model pruned from it.
    assert str(model_card(tmp_path / "out", "out")) in (tmp_path / "out" / "README.md").read_text()
    pruned_again(tmp_path / "out", tmp_path / "again")
    again = ModelCard.load(tmp_path / "again" / "README.md")
    assert (again.data.base_model, again.data.license) == ("someone/some-moe", "apache-2.0")
    assert "Experts of a `mixtral` model that had been pruned before (from [someone/some-moe]" in again.text


def test_what_a_person_says_goes_before_what_the_originals_card_says(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("moe_pruning_plan.json", "config.json", "model.safetensors"):
        (tmp_path / "out" / name).write_bytes((place / "out" / name).read_bytes())
    base = tmp_path / "out" / "README.base.md"
    base.write_text("---\nlicense: other\nlicense_name: theirs\nlicense_link: https://e.org\nlanguage: [fr]\n---\n")

    def data(**said: Any) -> dict[str, Any]:
        with_provenance(place / "out", card=said).save(tmp_path / "out")
        return model_card(tmp_path / "out", "x").data.to_dict()

    assert data()["license_name"] == "theirs" and data()["language"] == ["fr"]
    assert data(license="other")["license_link"] == "https://e.org"
    found = data(license="mit")
    assert found["license"] == "mit" and "license_name" not in found and found["language"] == ["fr"]
    assert data(language=["no"])["language"] == ["no"]
    text = str(model_card(tmp_path / "out", "x"))
    assert yaml.safe_load(text.split("---")[1])["language"] == ["no"]  # and not false
    (tmp_path / "out" / "LICENSE.txt").write_text("theirs")
    assert "It is in [LICENSE.txt](LICENSE.txt)." in str(model_card(tmp_path / "out", "x"))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"base_model": "/home/anna/model"}, "base_model is '/home/anna/model'; it must be the original's id .* path"),
        ({"base_model": "./model"}, "path"),
        ({"base_model": "https://huggingface.co/a/b"}, "path or an address"),
        ({"base_model": "a/b/c"}, "path"),
        ({"base_model": "a b"}, "base_model is 'a b'"),
        ({"base_model": ""}, "base_model is ''"),
        ({"base_model": Path("a")}, "it is no text"),
        ({"license": "Apache 2.0"}, "license is 'Apache 2.0'; .* as apache-2.0; or other"),
        ({"license": "MIT"}, "as mit;"),
        ({"license": "GPL 3"}, "as gpl-3.0;"),
        ({"license": ""}, "license is ''"),
        ({"license": ["mit"]}, "license is"),
        ({"license": "mit\ntags: [x]"}, "license is"),
        ({"language": "english"}, "language is 'english'; it must be a code"),
        ({"language": ["en", "en,de"]}, "language is 'en,de'"),
        ({"language": [7]}, "language is 7"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_any_work(
    place: Path, tmp_path: Path, said: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        pruner_of(place).prune_checkpoint(tmp_path / "out", calibration=3, **said)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_folder_here_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CardFacts("gpt-moe").base_model == "gpt-moe" and CardFacts(language="multilingual").language
    (tmp_path / "gpt-moe").mkdir()
    with pytest.raises(RequestError, match="there is a folder of that name here"):
        CardFacts("gpt-moe")


def test_what_to_know_is_in_the_card_once_and_plain(place: Path, tmp_path: Path) -> None:
    written = write_plan(place, tmp_path, notes=["first <b>\n# x", "second.", "first <b>\n# x", "", 7])
    card = model_card(written, "x")
    told = card.text.split("## What to know before you use it")[1].split("## ")[0]
    lines = [line for line in told.splitlines() if line.startswith("- ")]
    assert lines[:3] == ["- First &lt;b> # x.", "- Second.", "- 7."] and len(lines) == 5


def write_plan(place: Path, tmp_path: Path, **provenance: Any) -> Path:
    """A copy of the pruned model, with other values in its plan."""
    folder = tmp_path / "copy"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            os.link(place / "out" / name, folder / name)
    with_provenance(place / "out", **provenance).save(folder)
    return folder


def test_every_plan_gives_a_card(place: Path, tmp_path: Path) -> None:
    """Edited by hand, without provenance, of other versions and packages."""
    keys = ("calibration", "notes", "heads", "card", "parent", "sensitivity", "made", "parameters")
    for strange in (None, 3, "text", ["a"], {"a": {"b": 1}}, [None, {"x": 1}], {"note": None, "mtp": "keep"}):
        card = model_card(write_plan(place, tmp_path, **dict.fromkeys(keys, strange)), "x")
        assert headings(card)[-1] == "## Licence" and card.data.base_model is None
    values = PruningPlan.load(place / "out").to_dict()
    for less in ({"provenance": None}, {"provenance": {}}, {"config": None}, {"config": {"allocation": 3, "x": 1}}):
        plan = PruningPlan.from_dict({**values, **less})
        plan.save(tmp_path / "copy")
        assert "16 of 24" not in str(model_card(tmp_path / "copy", "x"))
    plan.apply_to_checkpoint(place / "anna" / "model", tmp_path / "new")
    assert (tmp_path / "new" / "README.md").is_file()


def test_pictures_beside_the_card_are_in_it(place: Path, tmp_path: Path) -> None:
    folder = write_plan(place, tmp_path)
    assert card_parts.pictures(folder) == {} and "![" not in str(model_card(folder, "x"))
    pictures = folder / "report_pictures"
    pictures.mkdir()
    for name in ("retained-1.png", "retained-2.png", "retained-1.svg", "coverage-1.png", "perplexity-1.png", "x.png"):
        (pictures / name).write_bytes(b"\x89PNG")
    card = str(model_card(folder, "x"))
    assert card.count("![") == 2 and "perplexity-1.png" not in card  # nothing was measured
    assert "](report_pictures/retained-1.png)" in card and "](report_pictures/coverage-1.png)" in card
    evaluation = Comparison({}).save(folder / "moe_evaluation.json")
    os.utime(evaluation, ns=(0, 0))
    assert "](report_pictures/perplexity-1.png)" in str(model_card(folder, "x"))
    os.utime(pictures / "perplexity-1.png", ns=(0, 0))
    os.utime(evaluation, ns=(10**9, 10**9))  # measured again since
    assert "perplexity-1.png" not in str(model_card(folder, "x"))
    for line in card.splitlines():
        if line.startswith("!["):
            assert len(line.split("]")[0].split()) > 6, "an alternative text says what is to be seen"


def test_a_verdict_stands_where_the_comparison_has_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_plan(place, tmp_path)
    Comparison({}).save(folder / "moe_evaluation.json")
    monkeypatch.setattr(Comparison, "verdict", lambda self: "Perplexity doubled.\nIt <is> so.", raising=False)
    assert "## Results\n\nPerplexity doubled.\n\nIt &lt;is> so.\n" in str(model_card(folder, "x"))
    monkeypatch.setattr(Comparison, "verdict", "Nothing changed.", raising=False)
    write_card(folder, "x")
    assert "Nothing changed." in (folder / "README.md").read_text()
