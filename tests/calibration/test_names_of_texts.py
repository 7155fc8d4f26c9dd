# SPDX-License-Identifier: Apache-2.0
"""Texts that are not there, or are something else: what the message says; blank domains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optimum_moe_prune import PruningPlan
from optimum_moe_prune.calibration.naming import not_there
from optimum_moe_prune.calibration.readers import rows_of
from optimum_moe_prune.calibration.records import Origin, record_of
from optimum_moe_prune.errors import RequestError
from optimum_moe_prune.storage.kinds import kind_of


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://huggingface.co/datasets/a/b/tree/main", "the dataset on the Hub is read as hub:a/b."),
        ("https:/hf.co/datasets/a/b", "the dataset on the Hub is read as hub:a/b."),  # as Path writes it
        ("https://x.y/z.jsonl", "download it, and name the file."),
        ("wikitext", "did you mean the preset preset:wikitext?"),
        ("presets:c4", "did you mean the preset preset:c4?"),
        ("preset-c4:x", "preset-c4:x does not exist"),
        ("own:thing", "own:thing is no file; presets are preset:NAME"),
        ("someone/data", "a dataset on the Hub is read as hub:someone/data."),
        ("nowhere/data.jsonl", "there is no nowhere"),
        ("*.jsonl", "no file is called *.jsonl, or fits it."),
        ("a.jsonl,b.jsonl", "several files are given one by one: a.jsonl and b.jsonl."),
        ("a.jsonl,c.jsonl", "the file a.jsonl,c.jsonl does not exist"),
        ("a.json", "did you mean a.jsonl?"),
    ],
)
def test_names_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    for there in ("a.jsonl", "b.jsonl"):
        (tmp_path / there).touch()
    monkeypatch.chdir(tmp_path)
    assert said in not_there(name)


def test_files_of_other_kinds_are_called_what_they_are(tmp_path: Path) -> None:
    PruningPlan("mixtral", 2, "reap", {0: (0, 1)}, {0: 4}).save(tmp_path / "plan.json")
    (tmp_path / "p.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    (tmp_path / "u.txt").write_bytes("caf\xe9 ".encode("latin1"))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "stats.json").write_text("{}")
    for name, said in (
        ("plan.json", r"plan\.json is a plan, and texts are needed"),
        ("p.jsonl", r"is not a text file \(no UTF-8 at byte 0\) and is a picture; give \.jsonl or \.txt\."),
        ("u.txt", r"\(no UTF-8 at byte 3\); save it as UTF-8\."),
        ("s", r"s is a folder of statistics, and texts are needed"),
    ):
        with pytest.raises(RequestError, match=said):
            list(rows_of(tmp_path / name))
    assert kind_of(tmp_path / "none") is None


def test_records_with_keys_of_a_plan_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"data": [{"text": "a b"}], "layers": 1, "model_type": "x", "top_k": 2}))
    assert [row for _, row in rows_of(path)] == [{"text": "a b"}]
    path.write_text(json.dumps({"text": "a b", "model_type": "x"}))
    assert [row["text"] for _, row in rows_of(path)] == ["a b"]


@pytest.mark.parametrize(("said", "domain"), [("", "file"), (" \n", "file"), (None, "file"), ("b", "b"), (5, "5")])
def test_a_blank_domain_is_none(said: object, domain: str) -> None:
    assert record_of({"text": "a", "domain": said}, Origin("line 1"), "file").domain == domain
