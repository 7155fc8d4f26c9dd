# SPDX-License-Identifier: Apache-2.0
"""Datasets on the Hub and presets of them: what is asked for, what is said, and what happens without a network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import make_tokenizer, save_checkpoint
from oracles import call
from transformers import PreTrainedTokenizerBase

from optimum_moe_prune import CalibrationSet, RequestError
from optimum_moe_prune.calibration.presets import PRESETS
from optimum_moe_prune.calibration.texts import hub_parts


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of the Hub, which has twenty rows in every dataset, each second one blank."""
    seen: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        seen.append((name, config, split))
        number = len(seen)
        return iter([{"text": "" if i % 2 else f"w{i} w{number}"} for i in range(20)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return seen


def test_every_preset_names_its_datasets_and_their_licences() -> None:
    for name, preset in PRESETS.items():
        domains = [part.domain for part in preset.parts]
        assert preset.summary and len(set(domains)) == len(domains) > 0
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", part.name) and part.licence for part in preset.parts)
        assert hub_parts(f"preset:{name}") == list(preset.parts)


def test_a_preset_is_a_calibration_in_equal_shares(tokenizer: PreTrainedTokenizerBase, asked: list) -> None:
    samples = CalibrationSet.build("preset:general", tokenizer, num_samples=15)
    assert asked == [(p.name, p.config, p.split) for p in PRESETS["general"].parts]
    assert Counter(s.domain for s in samples.samples) == {p.domain: 3 for p in PRESETS["general"].parts}
    assert samples.sources == ("preset:general",)
    assert samples.notes()[-1].startswith("Read from the Hub: allenai/c4[en](train), ODC-BY; ")
    mixed = CalibrationSet.from_hub("preset:c4:6,me/own", tokenizer, num_samples=4)
    assert mixed.sources == ("preset:c4:6", "hub:me/own") and len(mixed) == 4
    assert len(CalibrationSet.from_hub("preset:c4:6", tokenizer)) == 3  # of six rows, each second one blank


def test_wrong_names_of_presets_are_refused() -> None:
    with pytest.raises(RequestError, match=r"there is no preset 'genral'\. Known: general, "):
        hub_parts("preset:genral")
    for count in ("x", "0", ""):
        with pytest.raises(RequestError, match="is not of the form preset:NAME or preset:NAME:ROWS"):
            hub_parts(f"preset:c4:{count}")


class DatasetNotFoundError(FileNotFoundError):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'x' on the Hub"), "is not on this machine, and the Hub cannot be reached"),
        (TimeoutError("read"), "hf download me/data --repo-type dataset"),
        (
            DatasetNotFoundError("'me/data' doesn't exist on\nthe Hub."),
            "hf auth login.*: 'me/data' doesn't exist on the",
        ),
        (ValueError("BuilderConfig 'x' not found"), r"me/data\[x\] cannot be read: BuilderConfig 'x' not found\."),
        (KeyError(), "cannot be read: KeyError"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_what_the_hub_does_not_give_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, later: bool
) -> None:
    def load(*args: object, **options: object) -> Iterator[dict[str, str]]:
        def rows() -> Iterator[dict[str, str]]:
            yield {"text": "w1 w2"}
            raise RuntimeError("the stream broke") from error

        if later and not isinstance(error, (ValueError, KeyError, DatasetNotFoundError)):
            return rows()
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(RequestError, match=message) as found:
        CalibrationSet.from_hub("me/data[x]", make_tokenizer(), num_samples=5)
    assert "\n" not in str(found.value)


# ------------------------------------------------------------------------------------------- on the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'w9' if loud else 'w8' }} {% for m in messages %}{{ m.content }} {% endfor %}"
    return save_checkpoint("mixtral", tmp_path_factory.mktemp("model"), tokenizer)


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "list", "presets")
    assert code == 0 and "preset:c4: English web text" in out and "allenai/c4[en](train), ODC-BY" in out


def test_how_data_is_read_can_be_said_everywhere(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    asked: list,
) -> None:
    data = tmp_path / "a.csv"
    chat = '[{""role"": ""user"", ""content"": ""w1 w2""}]'
    data.write_text(f'body,messages\nw3 w4 w5,\n,"{chat}"\nw6 w7,x,y\n')
    common = ("--model", model, "--skip-bad")
    code, _, err = call(capsys, "score", *common[:2], "--calibration", data, tmp_path / "no")
    assert (
        code == 2 and "a.csv, line 4 has 3 fields, and the head 2. To leave such records out, pass --skip-bad." in err
    )
    code, out, err = call(
        capsys, "score", *common, "--calibration", data, "--template-arg", "loud=true", "--method", "frequency",
        tmp_path / "stats",
    )  # fmt: skip
    assert (
        code == 0 and out.startswith("1 samples, 3 tokens") and "1 of 3 records is blank and left out." in caplog.text
    )
    code, out, err = call(capsys, "evaluate", *common, "--data", data, "--text-column", "body")
    assert code == 0 and "1 of 3 records is left out as unusable" in caplog.text
    run = ("run", "--calibration", data, "--evaluate", data, "--text-column", "body", "--num-experts", 4)
    caplog.clear()
    code, out, err = call(capsys, *run, *common, "--method", "frequency", tmp_path / "out")
    said = [r.message for r in caplog.records if r.name.endswith("samples") and "is left out as unusable" in r.message]
    assert code == 0 and len(said) == 2  # once for each use
    code, out, err = call(
        capsys, "score", *common, "--calibration", "preset:c4", "--method", "frequency", tmp_path / "s"
    )
    assert code == 0 and out.startswith("10 samples") and asked == [("allenai/c4", "en", "train")]
    for wrong, message in (
        (("evaluate", *common, "--speed"), "--skip-bad is for --data, and none is named"),
        (("score", *common, "--calibration", "preset:c4", "--calibration", data, "x"), "not both at once"),
        (("score", *common, "--calibration", data, "--template-arg", "loud", "x"), "is not of the form K=V"),
    ):
        code, _, err = call(capsys, *wrong)
        assert code == 2 and message in err


def test_a_folder_without_a_tokenizer_is_called_that(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "a.txt"
    data.write_text("w1 w2")
    (tmp_path / "bare").mkdir()
    (tmp_path / "broken").mkdir()
    for file in model.iterdir():
        for name in ("bare", "broken"):
            if not file.name.startswith("tokenizer"):
                (tmp_path / name / file.name).symlink_to(file)
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name, message in (
        ("bare", "it has no tokenizer.json, tokenizer.model, vocab.json or the like"),
        ("broken", ""),
    ):
        for command in (("score", "--calibration", data, tmp_path / "s"), ("evaluate", "--data", data)):
            code, _, err = call(capsys, command[0], "--model", tmp_path / name, *command[1:])
            assert code == 2 and err.count("\n") == 1
            assert f"no tokenizer can be loaded from {tmp_path / name}: {message}" in err
            assert "copy the tokenizer's files there" in err
