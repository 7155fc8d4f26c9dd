# SPDX-License-Identifier: Apache-2.0
"""The report: figures show what was measured, the page is sound and safe, and files are whole or absent."""

from __future__ import annotations

import base64
import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from conftest import make_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic import GroupedTopK, random_statistics

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    MoEPrunerConfig,
    Need,
    PruningPlan,
    RequestError,
    RunError,
)
from optimum_moe_prune.architectures.routers import SoftmaxTopK
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.evaluation.comparison import Comparison
from optimum_moe_prune.methods import pathfinder
from optimum_moe_prune.methods.budget import UniformBudget
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.planning.sensitivity import Sensitivity
from optimum_moe_prune.publishing.report import charts, explain, graphs, maps, require_matplotlib, write_report
from optimum_moe_prune.publishing.report.data import (
    coverage,
    named,
    relative,
    retained_grid,
    routing_share,
    single_error,
)
from optimum_moe_prune.publishing.report.drawing import style
from optimum_moe_prune.publishing.report.text import number, plain, short, spans
from optimum_moe_prune.statistics.samples import Sample, keep_tokens
from optimum_moe_prune.statistics.stats import LayerStats

DOMAINS = ("high", "low")


@pytest.fixture(scope="module")
def stats(samples: CalibrationSet) -> CalibrationStats:
    """Of a Qwen2-MoE with 7 experts in layers 0 and 2, of which 3 are used; layer 1 is dense."""
    return collect(make_model("qwen2_moe"), samples, set(Need))


def planned(stats: CalibrationStats, method: str, **settings: Any) -> PruningPlan:
    settings = {"num_experts": 4, **settings}
    weights = settings.pop("domain_weights", None)
    return build_plan(stats, MoEPrunerConfig(method=method, **settings), weights)


@pytest.fixture(scope="module")
def plans(stats: CalibrationStats) -> dict[str, PruningPlan]:
    return {
        "clusters": planned(stats, "mosaic", method_options={"num_domains": 5}),
        "paths": planned(stats, "pathfinder"),
        "scores": planned(stats, "reap", num_experts=None, sparsity=0.3, allocation="global"),
    }


def a_sensitivity(layers: int = 3, methods: tuple[str, ...] = ("mosaic", "reap"), low: str = "low") -> dict[str, Any]:
    """Costs that differ in every place, so that none can be taken for another."""

    def costs(*place: float) -> dict[str, float]:
        whole = 0.001 * math.exp(sum(p * w for p, w in zip(place, (1.1, 0.7, 0.31), strict=False)))
        return {"all": whole, "high": 1.5 * whole, low: 0.5 * whole}

    return {
        "format_version": 1,
        "model": {"name_or_path": "some/model", "revision": "0123"},
        "samples": {"tokens_by_domain": {"high": 70, low: 80}},
        "methods": {
            method: {
                "config": {},
                "layers": {
                    str(layer): {
                        "original_num_experts": 7,
                        "counts": {
                            str(n): {"retained": list(range(n)), "kl": costs(m, layer % 5, 7 - n)} for n in (6, 5, 4)
                        },
                    }
                    for layer in range(0, layers, 2 if layers == 3 else 1)
                },
                "model": [
                    {"allocation": a, "sparsity": s, "retained": {}, "kl": costs(m, n, 12 * s)}
                    for n, a in enumerate(("uniform", "sensitivity"))
                    for s in (0.25, 0.5, 0.75)
                ],
            }
            for m, method in enumerate(methods)
        },
    }


def an_evaluation(labels: tuple[str, ...] = ("pruned", "harder"), low: str = "low") -> dict[str, Any]:
    before = {"high": 8.0, low: 20.0, "all": 12.0}
    run = {"prompt_tokens": 16, "new_tokens": 8, "prompt_seconds": 0.5, "tokens_per_second": 20.0}
    models: dict[str, Any] = {
        "whole": {
            "domains": {d: {"samples": 6, "tokens": 80, "perplexity": p} for d, p in before.items()},
            "parameters": 4_000_000_000,
            "bytes": 8_000_000_000,
            "generation": {**run, "peak_memory_bytes": 9_000_000_000},
            "tasks": {"quiz": {"acc": 0.75, "acc_stderr": 0.02}},
        }
    }
    for n, label in enumerate(labels, 1):
        models[label] = {
            "domains": {
                d: {
                    "samples": 6,
                    "tokens": 80,
                    "perplexity": p * math.exp(0.1 * n),
                    "reference_perplexity": p,
                    "lost_interval": [0.1 * n - 0.03, 0.1 * n + 0.05],
                    "perplexity_difference_interval": [0.2, 0.2 + n],
                    "kl_divergence": 0.12 * n,
                    "top1_agreement": 0.9,
                }
                for d, p in before.items()
            },
            "parameters": 2_000_000_000,
            "bytes": 4_000_000_000,
            "tasks": {"quiz": {"acc": 0.7}},
        }
    return {"format_version": 1, "reference": "whole", "models": models}


