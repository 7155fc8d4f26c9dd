# SPDX-License-Identifier: Apache-2.0
"""Files as people have them: formats, compression, tables, marks and line ends; and large ones."""

from __future__ import annotations

import builtins
import bz2
import gzip
import json
import lzma
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from optimum_moe_prune import CalibrationSet, RequestError
from optimum_moe_prune.calibration import texts
from optimum_moe_prune.calibration.readers import domain_of, rows_of
from optimum_moe_prune.calibration.records import BadRecord, Reading
from optimum_moe_prune.calibration.tokens import first_tokens

ROWS = [{"text": "w1 w2 w3"}, {"text": "w4 w5"}, {"text": "w6 w7 w8 w9"}]
TEXTS = [row["text"] for row in ROWS]
LINES = "\n".join(map(json.dumps, ROWS))


def read(path: Path, reading: Reading = Reading()) -> list[Any]:
    return [row.get("text") if isinstance(row, dict) else row for _, row in rows_of(path, reading)]


FILES = {
    "a.jsonl": LINES.encode(),
    "a.JSONL": LINES.encode(),
    "a.ndjson": LINES.replace("\n", "\r\n\r\n").encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "wide.jsonl": LINES.encode("utf-16"),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "data.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "rows.json": json.dumps({"rows": ROWS}).encode(),
    "strings.json": json.dumps(TEXTS).encode(),
    "lines.json": LINES.encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode(), mtime=0),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode(), mtime=0),
    "a.txt.gz": gzip.compress("\n\n".join(TEXTS).encode(), mtime=0),
    "a.csv.gz": gzip.compress("\n".join(["text", *TEXTS]).encode(), mtime=0),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.jsonl.xz": lzma.compress(LINES.encode()),
    "a.csv": ("text,n\r\n" + "".join(f'"{t}",1\r\n' for t in TEXTS)).encode("utf-8-sig"),
    "semicolon.csv": ("n;text\n" + "".join(f"1;{t}\n" for t in TEXTS)).encode(),
    "a.tsv": ("text\tn\n" + "".join(f"{t}\t1\n" for t in TEXTS)).encode(),
    "a.txt": "\r\n\r\n".join(TEXTS).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert read(tmp_path / name) == TEXTS
    assert domain_of(tmp_path / name) == name.split(".")[0]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{**row, "more": {"a": 1}} for row in ROWS]).to_parquet(path)
    datasets.enable_progress_bars()
    assert read(path) == TEXTS and [dict(row) for _, row in rows_of(path)] == ROWS  # no other column is read
    with pytest.raises(RequestError, match=r"a\.parquet, row 1 has no column 'body'; its keys: text"):
        CalibrationSet.build(path, object(), text_column="body")
    (tmp_path / "b.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RequestError, match=r"b\.parquet is damaged or not \.parquet: "):
        read(tmp_path / "b.parquet")
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: real("no_such_" + name if "pyarrow" in name else name, *a, **k)
    )
    with pytest.raises(RequestError, match=r"a\.parquet: \.parquet needs the \[datasets\] extra: pip install"):
        read(path)


def test_markdown_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# w1\n\nw2\n\n- w3\n")
    assert read(tmp_path / "a.md") == ["# w1\n\nw2\n\n- w3"]


def test_tables_hold_long_fields_quotes_and_line_ends(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "a.csv"
    long = "w1 " * 100_000
    path.write_text(f'body,domain\n"{long}",x\n"w1 ""w2"",\n\nw3",y\n,y\nw4,z,w5\nw5 w6,z\n', newline="")
    with pytest.raises(RequestError, match=r"a\.csv, line 7 has 3 fields, and the head 2\. To leave"):
        CalibrationSet.build(path, tokenizer, text_column="body")
    samples = CalibrationSet.build(path, tokenizer, text_column="body", skip_bad=True, max_length=64)
    assert sorted((s.domain, s.num_tokens) for s in samples.samples) == [("x", 64), ("y", 4), ("z", 3)]
    assert samples.notes() == (
        "1 of 3 samples are longer than 64 tokens and were cut.",
        "1 of 5 records is blank and left out.",
        "1 of 5 records is left out as unusable; the first: a.csv, line 7 has 3 fields, and the head 2.",
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"w1 w2", r"a\.jsonl\.gz is damaged or not \.gz"),
        ("cut.jsonl.gz", FILES["a.jsonl.gz"][:-9], r"is damaged or not \.gz"),
        ("a.jsonl.bz2", b"w1 w2", r"is damaged or not \.bz2"),
        ("a.jsonl.xz", b"w1 w2", r"is damaged or not \.xz"),
        ("a.jsonl.zst", b"w1", r"unpack it first \(zstd -d\)"),
        ("a.zip", b"PK", r"unpack it first \(unzip\)"),
        ("a.json", b"{", r"a\.json is not JSON"),
        ("a.json", b"5", "holds a int, and not an array of records"),
        ("a.json", b"[5]", r"a\.json, record 1 must be an object"),
        ("a.json", b"[]", "is empty"),
        ("a.json", b'{"a": 1}', "record 1 must have 'text'.*; its keys: a. Name the column"),
        ("a.csv", b"text\n", "is empty"),
        ("a.md", b" \n", "is empty"),
        ("array.jsonl", b'[\n{"text": "w1 w2"}\n]\n', r"line 1 is not JSON.*; a file of one array is named \.json"),
        ("deep.jsonl", b"[" * 100_000, r"deep\.jsonl, line 1 is not JSON"),
        ("a.txt", b"w1 \xff", r"is not a text file \(no UTF-8 at byte 3\)"),
        ("a.txt.gz", gzip.compress(b"w1 \xe2\x82", mtime=0), r"is not a text file \(no UTF-8 at byte 5\)"),
    ],
)
def test_damaged_files_are_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message) as error:
        CalibrationSet.build(tmp_path / name, tokenizer)
    assert "\n" not in str(error.value)


