# SPDX-License-Identifier: Apache-2.0
"""What was lost in words, and tables in which the best stands out."""

from __future__ import annotations

import json
import math

import pytest

from optimum_moe_prune.evaluation.comparison import Comparison, ModelResult, reference_of
from optimum_moe_prune.evaluation.losses import DomainResult, Evaluation
from optimum_moe_prune.evaluation.speed import Generation
from optimum_moe_prune.evaluation.tables import Table, best_of
from optimum_moe_prune.evaluation.verdict import times, verdict_of


def of(ratio: float, samples: int = 20, interval: tuple[float, float] | None = None) -> DomainResult:
    return DomainResult(samples, 100, 2 + math.log(ratio), 2.0, 0.1, 0.9, interval)


def judged(**ratios: float) -> Evaluation:
    return Evaluation({name: of(ratio) for name, ratio in ratios.items()})


def test_the_sentence_of_the_example() -> None:
    assert verdict_of(judged(chat=1.01, code=1.6, math=4.0, all=2.1)) == (
        "Perplexity doubled (x 2.1); worst on math, about four times (x 4.0); best on chat, practically unchanged "
        "(x 1.01)."
    )


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.0, "is practically unchanged (x 1.00)"),
        (0.9, "fell by 10% (x 0.90)"),
        (1.15, "rose by 15% (x 1.15)"),
        (1.9, "doubled (x 1.90)"),
        (2.5, "is 2.5 times that of the original (x 2.5)"),
        (3.1, "tripled (x 3.1)"),
        (5.1, "is about five times that of the original (x 5.1)"),
        (42.0, "is 42 times that of the original (x 42)"),
        (5000.0, "is more than a hundred times that of the original (x 5,000): the model no longer works"),
    ],
)
def test_one_domain_has_one_part(ratio: float, words: str) -> None:
    assert verdict_of(judged(default=ratio)) == f"Perplexity {words}."


def test_many_domains_alike_and_what_keeps_it_uncertain() -> None:
    assert verdict_of(judged(a=1.30, b=1.32, all=1.31)).endswith(", about the same on every domain.")
    assert verdict_of(judged(a=0.8, b=1.3, all=1.1)).endswith(
        "worst on b, 30% more (x 1.30); best on a, 20% less (x 0.80)."
    )
    few = Evaluation({"d": of(1.5, samples=3)})
    assert verdict_of(few).endswith(" Only 3 samples were judged: too few to be sure.")
    unsure = Evaluation({"d": of(1.2, interval=(-0.1, 0.4))})
    assert verdict_of(unsure).endswith(" With other texts it may as well be unchanged (95% interval).")
    assert "95%" not in verdict_of(Evaluation({"d": of(1.2, interval=(0.1, 0.3))}))


def test_beyond_all_numbers_and_without_a_reference() -> None:
    broken = Evaluation({"d": DomainResult(20, 100, 1e4, 2.0, 9.0, 0.0)})
    assert "(x a million or more): the model no longer works." in verdict_of(broken)
    both = Evaluation({"a": broken.domains["d"], "b": of(1.0), "all": broken.domains["d"]})
    assert "worst on a, broken (x a million or more); best on b, practically unchanged" in verdict_of(both)
    assert verdict_of(Evaluation({"d": DomainResult(20, 100, 3.0)})) == "" == verdict_of(Evaluation({}))
    assert [times(n) for n in (1.994, 1.996, 9.99, 12.3, 1234.5, math.inf)] == [
        "x 1.99", "x 2.0", "x 10.0", "x 12", "x 1,234", "x a million or more",
    ]  # fmt: skip


