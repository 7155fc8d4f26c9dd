# SPDX-License-Identifier: Apache-2.0
"""Names of models and files that lead nowhere: what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from optimum_moe_prune import RequestError, Source
from optimum_moe_prune.checkpoints.naming import check_named
from optimum_moe_prune.storage.nearby import absent, looks_like_path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mixtral").mkdir()
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    (tmp_path / "texts.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


NOT_LISTED = (
    "mixtrl is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'"
)
OFFLINE = "We couldn't connect to 'https://huggingface.co' to load the files"


@pytest.mark.parametrize(
    ("name", "reason", "said"),
    [
        (
            "mixtrl",
            NOT_LISTED,
            r"'mixtrl', which is neither a folder here nor .* on the Hub .* Did you mean \./mixtral\?$",
        ),
        (
            "MIXTRAL",
            OFFLINE,
            r"'MIXTRAL': there is no such folder here, and the Hub cannot be reached .* Did you mean \./mixtral\?$",
        ),
        ("models/qwem", NOT_LISTED, r"neither a folder .* Did you mean models/qwen\?$"),
        (
            "owner/model",
            NOT_LISTED,
            r"neither a folder here nor a model on the Hub that can be seen .*\)\.$",
        ),
        (
            "owner/model",
            "You are trying to access a gated repo.",
            r"^no model can be read from 'owner/model': You are",
        ),
    ],
)
def test_what_may_be_an_id_is_asked_for_on_the_hub_first(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str, said: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(reason + "\nmore")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(RequestError, match=said) as refused:
        Source(name).config  # noqa: B018
    assert "Known architectures" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./mixtrl", "./mixtrl does not exist; did you mean ./mixtral?"),
        ("models/qwen/", "models/qwen/ is not a model's folder: it has no config.json; it is empty; name"),
        ("models/qwen/x/y", "models/qwen/x/y does not exist: there is no models/qwen/x."),
        ("model/qwen/x", "model/qwen/x does not exist: there is no model; did you mean ./models?"),
        ("/mixtral/", "/mixtral/ does not exist; did you mean mixtral/, without the first slash?"),
        ("~/mixtral", "~/mixtral does not exist, where ~ is not the home folder; write {here}/mixtral."),
        (".\\mixtral", ".\\mixtral does not exist; did you mean ./mixtral?"),
        ("D:\\models\\x", "D:\\models\\x does not exist."),
        ("texts.jsonl", "texts.jsonl is a file, and a model's folder is needed"),
        (
            "https://huggingface.co/a/b/tree/main",
            "is an address; the model's id on the Hub is a/b.",
        ),
        ("a\x00b", "'a\\x00b' is "),
        ("x" * 300, "is no name of a folder: "),
        ("", "the model's name is empty"),
    ],
)
def test_what_can_be_no_id_is_refused_without_the_hub(here: Path, name: str, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_named(name)
    assert said.format(here=here) in str(refused.value)
    with pytest.raises(RequestError, match=r"name|exist|is a|not a model's"):
        Source(name).config  # noqa: B018


def test_ids_and_folders_are_let_through(here: Path) -> None:
    (here / "mixtral" / "config.json").write_text("{}")
    for name in ("mixtral", "./mixtral", str(here / "mixtral"), "mistralai/Mixtral-8x7B-v0.1", "gpt2", "a/b.c-d_e"):
        check_named(name)
    assert looks_like_path("a/b/c") and looks_like_path("C:/x") and not looks_like_path("a/b")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text.jsonl", "text.jsonl does not exist; did you mean texts.jsonl?"),
        ("texts.json", "texts.json does not exist; did you mean texts.jsonl?"),
        ("TEXTS.JSONL", "TEXTS.JSONL does not exist; did you mean texts.jsonl?"),
        ("zzz", "zzz does not exist."),
        ("texts.jsonl/x", "texts.jsonl/x does not exist: texts.jsonl is a file."),
    ],
)
def test_files_that_are_not_there(here: Path, name: str, said: str) -> None:
    assert absent(name) == said