def test_folders_say_what_is_in_them_and_pipes_are_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"name the \.jsonl or \.txt files in it \(none\)\."):
        read(tmp_path)
    for name in ("a.jsonl", "b.csv.gz", "c.pdf"):
        (tmp_path / name).touch()
    with pytest.raises(RequestError, match=r"in it \(there are a\.jsonl, b\.csv\.gz\)\."):
        read(tmp_path)
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(RequestError, match="is a pipe or a device"):
        read(tmp_path / "d.jsonl")


@pytest.mark.parametrize("seed", range(40))
def test_documents_are_those_between_blank_lines(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice(["w1", "\n", "\n\n", " ", "\t", "\x0b", "\n \n", "é"]) for _ in range(60))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    expected = [part.strip("\n") for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    assert (read(tmp_path / "a.txt") if expected else []) == expected


# -------------------------------------------------------------------------------------------- large files and texts


@pytest.fixture
def lines_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the rows that are read of files, all of which count as large."""
    counted = [0]
    real = texts.rows_of

    def rows(path: Path, reading: Reading) -> Iterator[Any]:
        for row in real(path, reading):
            counted[0] += 1
            yield row

    monkeypatch.setattr(texts, "rows_of", rows)
    monkeypatch.setattr(texts, "LARGE_FILE", 0)
    yield counted


def test_of_large_files_no_more_is_read_than_is_used(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, lines_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"w{n % 90} w{n // 90}"} for n in range(2000)]
    path.write_text("\n".join(map(json.dumps, rows)))
    samples = CalibrationSet.build(path, tokenizer, num_samples=10)
    assert len(samples) == 10 and lines_read == [10]
    assert samples.notes() == ("a.jsonl was read as far as it was used, 10 records that say no domain.",)
    lines_read[0] = 0
    packed = CalibrationSet.build(path, tokenizer, num_samples=10, max_length=6, pack=True)
    assert len(packed) == 10 and lines_read == [20]
    lines_read[0] = 0
    assert len(CalibrationSet.build(path, tokenizer, num_samples=10, sample_selection="random")) == 10
    assert lines_read == [4000]  # twice: nothing is held but the chosen ones
    # Where records say their domains, all are read, since the last may be of another one.
    rows[0]["domain"], rows[-1]["domain"] = "first", "last"
    path.write_text("\n".join(map(json.dumps, rows)))
    domains = {s.domain for s in CalibrationSet.build(path, tokenizer, num_samples=10).samples}
    assert domains == {"first", "a", "last"}
    # And in small files too.
    rows[0].pop("domain")
    path.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(texts, "LARGE_FILE", 10**9)
    assert {s.domain for s in CalibrationSet.build(path, tokenizer, num_samples=10).samples} == {"a", "last"}


def words(text: str) -> list[int]:
    """A tokenizer of words, an end mark, and pairs of the same word as one token."""
    ids = [1]
    for word in text.split():
        ids[-1:] = [ids[-1] + 1000] if ids[-1] == len(word) else [ids[-1], len(word)]
    return [*ids, 2]


@pytest.mark.parametrize("seed", range(20))
def test_of_long_texts_the_first_tokens_are_those_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join("x" * rng.randrange(1, 9) + rng.choice([" ", " ", "\n" * rng.randrange(400)]) for _ in range(9000))
    for limit in (2, 100, 1000, 100_000):
        seen: list[int] = []

        def ids(part: str, seen: list[int] = seen) -> list[int]:
            seen.append(len(part))
            return words(part)

        found = first_tokens(text, ids, limit)
        assert found[:limit] == words(text)[:limit] and (len(found) > limit) == (len(words(text)) > limit)
        assert sum(seen) < len(text) or limit > 100
    assert first_tokens(text, words, None) == words(text)


def test_a_long_line_is_cut_before_it_is_tokenised(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = [0]

    class Counting:
        chat_template = None

        def __call__(self, text: str, **options: Any) -> Any:
            longest[0] = max(longest[0], len(text))
            return tokenizer(text, **options)

    text = "w1 w2 w3 " * 100_000
    samples = CalibrationSet.build([text], Counting(), max_length=64)
    assert longest[0] < 5000 and samples.truncated == 1
    assert torch.equal(samples.token_ids[0], CalibrationSet.build([text[:900]], tokenizer, max_length=64).token_ids[0])


def test_a_bad_row_is_no_exception_before_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": \n{"text": "w1 w2"}\n')
    bad, good = [row for _, row in rows_of(tmp_path / "a.jsonl")]
    assert isinstance(bad, BadRecord) and good == {"text": "w1 w2"}
