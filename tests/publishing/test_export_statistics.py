# SPDX-License-Identifier: Apache-2.0
"""Bits for each expert and an order of experts: against brute force, there and back, and as other programs read it."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from oracles import call, softmax_rule
from synthetic import random_statistics

from optimum_moe_prune import CalibrationSet, CalibrationStats, Need, PruningPlan, RequestError, calibrate
from optimum_moe_prune.publishing.export_statistics import (
    STATISTICS_FORMATS,
    check_exported,
    export_statistics,
    import_bits,
    import_order,
)
from optimum_moe_prune.publishing.ranking import assigned_bits


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    return random_statistics(softmax_rule(2), 3, 8)


def halved(stats: CalibrationStats) -> PruningPlan:
    model = stats.model
    retained = {layer: tuple(range(layer % 2, 8, 2)) for layer in stats.layers}
    return PruningPlan("mixtral", 2, "by hand", retained, stats.num_experts, provenance={"model": model})


def text_of(stats: CalibrationStats, format: str, **settings: Any) -> str:
    return export_statistics(stats, format, **({} if format in ("order", "sglang") else {"bits": 3}), **settings)


@pytest.mark.parametrize("mean", [2, 2.4, 3, 3.7, 4, 8])
def test_bits_have_the_least_error(mean: float) -> None:
    """By trying all, where steps are of one bit; where they are not, the room that is left is less than a step."""
    draw = torch.Generator().manual_seed(0)
    for widths in ((2, 3, 4), (2, 3, 4, 8)):
        scores = (torch.rand(5, generator=draw) * 10).square().tolist()
        found = assigned_bits(scores, widths, min(mean, widths[-1]))

        def error(bits: Any, scores: list[float] = scores) -> float:
            return sum(s * 4.0**-b for s, b in zip(scores, bits, strict=True))

        fitting = [b for b in itertools.product(widths, repeat=5) if sum(b) <= mean * 5 + 1e-9]
        assert sum(found) <= mean * 5 + 1e-9
        if widths == (2, 3, 4):
            assert error(found) == pytest.approx(min(map(error, fitting)))
        by_score = sorted(range(5), key=lambda e: -scores[e])
        assert sorted(found, reverse=True) == [found[e] for e in by_score], "who matters more has no fewer"


def test_equal_experts_get_bits_by_their_number() -> None:
    assert assigned_bits([1.0, 1.0, 1.0, 1.0], (2, 4), 3) == [4, 4, 2, 2]
    assert assigned_bits([0.0, 0.0], (2, 3), 2.5) == [3, 2]
    assert assigned_bits([5.0], (4,), 4) == [4]


def test_ranks_are_of_contributions(stats: CalibrationStats) -> None:
    values = json.loads(text_of(stats, "order"))
    assert values["score"] == "contribution" and values["numbering"] == "original"
    assert values["modules"] == "layers.{layer}.mlp.experts.{expert}"
    for index, layer in stats.layers.items():
        tokens, norms = (layer.tensors[name].sum(0) for name in ("routed_tokens", "norm_applied"))
        scores = norms.square() / tokens.clamp(min=1e-300)
        entry = values["layers"][str(index)]
        assert entry["tokens"] == tokens.tolist()
        torch.testing.assert_close(torch.tensor(entry["scores"], dtype=torch.float64), scores)
        assert entry["ranking"] == scores.argsort(descending=True, stable=True).tolist()
        assert entry["covered"][-1] == 1.0 and entry["covered"] == sorted(entry["covered"])


def test_without_norms_tokens_count(samples: CalibrationSet) -> None:
    counted = calibrate(make_model(), samples, [Need.ROUTING])
    values = json.loads(export_statistics(counted))
    assert values["score"] == "tokens"
    assert all(entry["scores"] == entry["tokens"] for entry in values["layers"].values())
    with pytest.raises(RequestError, match="experts are ranked by the tokens routed to them"):
        export_statistics(calibrate(make_model(), samples, [Need.INPUTS]))


def test_shares_of_domains_count(stats: CalibrationStats) -> None:
    domains = sorted({sample.domain for sample in stats.samples})
    weighted = stats.with_domain_weights({domain: 10.0**number for number, domain in enumerate(domains)})
    assert export_statistics(weighted) != export_statistics(stats)
    assert json.loads(export_statistics(weighted))["domain_weights"] == weighted.domain_weights


@pytest.mark.parametrize("plan", [False, True])
def test_there_and_back(stats: CalibrationStats, plan: bool) -> None:
    given = halved(stats) if plan else None
    bits, order = (text_of(stats, name, plan=given) for name in ("bits", "order"))
    count = 4 if plan else 8
    assert {len(found) for found in import_bits(bits).values()} == {count}
    assert all(sum(found) == 3 * count for found in import_bits(bits).values()), "as 2, 3, 4 and 8 allow here"
    for index, ranking in import_order(order).items():
        entry = json.loads(order)["layers"][str(index)]
        assert sorted(ranking) == list(range(count)) and ranking == tuple(entry["ranking"])
        assert entry["original"] == list(given.retained[index] if given else range(8))
    for format in STATISTICS_FORMATS:
        text = text_of(stats, format, plan=given)
        check_exported(text, format)
        for other in {*STATISTICS_FORMATS} - {format}:
            with pytest.raises(RequestError):
                check_exported(text, other)


def test_packers_match_each_module_once(stats: CalibrationStats) -> None:
    """By their own rules: AutoRound escapes dots and searches, GPTQModel matches from the beginning."""
    expected = import_bits(text_of(stats, "bits"))
    patterns = {
        "auto-round": lambda key: re.compile(".*" + key.replace(".", r"\.") + ".*").search,
        "gptqmodel": lambda key: re.compile(key.removeprefix("+:")).match,
    }
    for format, compiled in patterns.items():
        values = json.loads(text_of(stats, format))
        rules = [(compiled(key), value["bits"]) for key, value in values.items()]
        for prefix in ("model.", "model.language_model."):
            for index, bits in expected.items():
                for expert, width in enumerate(bits):
                    name = f"{prefix}layers.{index}.mlp.experts.{expert}.down_proj"
                    assert [found for matches, found in rules if matches(name)] == [width], (format, name)
        for name in ("model.layers.1.mlp.gate", "model.layers.11.mlp.experts.1.up_proj", "lm_head"):
            assert not [found for matches, found in rules if matches(name)]
        assert not [m for m, _ in rules if m("model.layers.0.mlp.experts.10.up_proj")]


def test_counts_for_a_server(stats: CalibrationStats) -> None:
    """A row for each decoder layer, dense ones too, as it indexes rows by layers."""
    values = json.loads(export_statistics(stats, "sglang"))
    assert values == {
        "logical_count": [layer.tensors["routed_tokens"].sum(0).int().tolist() for layer in stats.layers.values()]
    }
    moved = dict(zip((0, 2, 3), stats.layers.values(), strict=True))
    with_dense = replace(stats, layers=moved, model={**stats.model, "dense_layers": [1]})
    rows = json.loads(export_statistics(with_dense, "sglang"))["logical_count"]
    assert rows[1] == [0] * 8 and [rows[0], *rows[2:]] == values["logical_count"]
    plan = halved(stats)
    unequal = replace(plan, retained={**plan.retained, 0: (0, 1, 2)})
    with pytest.raises(RequestError, match="layers have 3 to 4 experts"):
        export_statistics(stats, "sglang", plan=unequal)


def test_requests_that_cannot_be_met(stats: CalibrationStats) -> None:
    for settings, said in (
        ({"format": "gguf"}, "export format 'gguf' is not known of statistics"),
        ({"format": "bits"}, "bits is None"),
        ({"format": "bits", "bits": 1.5}, "from 2 to 8"),
        ({"format": "bits", "bits": 3, "widths": (4, 2)}, "rising"),
        ({"format": "bits", "bits": 3, "widths": ()}, "widths are"),
        ({"format": "bits", "bits": 3, "widths": (2, 2.5)}, "whole numbers"),
    ):
        with pytest.raises(RequestError, match=said):
            export_statistics(stats, **settings)
    plan = halved(stats)
    other = replace(plan, provenance={"model": {"fingerprint": "another"}})
    with pytest.raises(RequestError, match="different models"):
        export_statistics(stats, plan=other)
    unknown = replace(stats, model={**stats.model, "model_type": "of_another_package"})
    assert json.loads(export_statistics(unknown))["modules"] is None
    with pytest.raises(RequestError, match="use the format 'bits'"):
        export_statistics(unknown, "gptqmodel", bits=3)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "gguf", "format is 'gguf'"),
        (("format_version",), 2, "format version 2"),
        (("score",), "luck", "score is 'luck'"),
        (("numbering",), None, "numbering None"),
        (("layers",), {}, "name no layers"),
        (("layers",), [], "damaged"),
        (("layers", "0", "num_experts"), 7, "must have 7 values"),
        (("layers", "0", "num_experts"), "8", "num_experts is '8'"),
        (("layers", "0", "ranking"), [0, 1, 2, 3, 4, 5, 6, 7], "contradict"),
        (("layers", "0", "scores"), [1.0] * 8, "contradict"),
        (("layers", "0", "original"), [7, 6, 5, 4, 3, 2, 1, 0], "contradict"),
        (("layers", "0", "tokens"), 7, "damaged"),
        (("layers", "0", "bits"), [5] * 8, "bits are"),
        (("layers", "0", "bits"), [4] * 8, "more than 3"),
        (("widths",), "2,3", "widths are"),
        (("layers", "00"), {"num_experts": 8}, "layer 00"),
        (("layers", "x"), {"num_experts": 8}, "damaged"),
    ],
)
def test_a_changed_file_is_refused(stats: CalibrationStats, path: tuple[str, ...], value: Any, message: str) -> None:
    values = json.loads(text_of(stats, "bits"))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(RequestError, match=message):
        import_bits(json.dumps(values))


def test_a_damaged_file_is_refused(stats: CalibrationStats) -> None:
    cut = text_of(stats, "order")[:-10]
    for damaged, format in itertools.product(
        ("", "null", "[]", "{}", cut, "[" * 100_000, '{"a": {"bits": 3}}'), STATISTICS_FORMATS
    ):
        with pytest.raises(RequestError):
            check_exported(damaged, format)


def test_from_the_command_line(stats: CalibrationStats, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, layer in stats.layers.items():
        extra = {"token_dense_norm": torch.ones(120, 8), "token_output_energy": torch.ones(120, 1)}
        stats.layers[index] = replace(layer, tensors={**extra, **layer.tensors})
    folder, output = stats.save(tmp_path / "stats"), tmp_path / "out.json"
    export = ["export", "--stats", folder]
    code, printed, err = call(capsys, *export, "--format", "bits", "--bits", 2.5, "--bit-widths", "2,3", output)
    assert code == 0 and printed.strip() == str(output), err
    assert output.read_text() == export_statistics(stats, "bits", bits=2.5, widths=(2, 3))
    assert call(capsys, *export, "--format", "bits", "--bits", 3, "--overwrite", output)[0] == 0
    code, _, err = call(capsys, *export, "--format", "order", "--overwrite", output)
    assert code == 2 and str(output) in err, "a file of another format is not replaced"
    halved(stats).save(tmp_path / "plan.json")
    code, _, err = call(capsys, *export, "--plan", tmp_path / "plan.json", "--format", "order", tmp_path / "o.json")
    assert code == 0 and len(import_order((tmp_path / "o.json").read_text())[0]) == 4, err