def page(path: Path) -> ElementTree.Element:
    """The page, which must be well-formed."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.split("\n", 1)[1])


def words(element: ElementTree.Element | None) -> str:
    assert element is not None
    return " ".join("".join(element.itertext()).split())


def rows(root: ElementTree.Element, caption: str) -> list[list[str]]:
    """The cells of the table whose caption begins so."""
    (table,) = [t for t in root.iter("table") if words(t.find("caption")).startswith(caption)]
    return [[words(cell) for cell in line] for line in table.findall("tbody/tr")]


def drawn(make: Callable[..., Figure], *args: Any) -> Figure:
    """A figure, laid out."""
    with style():
        figure = make(*args)
        FigureCanvasAgg(figure).draw()
    return figure


def images(figure: Figure) -> list[np.ndarray]:
    """The values behind the maps of a figure, NaN where blank; the colour scale has none."""
    found = [image for axes in figure.axes for image in axes.get_images()]
    return [np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan) for image in found]


def by_domain(stats: CalibrationStats, layer: int, name: str, domain: str) -> np.ndarray:
    chosen = [row for row, sample in enumerate(stats.samples) if sample.domain == domain]
    return stats.layers[layer].tensors[name][chosen].sum(0).numpy()


# ------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def everything(
    stats: CalibrationStats, plans: dict[str, PruningPlan], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("report")
    inputs = {"stats": stats, "plans": plans, "sensitivity": a_sensitivity(), "evaluation": an_evaluation()}
    return write_report(folder / "report.html", pictures=folder / "pictures", **inputs)


def test_the_page_has_every_section_and_its_contents_lead_there(everything: Path) -> None:
    root = page(everything)
    assert root.get("lang") == "en-GB"
    titles = [words(e) for e in root.iterfind(".//section/h2")]
    assert titles == [
        "What was lost",
        "How far the model can be pruned",
        "Retained experts",
        "Memory and parameters",
        "Which domains the experts serve",
        "Scores of the experts",
        "Mosaic's clusters",
        "Pathfinder's paths",
        "Where this comes from",
    ]
    links = root.findall(".//nav//a")
    assert [words(link) for link in links] == titles
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert {str(link.get("href"))[1:] for link in links} <= set(ids)


def test_nothing_comes_from_elsewhere_and_nothing_runs(everything: Path) -> None:
    root = page(everything)
    assert not {e.tag for e in root.iter()} & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on") and "url(" not in value
            if name == "href":
                assert re.match(r"#|https://arxiv\.org/abs/[0-9.]+$", value), value
            elif name == "src":
                assert value.startswith("data:image/svg+xml;base64,"), value
    (policy,) = [m for m in root.iter("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy.get("content")).startswith("default-src 'none'")
    assert not re.search(r"@import|url\(", str(root.findall(".//style")[0].text))


def test_every_figure_and_table_can_be_read_without_seeing(everything: Path) -> None:
    root = page(everything)
    figures = root.findall(".//figure")
    assert len(figures) > 10
    for figure in figures:
        (picture,) = figure.findall("img")
        assert len(str(picture.get("alt"))) > 20, figure.get("id")
        svg = ElementTree.fromstring(base64.b64decode(str(picture.get("src")).split(",")[1]))
        assert svg.tag.endswith("}svg")
    for table in root.iter("table"):
        assert words(table.find("caption"))
        heads = table.findall(".//th")
        assert heads and all(head.get("scope") in ("row", "col") for head in heads)


def test_tables_say_what_the_figures_show(
    everything: Path, stats: CalibrationStats, plans: dict[str, PruningPlan]
) -> None:
    root = page(everything)
    used, alone = rows(root, "The 3 most used experts"), rows(root, "The 3 experts with the least error")
    for (row, layer), (column, domain) in itertools.product(enumerate((0, 2)), enumerate(DOMAINS, 1)):
        routed = by_domain(stats, layer, "routed_tokens", domain)
        most = np.argsort(-routed, kind="stable")[:3]
        assert used[row][column] == ", ".join(f"{e} ({routed[e] / routed.sum():.0%})" for e in most)
        wrong = by_domain(stats, layer, "single_error", domain)
        assert re.findall(r"(\d+) \(", alone[row][column]) == list(map(str, np.argsort(wrong, kind="stable")[:3]))
    assert rows(root, "Retained experts by layer") == [
        [str(n), *(f"{len(p.retained[n])} of 7: {spans(p.retained[n])}" for p in plans.values())] for n in (0, 2)
    ]
    lost = ["low", "6", "80", "24.43", "20.00", "0.200", "0.170 to 0.250", "0.240", "90.0%"]
    assert lost in rows(root, "harder, against whole")
    costs = rows(root, "KL divergence, nats per token")
    points = [p for m in a_sensitivity()["methods"].values() for p in m["model"]]
    assert [float(line[3]) for line in costs] == pytest.approx([p["kl"]["all"] for p in points], rel=0.005)
    alone = rows(root, "KL divergence when one layer is pruned by mosaic")
    assert [line[:3] for line in alone[:2]] == [["0", "6", "14%"], ["0", "5", "29%"]] and len(alone) == 6
    (whole, pruned, _) = rows(root, "Size and speed")
    assert (whole[1], pruned[1], pruned[-1]) == ("4,000,000,000", "2,000,000,000", "50%")
    assert rows(root, "Results of tasks") == [["quiz", "acc", "0.750 ± 0.020", "0.700", "0.700"]]
    glance = dict(rows(root, "At a glance"))
    assert glance["plan"] == "scores: 10 of 14 experts retained, 5 in a layer; 4 (28.6%) removed"
    assert glance["result"] == "harder: perplexity 14.7, before 12.0; the most lost on low, 0.200 nats per token"


def test_pictures_are_written_in_their_formats(everything: Path) -> None:
    root, folder = page(everything), everything.parent / "pictures"
    figures = {str(f.get("id")).removeprefix("figure-"): f.find("img") for f in root.findall(".//figure")}
    assert {path.name for path in folder.iterdir()} == {f"{n}.{form}" for n in figures for form in ("png", "svg")}
    for name, image in figures.items():
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (folder / f"{name}.svg").read_bytes()
        assert base64.b64decode(image.get("src").split(",")[1]) == svg and b"<dc:date>" not in svg


def test_the_same_inputs_give_the_same_bytes(
    everything: Path, stats: CalibrationStats, plans: dict[str, PruningPlan], tmp_path: Path
) -> None:
    """Whatever the user has set in matplotlib, and without changing that."""
    theirs = {"font.size": 30.0, "svg.fonttype": "path", "axes.titlepad": 40.0, "lines.markeredgewidth": 5.0}
    inputs = {"stats": stats, "plans": plans, "sensitivity": a_sensitivity(), "evaluation": an_evaluation()}
    with matplotlib.rc_context(theirs):
        before = dict(matplotlib.rcParams)
        again = write_report(tmp_path / "report.html", pictures=tmp_path / "pictures", **inputs)
        assert dict(matplotlib.rcParams) == before
    assert again.read_bytes() == everything.read_bytes()
    for path in (everything.parent / "pictures").iterdir():
        assert (tmp_path / "pictures" / path.name).read_bytes() == path.read_bytes(), path.name


SECTIONS = {
    "stats": ["domains", "scores", "origin"],
    "plans": ["retained", "scores", "mosaic", "paths", "origin"],
    "sensitivity": ["sensitivity"],
    "evaluation": ["quality", "size"],
}


@pytest.mark.parametrize("given", SECTIONS)
def test_each_input_is_enough(
    given: str, stats: CalibrationStats, plans: dict[str, PruningPlan], tmp_path: Path
) -> None:
    inputs = {"stats": stats, "plans": plans, "sensitivity": a_sensitivity(), "evaluation": an_evaluation()}
    root = page(write_report(tmp_path / "r.html", **{given: inputs[given]}))
    assert [section.get("id") for section in root.iter("section")] == SECTIONS[given]
    assert words(root).count("none were given") == 2 * (given == "plans")  # of the set methods


def test_objects_and_their_plain_values_are_taken(tmp_path: Path) -> None:
    comparison = Comparison.from_dict(an_evaluation())
    objects = {"sensitivity": Sensitivity.from_dict(a_sensitivity()), "evaluation": comparison}
    as_objects = write_report(tmp_path / "a.html", **objects)
    as_mappings = write_report(tmp_path / "b.html", sensitivity=a_sensitivity(), evaluation=an_evaluation())
    assert as_objects.read_bytes() == as_mappings.read_bytes()
    one = page(write_report(tmp_path / "c.html", evaluation=comparison.models["pruned"].evaluation))
    assert ["low", "6", "80", "22.10", "20.00"] in [line[:5] for line in rows(one, "model, against reference")]


def test_one_model_without_a_reference(tmp_path: Path) -> None:
    values = {**an_evaluation(()), "reference": None}
    figure = drawn(charts.perplexities, Comparison.from_dict(values), [*DOMAINS, "all"])
    assert len(figure.axes) == 1 and figure.axes[0].lines[0].get_xdata() == pytest.approx([8.0, 20.0, 12.0])
    root = page(write_report(tmp_path / "r.html", evaluation=values))
    assert "20.00" in words(root) and "against" not in words(root.find(".//section[@id='quality']"))
    only_size = {"format_version": 1, "reference": None, "models": {"m": {"domains": {}, "parameters": 5, "bytes": 9}}}
    root = page(write_report(tmp_path / "s.html", evaluation=only_size))
    assert [section.get("id") for section in root.iter("section")] == ["size"]


HOSTILE = "<script>alert('$x$')</script> & \"q\" $\\frac{ _\x00\ud800\u202e\n" + "n" * 300


def test_names_are_text_and_nothing_else(stats: CalibrationStats, tmp_path: Path) -> None:
    """Domains, plans, methods, models, options: all of them come from files that anybody may have written."""
    hostile = replace(
        stats,
        samples=tuple(replace(s, domain=HOSTILE if s.domain == "low" else "_$") for s in stats.samples),
        model={**stats.model, "name_or_path": HOSTILE, "revision": HOSTILE},
        provenance={HOSTILE: {HOSTILE: [HOSTILE]}},
    )
    foreign = replace(
        planned(hostile, "reap"),
        method=HOSTILE,
        config={HOSTILE: [HOSTILE]},
        provenance={"notes": [HOSTILE], "findings": {HOSTILE: HOSTILE}, "made": HOSTILE},
    )
    sensitivity, evaluation = a_sensitivity(3, (HOSTILE, "_$"), HOSTILE), an_evaluation((HOSTILE, "_$"), HOSTILE)
    for method in sensitivity["methods"].values():
        for place in method["model"]:
            place["allocation"] = HOSTILE
    for model in evaluation["models"].values():
        model["tasks"] = {HOSTILE: {HOSTILE: 0.5}}
    path = write_report(
        tmp_path / "r.html",
        stats=hostile,
        plans={HOSTILE: planned(hostile, "mosaic"), "_$": foreign},
        sensitivity=sensitivity,
        evaluation=evaluation,
        title=HOSTILE,
        pictures=tmp_path / "pictures",
        formats=("svg",),
    )
    root = page(path)
    assert not {"script", "frac"} & {e.tag for e in root.iter()}
    assert words(root).count("<script>alert('$x$')</script>") > 20
    for picture in (tmp_path / "pictures").glob("*.svg"):
        assert not any(str(e.tag).endswith("script") for e in ElementTree.fromstring(picture.read_bytes()).iter())
    legend = words(ElementTree.fromstring((tmp_path / "pictures" / "perplexity-1.svg").read_bytes()))
    assert "<script>alert('$x$')" in legend and "_$" in legend  # signs and no formula, also in a picture


# ------------------------------------------------------------------------------------------- figures


def test_maps_by_domain_are_sums_over_its_samples(stats: CalibrationStats, plans: dict[str, PruningPlan]) -> None:
    routing, error = routing_share(stats), single_error(stats)
    for (n, domain), (row, layer) in itertools.product(enumerate(DOMAINS), enumerate((0, 2))):
        routed = by_domain(stats, layer, "routed_tokens", domain)
        tokens = sum(s.num_tokens for s in stats.samples if s.domain == domain)
        np.testing.assert_allclose(routing[n, row], routed / (3 * tokens))  # 3 experts for each token
        wrong, output = (by_domain(stats, layer, name, domain) for name in ("single_error", "output_energy"))
        np.testing.assert_allclose(error[n, row], wrong / output)
        for plan in plans.values():
            kept = routed[list(plan.retained[layer])].sum() / routed.sum()
            assert coverage(plan, routing)[row, n] == pytest.approx(kept)
    shown = [maps.Map(d, [0, 2], list("0123456"), grid) for d, grid in zip(DOMAINS, routing, strict=True)]
    np.testing.assert_array_equal(images(drawn(maps.shares, shown, 0, 1, "%", "expert"))[:2], routing)


def test_maps_of_retained_experts_are_the_plans() -> None:
    unequal = PruningPlan("mixtral", 2, "by hand", {0: (0, 2), 3: (0, 1, 4)}, {0: 3, 3: 5})
    grid = retained_grid(unequal)
    np.testing.assert_array_equal(grid, [[1, 0, 1, math.nan, math.nan], [1, 1, 0, 0, 1]])
    shown = maps.Map("unequal", [0, 3], list("01234"), grid, np.nansum(grid, axis=1))
    figure = drawn(maps.retained, [shown])
    np.testing.assert_array_equal(images(figure)[0], grid)
    assert [bar.get_width() for axes in figure.axes[0].child_axes for bar in axes.patches] == [2, 3]


def test_plans_are_compared_where_they_are_for_one_shape(plans: dict[str, PruningPlan], tmp_path: Path) -> None:
    one, two = plans["clusters"], plans["paths"]
    (first, second) = rows(page(write_report(tmp_path / "a.html", plans={"1": one, "2": two})), "Share that the other")
    shared = sum(len(set(one.retained[layer]) & set(two.retained[layer])) for layer in (0, 2))
    assert first == ["1", "100%", f"{shared / 8:.0%}"] and second == ["2", f"{shared / 8:.0%}", "100%"]
    other = PruningPlan("mixtral", 2, "by hand", {0: (0, 2)}, {0: 3}, provenance={"notes": ["only here"]})
    text = words(page(write_report(tmp_path / "b.html", plans={"1": one, "2": two, "3": other})))
    assert "Share that the other" not in text
    assert "3: only here" in text and "1: layers without experts stay as they are: 1" in text


def test_scores_stand_where_they_should(plans: dict[str, PruningPlan]) -> None:
    plan = plans["scores"]
    values = np.array([plan.scores[layer] for layer in sorted(plan.scores)])
    figure = drawn(charts.scores, values, retained_grid(plan), sorted(plan.scores), "reap")
    for line, shift in zip(figure.axes[0].lines, (-0.17, 0.17), strict=True):
        expected = [
            (row + shift, plan.scores[layer][e] / np.mean(plan.scores[layer]))
            for row, layer in enumerate(sorted(plan.retained))
            for e in range(plan.original_num_experts[layer])
            if (e in plan.retained[layer]) == (shift < 0)
        ]
        np.testing.assert_allclose(line.get_xydata(), expected)
    flat = np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 4.0], [math.nan] * 3])
    np.testing.assert_allclose(relative(flat), [[1, 1, 1], [1, 0, 2], [math.nan] * 3])
    (line,) = drawn(charts.scores, np.array([[0.0, 1e-6, 1.0, 1.0]]), None, (0,), "x").axes[0].lines
    assert line.axes.get_yscale() == "log"
    low, heights = line.axes.get_ylim()[0], line.get_ydata()
    assert heights[0] == pytest.approx(low) and heights[1] > low  # 0 on the edge, the least above it


def test_costs_are_as_measured() -> None:
    values = a_sensitivity()
    del values["methods"]["reap"]["layers"]["2"]["counts"]["5"]
    measured = Sensitivity.from_dict(values)
    layers = images(drawn(maps.costs, [maps.cost_map(n, m) for n, m in measured.methods.items()]))
    for grid, method in zip(layers, values["methods"].values(), strict=False):
        for (row, layer), (column, count) in itertools.product(enumerate("02"), enumerate("654")):
            entry = method["layers"][layer]["counts"].get(count)
            assert grid[row, column] == pytest.approx(math.nan if entry is None else entry["kl"]["all"], nan_ok=True)
    figure = drawn(charts.model_costs, measured, ["all", "high", "low"])
    for axes, domain in zip(figure.axes, ("all", "high", "low"), strict=True):
        assert axes.get_yscale() == "log"
        for line in axes.lines:
            method, allocation = line.get_label().split(", ")
            points = [p for p in values["methods"][method]["model"] if p["allocation"] == allocation]
            np.testing.assert_allclose(line.get_xydata(), [(100 * p["sparsity"], p["kl"][domain]) for p in points])
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
        assert len(axes.lines) == len(looks) == 4
        assert len({line.get_marker() for line in axes.lines}) == 2  # methods are told apart without colour


def test_perplexities_and_what_was_lost_are_as_measured() -> None:
    comparison = Comparison.from_dict(an_evaluation())
    first, second = drawn(charts.perplexities, comparison, [*DOMAINS, "all"]).axes
    shown = {tuple(line.get_xdata()) for line in first.lines}
    lost = {tuple(line.get_xdata()) for line in second.lines}
    assert any(line == pytest.approx((8.0, 20.0, 12.0)) for line in shown)  # the reference
    for name in ("pruned", "harder"):
        results = comparison.models[name].evaluation.domains
        assert tuple(results[d].perplexity for d in (*DOMAINS, "all")) in shown
        for result in results.values():
            assert {(result.lost,), result.lost_interval} <= lost
            between = result.perplexity_difference_interval
            assert tuple(result.reference_perplexity + end for end in between) in shown


# ------------------------------------------------------------------------------------------- why plans are as they are

MOSAIC: list[dict[str, Any]] = [
    {},
    {"method_options": {"num_domains": 2, "num_generalists": 0}},
    {"method_options": {"num_domains": 6, "num_generalists": 2, "ward": "distances"}},
    {"protect": {0: (5, 6)}, "seed": 3},
    {"domain_weights": {"low": 5.0, "high": 1.0}},
    {"skip_layers": (2,), "method_options": {"num_generalists": 4}},
]


@pytest.mark.parametrize("settings", MOSAIC)
def test_mosaic_is_explained_as_it_chose(stats: CalibrationStats, settings: dict[str, Any]) -> None:
    plan = planned(stats, "mosaic", **settings)
    found = list(explain.mosaic_layers(plan, explain.recipe_of(plan, stats)))
    assert [layer.layer for layer in found] == [i for i in (0, 2) if i not in settings.get("skip_layers", ())]
    for layer in found:
        assert layer.agrees
        assert sorted([*layer.generalists, *layer.representatives]) == list(plan.retained[layer.layer])
        if layer.clusters is None:
            continue
        assert layer.shares.sum() == pytest.approx(1) and (np.diff(layer.shares) <= 0).all()
        assert layer.silhouette is None or -1 <= layer.silhouette <= 1
        joined: dict[int, set[int]] = {n: {e} for n, e in enumerate(layer.clusters.experts)}
        (tree,) = layer.clusters.trees
        for n, (a, b, *_) in enumerate(tree[: len(joined) - len(layer.representatives)], len(joined)):
            joined[n] = joined.pop(int(a)) | joined.pop(int(b))
        assert sorted(map(sorted, layer.members.values())) == sorted(map(sorted, joined.values()))  # the tree, cut
        assert all(first in members for first, members in layer.members.items())


def test_mosaic_of_a_router_with_groups_is_explained_by_a_tree_for_each(tmp_path: Path) -> None:
    grouped = random_statistics(GroupedTopK(2, groups=2, top_groups=1), 2, 10, tokens=20)
    plan = planned(grouped, "mosaic", num_experts=8, protect={0: (0, 1, 2, 3)}, method_options={"num_generalists": 0})
    found = list(explain.mosaic_layers(plan, explain.recipe_of(plan, grouped)))
    assert [layer.agrees for layer in found] == [True, True]
    for layer, trees in zip(found, ([range(5, 10)], [range(5), range(5, 10)]), strict=True):
        assert layer.clusters.experts == tuple(e for tree in trees for e in tree)
        assert [len(tree) + 1 for tree in layer.clusters.trees] == [5] * len(trees)
        axes, below, *_ = drawn(graphs.clusters, layer).axes
        assert sorted(int(t.get_text()) for t in below.texts if t.get_text().isdigit()) == list(layer.clusters.experts)
        (tree,) = [c for c in axes.collections if c.get_gid() == "tree"]
        joints = [np.asarray(path.vertices) for path in tree.get_paths()]
        assert len(joints) == 4 * len(trees)
        for n in range(len(trees)):  # side by side, each above its own leaves
            own = [j for j in joints if 5 * n - 0.5 < j[:, 0].min() and j[:, 0].max() < 5 * n + 4.5]
            assert sorted(j[1, 1] for j in own) == pytest.approx(sorted(layer.clusters.trees[n][:, 2]))
        cuts = [line for line in axes.lines if line.get_gid() == "cut"]
        assert len(cuts) == (layer.cut is not None) == (len(trees) == 1)
    page(write_report(tmp_path / "r.html", stats=grouped, plans={"grouped": plan}))


def test_what_cannot_be_explained_is_said(
    stats: CalibrationStats, plans: dict[str, PruningPlan], tmp_path: Path
) -> None:
    plan = plans["clusters"]
    calibration = {**plan.provenance["calibration"], "domain_weights": {"nowhere": 1.0}}
    other_model = {**plan.provenance, "model": {"fingerprint": "other"}}
    cases: list[tuple[CalibrationStats, PruningPlan, str]] = [
        (stats, replace(plan, provenance=other_model), "made for another model"),
        (stats, replace(plan, retained={0: (0, 1, 2)}, original_num_experts={0: 7}), "names other layers"),
        (stats, replace(plan, config={}), "the recipe in the plan cannot be read"),
        (stats, replace(plan, config={"method": "reap", "num_experts": 4}), "is one for method 'reap'"),
        (stats, replace(plan, provenance={**plan.provenance, "calibration": calibration}), "domain_weights must"),
        (replace(stats, needs=stats.needs - {Need.INPUTS}), plan, "needs the statistics inputs"),
    ]
    for statistics, case, said in cases:
        with pytest.raises(RequestError, match=re.escape(said)):
            explain.recipe_of(case, statistics)
    edited = replace(plan, retained={**plan.retained, 2: tuple(sorted({*range(7)} - {*plan.retained[2][1:]}))})
    root = page(write_report(tmp_path / "r.html", stats=stats, plans={"foreign": cases[0][1], "edited": edited}))
    text = words(root.find(".//section[@id='mosaic']"))
    assert "cannot be shown: the plan was made for another model" in text
    assert "another choice than the plan holds in layer 2:" in text


def test_plans_by_sensitivity_are_explained_by_the_numbers_they_retain(stats: CalibrationStats) -> None:
    parts = {n: planned(stats, "mosaic", num_experts=n, method_options={"num_domains": 5}) for n in (4, 5)}
    config = {**parts[4].config, "allocation": "sensitivity", "num_experts": None, "sparsity": 0.35}
    retained = {0: parts[5].retained[0], 2: parts[4].retained[2]}
    plan = replace(parts[4], retained=retained, config=config)
    recipe = explain.recipe_of(plan, stats)
    assert isinstance(recipe.budget, UniformBudget) and recipe.budget.num_experts == {0: 5, 2: 4}
    assert [layer.agrees for layer in explain.mosaic_layers(plan, recipe)] == [True, True]


@pytest.mark.parametrize("method", ["pathfinder", "transition", "importance"])
@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.15}])
def test_paths_are_those_of_a_search_through_all(
    stats: CalibrationStats, method: str, settings: dict[str, float]
) -> None:
    plan = planned(stats, method, num_experts=None, **settings)
    recipe = explain.recipe_of(plan, stats)
    graph = explain.path_graph(plan, recipe)
    grown = plan.provenance["findings"]["paths_per_sample"]
    assert (graph.paths_per_sample, graph.trimmed) == (max(1, grown), grown == 0)
    options = recipe.options
    importance = None if method == "transition" else pathfinder.log_importance(stats, options.tau)
    transitions = None if method == "importance" else pathfinder.log_transitions(stats, options.transitions)
    edges, nodes = np.zeros((7, 7), int), np.zeros((2, 7), int)
    for s in range(len(stats.samples)):
        weight = {
            (a, b): (0 if importance is None else importance[0][s, a] + importance[1][s, b])
            + (0 if transitions is None else transitions(s)[0][a, b])
            for a, b in itertools.product(range(7), repeat=2)
        }
        first = sorted(weight, key=lambda path: -weight[path])[: graph.paths_per_sample]
        for path in first:
            edges[path] += 1
        for column in (0, 1):
            nodes[column, list({path[column] for path in first})] += 1
    assert (graph.edges[0] == edges).all() and (np.array(graph.nodes) == nodes).all()


def test_the_graph_shows_retained_experts_and_edges(stats: CalibrationStats, plans: dict[str, PruningPlan]) -> None:
    plan = plans["paths"]
    graph = explain.path_graph(plan, explain.recipe_of(plan, stats))
    (axes,) = drawn(graphs.paths, plan, graph, len(stats.samples)).axes
    nodes = {line.get_gid(): {tuple(point) for point in line.get_xydata().astype(int)} for line in axes.lines}
    expected = {(row, e) for row, layer in enumerate((0, 2)) for e in plan.retained[layer]}
    assert nodes["retained"] == expected
    assert nodes["pruned"] == set(itertools.product((0, 1), range(7))) - expected
    (lines,) = [c for c in axes.collections if c.get_gid() == "edges"]
    ends = [(int(a[1]), int(b[1])) for a, b in lines.get_segments()]
    assert len(ends) == min((graph.edges[0] > 0).sum(), graphs.MOST_EDGES)
    widths = dict(zip(ends, lines.get_linewidths(), strict=True))
    order = [widths[pair] for pair in sorted(widths, key=lambda pair: graph.edges[0][pair])]
    assert order == sorted(order) and order[0] < order[-1]


# ------------------------------------------------------------------------------------------- large and small


def synthetic(layers: int, experts: int) -> CalibrationStats:
    """Statistics of a large model from few samples and tokens, drawn at random."""
    random = torch.Generator().manual_seed(0)
    entries = tuple(Sample(f"{n:064x}", f"domain {n % 6}", 64) for n in range(12))
    token_sample, token_position = keep_tokens(entries, 96, seed=0)
    weights = torch.ones(len(entries), dtype=torch.float64)
    names = ("routed_tokens", "probability", "dense_norm", "single_error", "norm_applied")
    made = {}
    for layer in range(layers):
        tensors = {n: torch.rand(len(entries), experts, dtype=torch.float64, generator=random) ** 3 for n in names}
        tensors["probability_log2"] = -tensors["probability"]
        tensors["output_energy"] = torch.ones(len(entries), experts, dtype=torch.float64)
        tensors["inputs"] = torch.randn(96, 8, generator=random)
        tensors["token_single_error"] = torch.rand(96, experts, generator=random)
        made[layer] = LayerStats(experts, SoftmaxTopK(2, True, False), tensors, weights, token_sample)
    needs = {Need.ROUTING, Need.ROUTED_NORMS, Need.DENSE_NORMS, Need.SINGLE_ERROR, Need.INPUTS}
    model = {"model_type": "mixtral", "top_k": 2, "fingerprint": "random"}
    return CalibrationStats(model, entries, made, frozenset(needs), token_sample, token_position, 96, 0)


def crowded(boxes: dict[Text, tuple[Any, Any]]) -> list[str]:
    """Texts of a figure that stand over each other or outside of it, from where they were drawn and on how much."""
    outside = [
        f"{text.get_text()!r} is cut off"
        for text, (box, (width, height)) in boxes.items()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]
    over = [
        f"{one.get_text()!r} and {two.get_text()!r} overlap"
        for (one, (a, _)), (two, (b, _)) in itertools.combinations(boxes.items(), 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2  # boxes of lines touch
    ]
    return outside + over


@pytest.mark.parametrize(("layers", "experts"), [(6, 8), (5, 16), (60, 128)])
def test_nothing_overlaps_or_is_cut_off_at_any_size(layers: int, experts: int, tmp_path: Path) -> None:
    stats = synthetic(layers, experts)
    long = "a name that is far too long to be shown whole, and must be cut"
    half, skip = {"num_experts": experts // 2}, tuple(range(2, layers))
    clusters = {"num_generalists": 0, "num_domains": 6}
    plans = {
        long: planned(stats, "mosaic", **half, skip_layers=skip, method_options=clusters),
        "best paths": planned(stats, "pathfinder", **half, method_options={"num_paths": 3}),
        "scores": planned(stats, "reap", **half, allocation="global"),
    }
    boxes: dict[Figure, dict[Text, tuple[Any, Any]]] = {}
    draw = Text.draw

    def noting(text: Text, renderer: Any) -> None:
        if text.get_text().strip() and text.get_visible():
            figure = text.get_figure(root=True)
            place = text.get_window_extent(renderer), tuple(figure.bbox.size)
            boxes.setdefault(figure, {})[text] = place  # of the last time
        draw(text, renderer)

    evaluation = an_evaluation(("short", long))
    sensitivity = a_sensitivity(layers, ("mosaic", "pathfinder", long))
    with patch.object(Text, "draw", noting):
        path = write_report(
            tmp_path / "r.html", stats=stats, plans=plans, sensitivity=sensitivity, evaluation=evaluation
        )
    assert len(boxes) > 10
    assert not [problem for texts in boxes.values() for problem in crowded(texts)]
    assert path.stat().st_size < 8_000_000
    root = page(path)
    assert len(root.findall(".//section[@id='mosaic']//figure")) == 2
    assert len(root.findall(".//section[@id='paths']//tbody/tr")) == layers


def test_many_layers_fold_and_all_can_be_reached(tmp_path: Path) -> None:
    stats = synthetic(9, 10)
    plan = planned(stats, "mosaic", num_experts=8, method_options={"num_generalists": 0, "num_domains": 3})
    root = page(write_report(tmp_path / "r.html", stats=stats, plans=[plan]))
    folded = root.findall(".//div[@class='layers']/details")
    assert [words(d[0]).split(":")[0] for d in folded] == [f"Layer {n}" for n in range(9)]
    assert all(d.get("open") is None and d.find("figure") is not None for d in folded)


# ------------------------------------------------------------------------------------------- files


def test_without_matplotlib_the_hint_says_what_to_install(
    plans: dict[str, PruningPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    hint = re.escape('pip install "optimum-moe-prune[plots]"')
    with pytest.raises(RequestError, match=hint):
        require_matplotlib()
    with pytest.raises(RequestError, match=hint):
        write_report(tmp_path / "r.html", plans=plans)
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_report_is_replaced(plans: dict[str, PruningPlan], tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    write_report(path, plans=plans, pictures=tmp_path / "p", formats=("svg",))
    before = path.read_bytes()
    with pytest.raises(RequestError, match="exists; name another file"):
        write_report(path, plans=plans)
    with pytest.raises(RequestError, match=r"retained-1\.svg exists"):
        write_report(tmp_path / "s.html", plans=plans, pictures=tmp_path / "p", formats=("svg",))
    assert not (tmp_path / "s.html").exists()
    write_report(path, plans=plans, title="Another", overwrite=True, pictures=tmp_path / "p", formats="pdf")
    assert path.read_bytes() != before and (tmp_path / "p" / "retained-1.pdf").read_bytes().startswith(b"%PDF")
    (tmp_path / "thesis.html").write_text("<p>years of work</p>")
    with pytest.raises(RequestError, match="no report of this package"):
        write_report(tmp_path / "thesis.html", plans=plans, overwrite=True)
    with pytest.raises(RequestError, match="no report of this package"):
        write_report(tmp_path, plans=plans, overwrite=True)
    with pytest.raises(RequestError, match="is a file; name a folder"):
        write_report(tmp_path / "t.html", plans=plans, pictures=path)
    with pytest.raises(RequestError, match="format 'gif' is not known"):
        write_report(tmp_path / "t.html", plans=plans, formats=("gif",))


def test_a_failure_leaves_what_was_there(
    plans: dict[str, PruningPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(tmp_path / "r.html", plans=plans)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("optimum_moe_prune.storage.files.sync", full)
    for pictures in (None, tmp_path / "pictures"):
        with pytest.raises(RunError, match="no space left"):
            write_report(path, plans=plans, overwrite=True, title="New", pictures=pictures)
        assert path.read_bytes() == before
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["r.html"]


def test_damaged_and_missing_inputs_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "r.html"
    with pytest.raises(RequestError, match="nothing to report"):
        write_report(target)
    for change in ({"format_version": 2}, {"methods": 3}, {"methods": {"m": {"layers": {"x": {}}}}}):
        with pytest.raises(RequestError, match="the sensitivity"):
            write_report(target, sensitivity={**a_sensitivity(), **change})
    for change in ({"format_version": None}, {"models": {}, "reference": None}, {"reference": "nobody"}):
        with pytest.raises(RequestError, match="the evaluation"):
            write_report(target, evaluation={**an_evaluation(), **change})
    with pytest.raises(RequestError, match="one is a str"):
        write_report(target, plans=["plan.json"])
    assert not list(tmp_path.iterdir())


def test_names_and_numbers(plans: dict[str, PruningPlan]) -> None:
    plan = plans["paths"]
    assert list(named([plan, plan])) == ["pathfinder, 43% pruned", "pathfinder, 43% pruned (2)"]
    assert list(named(plan)) == ["pathfinder, 43% pruned"]
    assert plain("a\n b\x00\u202e") == "a\n b\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    assert short("words  in a\nline", 9) == "words in…"
    assert spans([0, 1, 2, 4, 5, 9]) == "0\N{NON-BREAKING HYPHEN}2, 4, 5, 9"
    numbers = {0: "0", 0.00123: "0.00123", 1.5: "1.50", 1234.5: "1,234", 2e9: "2.00e+09", math.inf: "\N{EN DASH}"}
    assert [number(value) for value in numbers] == list(numbers.values())
