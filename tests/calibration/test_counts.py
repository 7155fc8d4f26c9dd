# SPDX-License-Identifier: Apache-2.0
"""What became of the records: what is left out and counted, what is said, and that a choice fills up."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from transformers import PreTrainedTokenizerBase

from optimum_moe_prune import CalibrationSet, RequestError, calibrate


@pytest.mark.parametrize("selection", ["first", "random"])
def test_blank_and_short_records_are_left_out_and_others_take_their_places(selection: str) -> None:
    tokenizer = make_tokenizer(bos=False)
    records: list[dict[str, Any]] = [{"text": t} for t in ("", " \n", "w1", "w2 w3", "w4", "w5 w6", "w7 w8")]
    records += [{"text": None}, {"messages": []}, {"text": "w9 w10"}]
    samples = CalibrationSet.build(records, tokenizer, num_samples=3, sample_selection=selection)
    assert len(samples) == 3 and samples.counts.read == 10 and samples.counts.blank == 4
    every = CalibrationSet.build(records, tokenizer)
    assert len(every) == 4 and (every.counts.blank, every.counts.too_short) == (4, 2)
    assert every.notes() == (
        "4 of 10 records are blank and left out.",
        "2 of 10 records are shorter than two tokens and left out.",
    )
    few = CalibrationSet.build(records, tokenizer, num_samples=128, sample_selection=selection)
    assert few.samples == every.samples
    assert few.notes() == (*every.notes(), "4 samples of the 128 asked for: there are no more.")
    assert few.counts.warnings() == every.notes()


def test_packing_leaves_blank_records_out_and_counts_the_rest(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = CalibrationSet.build(["", "w1 w2", "", "w3"], tokenizer, pack=True, max_length=5)
    assert samples.token_ids[0].tolist() == [1, 4, 5, 1, 6] and samples.counts.blank == 2


def test_nothing_left_says_why() -> None:
    with pytest.raises(RequestError, match=r"of 3 records 2 blank, 1 shorter than two tokens; the first: text 0 is"):
        CalibrationSet.build(["", "w1", ""], make_tokenizer(bos=False))
    with pytest.raises(RequestError, match="of 1 record 1 unusable; the first: record 0 must have"):
        CalibrationSet.build([{"a": 1}], make_tokenizer(), skip_bad=True)


@pytest.mark.parametrize("turned", [False, True])
def test_the_same_text_in_two_domains_is_told_whichever_comes_first(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, turned: bool
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "w1 w2"}) + "\n" + json.dumps({"text": "w3 w4"}))
    (tmp_path / "b.txt").write_text("w5 w6\n\nw3 w4")
    files = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    samples = CalibrationSet.build(files[::-1] if turned else files, tokenizer)
    places = ["a.jsonl, line 2, of domain 'a'", "b.txt, document 2, of domain 'b'"]
    first, second = places[::-1] if turned else places
    assert samples.notes() == (
        "1 samples have the same tokens as another one and were left out.",
        f"1 text is in two domains, and counted for the one read first: {first}, and "
        f"{second.replace('of domain', 'of')}.",
    )
    assert Counter(s.domain for s in samples.samples) == {"b" if turned else "a": 2, "a" if turned else "b": 1}


def test_domains_without_a_sample_are_told(tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"text": f"w{i} w{i + 1}", "domain": f"d{i % 5}"} for i in range(20)]
    records.append({"text": "", "domain": "blank"})
    samples = CalibrationSet.build(records, tokenizer, num_samples=3)
    assert sorted(s.domain for s in samples.samples) == ["d0", "d1", "d2"]
    assert samples.counts.empty_domains == ("d3", "d4", "blank")
    assert samples.notes()[1] == (
        "No sample comes from 3 domains 'd3', 'd4', 'blank': what only they need may be pruned."
    )
    assert CalibrationSet.build(records, tokenizer, num_samples=5).counts.empty_domains == ("blank",)


def test_what_became_of_the_records_is_in_the_statistics(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["w1 w2 w3 w4 w5", "", "w6 w7"]
    samples = CalibrationSet.build(texts, tokenizer, max_length=4, num_samples=9)
    provenance = calibrate(make_model(), samples, "frequency").provenance
    assert provenance["calibration_notes"] == [
        "1 of 2 samples are longer than 4 tokens and were cut.",
        "1 of 3 records is blank and left out.",
        "2 samples of the 9 asked for: there are no more.",
    ]
    assert provenance["calibration_counts"] == {
        "read": 3,
        "blank": 1,
        "too_short": 0,
        "bad": 0,
        "first_bad": "",
        "duplicates": 0,
        "truncated": 1,
        "max_length": 4,
        "requested": 9,
        "samples": 2,
        "empty_domains": [],
        "remarks": [],
    }
    json.dumps(provenance["calibration_counts"])
