# SPDX-License-Identifier: Apache-2.0
"""Every kind of calibration input, and every kind of broken one."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from conftest import make_tokenizer
from transformers import PreTrainedTokenizerBase

from optimum_moe_prune import CalibrationSet, RequestError
from optimum_moe_prune.calibration import texts
from optimum_moe_prune.calibration.texts import hub_records
from optimum_moe_prune.statistics.samples import equal_shares

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


def ids_of(samples: CalibrationSet) -> list[list[int]]:
    return sorted(ids.tolist() for ids in samples.token_ids)


EXPECTED = [[1, 4, 5, 6], [1, 7, 8], [1, 9, 10, 11, 12]]


def test_every_form_of_texts_gives_the_same_samples(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    jsonl, txt = tmp_path / "a.jsonl", tmp_path / "b.txt"
    jsonl.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS) + "\n\n")
    txt.write_text("\n\n".join(TEXTS[:2]) + "\n \n\n" + TEXTS[2] + "\n")
    for source in (
        TEXTS,
        [{"text": t} for t in TEXTS],
        jsonl,
        str(jsonl),
        [jsonl],
        txt,
        [torch.tensor(ids) for ids in EXPECTED],
        datasets.Dataset.from_list([{"text": t} for t in TEXTS]),
    ):
        assert ids_of(CalibrationSet.build(source, tokenizer)) == EXPECTED
    assert ids_of(CalibrationSet.build(torch.tensor([[5, 6], [7, 8]]))) == [[5, 6], [7, 8]]
    assert ids_of(CalibrationSet.build(torch.tensor([5, 6]))) == [[5, 6]]


def test_the_tokenizers_own_special_tokens_are_used() -> None:
    assert ids_of(CalibrationSet.build(["w1 w2"], make_tokenizer(bos=False))) == [[4, 5]]


def test_domains_come_from_records_and_files(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for name, text in (("code.txt", "w1 w2"), ("news.txt", "w3 w4")):
        (tmp_path / name).write_text(text)
    both = CalibrationSet.build([tmp_path / "code.txt", tmp_path / "news.txt"], tokenizer)
    assert sorted(s.domain for s in both.samples) == ["code", "news"]
    labelled = CalibrationSet.build([{"text": "w1 w2", "domain": "x"}, {"text": "w3 w4", "domain": None}], tokenizer)
    assert sorted(s.domain for s in labelled.samples) == ["default", "x"]


def test_chat_messages_go_through_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}]
    with pytest.raises(RequestError, match="record 0 holds chat messages, and the tokenizer has no chat template"):
        CalibrationSet.build(chat, tokenizer)
    templated = make_tokenizer(bos=False)
    templated.chat_template = "{% for m in messages %}{{ m['content'] }} w9 {% endfor %}"
    assert ids_of(CalibrationSet.build(chat, templated)) == [[4, 12, 5, 12]]


def test_samples_are_shared_out_over_domains(tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"text": f"w{i} w1", "domain": "a"} for i in range(20)]
    records += [{"text": f"w{i} w2", "domain": "b"} for i in range(3)]

    def chosen(selection: str, seed: int = 0) -> tuple[list[str], list[list[int]]]:
        samples = CalibrationSet.build(records, tokenizer, num_samples=8, sample_selection=selection, seed=seed)
        return sorted(s.domain for s in samples.samples), ids_of(samples)

    domains, first = chosen("first")
    assert domains == ["a"] * 5 + ["b"] * 3
    assert first == sorted([[1, i + 3, 4] for i in range(5)] + [[1, i + 3, 5] for i in range(3)])
    assert chosen("random") == chosen("random")
    assert chosen("random")[0] == domains and chosen("random")[1] != first
    assert chosen("random")[1] != chosen("random", seed=1)[1]


def test_long_samples_are_cut_and_duplicates_left_out(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        samples = CalibrationSet.build(["w1 w2 w3 w4", "w1 w2 w3 w5", "w6 w7"], tokenizer, max_length=4)
    assert ids_of(samples) == [[1, 4, 5, 6], [1, 9, 10]]
    assert (samples.truncated, samples.duplicates) == (1, 1)
    assert [r.message for r in caplog.records] == [
        "1 of 2 samples are longer than 4 tokens and were cut.",
        "1 samples have the same tokens as another one and were left out.",
    ]


def test_domains_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RequestError, match="the domain of record 0 is not valid Unicode text"):
        CalibrationSet.build([{"text": "w1 w2", "domain": "\ud83d"}], tokenizer)


def test_packing_joins_within_a_domain_only_when_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    records = [
        {"text": "w1 w2 w3", "domain": "a"},
        {"text": "w4 w5", "domain": "b"},
        {"text": "w6 w7 w8", "domain": "a"},
    ]
    assert len(CalibrationSet.build(records, tokenizer, max_length=4)) == 3
    packed = CalibrationSet.build(records, tokenizer, max_length=3, pack=True)
    assert ids_of(packed) == [[1, 4, 5], [1, 7, 8], [6, 1, 9]]
    with pytest.raises(RequestError, match="packing leaves no sample of 50 tokens"):
        CalibrationSet.build(records, tokenizer, max_length=50, pack=True)


def test_batches_hold_every_sample_once_padded_on_the_right(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = CalibrationSet.build([" ".join(["w1"] * n) for n in range(2, 9)], tokenizer)
    seen = []
    for batch in samples.batches(3):
        assert batch.input_ids.shape == batch.attention_mask.shape and len(batch.samples) <= 3
        for index, ids, mask in zip(batch.samples.tolist(), batch.input_ids, batch.attention_mask, strict=True):
            length = samples.samples[index].num_tokens
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert torch.equal(ids[:length], samples.token_ids[index])
            seen.append(index)
    assert sorted(seen) == list(range(7)) and samples.num_batches(3) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the calibration holds no samples"),
        (5, "calibration of type int is not understood"),
        (["w1 w2", {"text": "w3"}], "must hold one kind of thing, and holds dict, str"),
        (["", " "], "holds no samples: of 2 records 2 blank; the first: text 0 is blank"),
        ([{"body": "w1"}], r"record 0 must have 'text' \(a string\) or 'messages' \(a list\); its keys: body"),
        ([{"text": 5}], "record 0 must have 'text'"),
        ([{"text": ["w1", "w2"]}], "record 0 must have 'text'"),
        (["w1 \ud800"], "text 0 is not valid Unicode text"),
        ([torch.tensor([3])], "token sample 0 has 1 token;"),
        (torch.tensor([0.5, 1.5]), "token tensor 0 has dtype torch.float32; token ids are integers"),
        (torch.zeros(2, 2, 2, dtype=torch.long), r"and this one \(2, 2, 2\)"),
    ],
)
def test_broken_inputs_are_refused(tokenizer: PreTrainedTokenizerBase, source: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        CalibrationSet.build(source, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl does not exist"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("blank.txt", b" \n\n ", "blank.txt is empty"),
        ("binary.txt", b"\x80\xff\x00", r"binary.txt is not a text file \(no UTF-8 at byte 0\)"),
        ("bad.jsonl", b'{"text": "w1 w2"}\n\n{"text": oops}\n', "bad.jsonl, line 3 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "list.jsonl, line 1 must be an object"),
        ("keys.jsonl", b'{"body": "w1"}\n', "keys.jsonl, line 1 must have 'text'"),
        ("short.txt", b"w1 w2\n\n\n\n<pad>", None),
        ("text.pdf", b"text", "text.pdf ends in '.pdf'; .jsonl .* and .txt are read"),
        ("data.bin", b"\xff", "data.bin is not a text file"),
    ],
)
def test_broken_files_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, content: bytes | None, message: str | None
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if message is None:  # two tokens: the special one and a word
        assert len(CalibrationSet.build(path, tokenizer)) == 2
        return
    with pytest.raises(RequestError, match=message):
        CalibrationSet.build(path, tokenizer)


def test_a_folder_is_no_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"is a folder; name the \.jsonl or \.txt files in it"):
        CalibrationSet.build(tmp_path, tokenizer)


def test_names_of_files_are_not_taken_for_texts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1 w2")
    with pytest.raises(RequestError, match=r"pass pathlib\.Path objects to read files"):
        CalibrationSet.build([str(tmp_path / "a.txt")], tokenizer)


@pytest.mark.parametrize("length", [80, 150, 300, 2000])
def test_long_lines_are_texts_like_any_other(tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    assert CalibrationSet.build(["w1 " * length, "w2 " * length], tokenizer).num_tokens == 2 * (length + 1)
    with pytest.raises(RequestError, match=r"(no file 'w1 .* can be read .*put it in a list|does not exist)"):
        CalibrationSet.build("w1 " * length, tokenizer)
    with pytest.raises(RequestError, match="to pass a text and not a file's name, put it in a list"):
        CalibrationSet.build("w1\0w2", tokenizer)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="a tokenizer is needed for texts"):
        CalibrationSet.build(["w1 w2"])


@pytest.mark.parametrize("setting", [{"num_samples": 0}, {"max_length": 1}, {"sample_selection": "best"}])
def test_wrong_settings_are_refused(tokenizer: PreTrainedTokenizerBase, setting: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(setting))):
        CalibrationSet.build(TEXTS, tokenizer, **setting)


def test_mixtures_of_datasets(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local folder stands in for a repository on the Hub; everything else is the real library."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        rows = [json.dumps({"text": f"w{i} w{len(name)}"}) for i in range(5)]
        (tmp_path / name / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "test.jsonl").write_text(json.dumps({"text": "w8 w9", "domain": "own"}))
    records = hub_records("./one:2, ./three(test)")
    assert [r["text"] for r in records] == ["w0 w3", "w1 w3", "w8 w9"]
    assert [r["domain"] for r in records] == ["./one", "./one", "own"]
    assert len(CalibrationSet.from_hub("./one:2,./three(test)", tokenizer)) == 3
    with pytest.raises(RequestError, match=r"'a\[b' is not of the form name\[config\]\(split\):samples"):
        hub_records("a[b")


class Endless:
    """A stream of rows that never ends; counts those that were asked for."""

    asked = 0

    def __init__(self, name: str) -> None:
        self.name = name

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number in itertools.count():
            Endless.asked += 1
            row = {"text": f"w{number % 46} w{number // 46 % 46} w{number // 46**2 % 46}"}
            yield row | ({"domain": "ab"[number % 2]} if self.name == "labelled" else {})


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> type[Endless]:
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, streaming: Endless(name))
    monkeypatch.setattr(texts, "POOL_ROWS", 200)
    monkeypatch.setattr(Endless, "asked", 0)
    return Endless


def test_of_an_endless_dataset_the_first_samples_are_read_and_no_more(
    tokenizer: PreTrainedTokenizerBase, endless: type[Endless]
) -> None:
    samples = CalibrationSet.from_hub("one,two", tokenizer, num_samples=10)
    assert endless.asked == 20 and samples.sources == ("hub:one,two",)
    assert len(samples) == samples.duplicates == 5  # the same texts in both
    counted = CalibrationSet.from_hub("one:50", tokenizer, num_samples=10)
    assert endless.asked == 30 and len(counted) == 10
    assert len(CalibrationSet.from_hub("one:50", tokenizer)) == 50


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 10, "sample_selection": "random"},
        {"num_samples": 10, "sample_selection": "kmeans"},
        {"num_clusters": 10, "sample_selection": "kmeans"},
        {"num_samples": 10, "pack": True, "max_length": 8},
    ],
)
def test_of_an_endless_dataset_samples_are_chosen_among_its_beginning(
    tokenizer: PreTrainedTokenizerBase, endless: type[Endless], options: dict, caplog: pytest.LogCaptureFixture
) -> None:
    samples = CalibrationSet.from_hub("one", tokenizer, **options)
    assert len(samples) == 10 and endless.asked == 201
    assert "samples are chosen among the first 200 rows of one; one:N takes N." in caplog.text
    caplog.clear()
    again = CalibrationSet.from_hub("one:200", tokenizer, **options)
    assert again.samples == samples.samples and "are chosen among" not in caplog.text


def test_all_of_an_endless_dataset_are_refused(tokenizer: PreTrainedTokenizerBase, endless: type[Endless]) -> None:
    with pytest.raises(RequestError, match=r"one has more than 200 rows.*how many to read \(one:200\), or"):
        CalibrationSet.from_hub("one", tokenizer)


def test_domains_inside_a_dataset_share_its_beginning(
    tokenizer: PreTrainedTokenizerBase, endless: type[Endless]
) -> None:
    samples = CalibrationSet.from_hub("labelled", tokenizer, num_samples=10)
    assert Counter(s.domain for s in samples.samples) == {"a": 5, "b": 5} and endless.asked == 201


def test_equal_shares() -> None:
    assert equal_shares("bbabca", 4) == [0, 2, 4, 1]
    assert equal_shares("bbabca", 99) == [0, 2, 4, 1, 5, 3]
    assert equal_shares("", 3) == equal_shares("ab", 0) == []


def test_a_part_of_the_samples_is_taken_in_equal_shares(tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"text": f"w{i} w1", "domain": "b"} for i in range(9)]
    records += [{"text": f"w{i} w2", "domain": "a"} for i in range(2)]
    samples = CalibrationSet.build(records, tokenizer)
    for number, shares in ((1, {"a": 1}), (2, {"a": 1, "b": 1}), (7, {"a": 2, "b": 5}), (99, {"a": 2, "b": 9})):
        taken = samples.take(number)
        assert Counter(s.domain for s in taken.samples) == shares
        of_b = [s for s in samples.samples if s.domain == "b"]
        assert [s for s in taken.samples if s.domain == "b"] == of_b[: shares.get("b", 0)]