def test_several_models_have_a_sentence_each() -> None:
    models = {name: ModelResult(judged(d=ratio)) for name, ratio in (("x", 2.0), ("y", 1.1))}
    comparison = Comparison({**models, "o": ModelResult(reference_of(models["x"].evaluation))}, "o")
    assert comparison.verdict().splitlines() == [
        "x: Perplexity doubled (x 2.0).",
        "y: Perplexity rose by 10% (x 1.10).",
    ]
    words = comparison.summary().split("\n\n")[1]
    assert " ".join(words.split()).count("nats per token: 0.1 is 11% more perplexity") == 1
    alone = Comparison({"m": ModelResult(Evaluation({"d": DomainResult(9, 90, 1.0)}))}).summary()
    assert "Perplexity: among how many" in alone and "Lost" not in alone and "KL" not in alone


def test_the_best_of_each_row_stands_out() -> None:
    rows = [["", "a", "b", "c"], ["x", "0.2", "0.1", "0.1"], ["y", "1", "", "0.5"], ["z", "3", "3", "3"]]
    table = Table(rows, best_of(rows, float))
    assert table.best == {(1, 2), (1, 3), (2, 3)}
    assert table.markdown().splitlines()[2:] == [
        "| x | 0.2 | **0.1** | **0.1** |", "| y | 1 |  | **0.5** |", "| z | 3 | 3 | 3 |",
    ]  # fmt: skip
    plain, bold = table.text().splitlines(), table.text(bold=True).splitlines()
    assert [line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in bold] == plain
    assert bold[1] == "x  0.2  \x1b[1m0.1\x1b[0m  \x1b[1m0.1\x1b[0m"
    parts = table.text(width=8).split("\n\n")
    assert [part.splitlines()[0].split() for part in parts] == [["a"], ["b"], ["c"]]
    assert table.transposed().best == {(2, 1), (3, 1), (3, 2)}


def test_models_are_columns_and_the_original_is_last() -> None:
    ratios = {"big": (1.1, 1.2, 1.15), "small": (1.3, 1.1, 1.2)}
    models = {name: ModelResult(judged(a=r[0], b=r[1], all=r[2]), 10, 20) for name, r in ratios.items()}
    original = ModelResult(reference_of(models["big"].evaluation), 30, 60)
    text = Comparison({**models, "o": original}, "o").summary(bold=True)
    lines = [line.replace("\x1b[1m", "*").replace("\x1b[0m", "").split() for line in text.splitlines()]
    assert lines[0] == ["lost", "(nats)", "big", "small"]
    assert lines[1] == ["a", "*0.095", "0.262"] and lines[2] == ["b", "0.182", "*0.095"]
    assert lines[3] == ["mean", "*0.139", "0.179"] and lines[4] == ["all", "text", "*0.140", "0.182"]
    assert lines[5] == ["perplexity", "x", "1.15", "x", "1.20"]
    sizes = next(i for i, line in enumerate(lines) if line[:1] == ["model"])
    assert lines[sizes] == ["model", "big", "small", "o"] and lines[sizes + 1] == ["parameters", "10", "10", "30"]


def test_a_speed_without_a_spread_is_not_shown() -> None:
    before = {"prompt_tokens": 8, "new_tokens": 4, "prompt_seconds": 0.1, "tokens_per_second": 77.7}
    before |= {"peak_memory_bytes": 2 * 10**9}
    values = {"format_version": 1, "reference": None, "models": {"m": {"domains": {}, "generation": before}}}
    old = Comparison.from_dict(values)
    assert "77.7" not in old.summary() and "peak memory (GB)" in old.summary()
    assert old.to_dict()["models"]["m"]["generation"] == before, "and kept as it was"
    now = Generation(8, 4, 0.1, 77.7, 10**9, 5, (70.0, 80.0), 1.25, (1.1, 1.3), "a processor, 1 thread")
    shown = Comparison({"m": ModelResult(generation=now), "o": ModelResult(generation=now)}, "o")
    text = " ".join(shown.summary().split())
    assert "77.7 (70 to 80)" in text and "1.25 (1.1 to 1.3)" in text
    assert (
        "medians of 5 rounds, in turn with o, with the least and the most" in text and "a processor, 1 thread" in text
    )
    assert Comparison.from_dict(json.loads(json.dumps(shown.to_dict()))) == shown
