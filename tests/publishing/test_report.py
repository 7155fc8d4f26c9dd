# SPDX-License-Identifier: Apache-2.0
"""The report: figures show what was measured, the page is sound and safe, and files are whole or absent."""

from __future__ import annotations

import base64
import contextlib
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from conftest import make_model
from heads import checkpoint
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
from optimum_moe_prune.checkpoints.checkpoint import Checkpoint
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.commands.report import named_paths
from optimum_moe_prune.evaluation.comparison import Comparison
from optimum_moe_prune.methods import pathfinder
from optimum_moe_prune.methods.budget import UniformBudget
from optimum_moe_prune.methods.mosaic import Clusters, cut, ward_tree
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.planning.sensitivity import Sensitivity
from optimum_moe_prune.publishing.report import (
    charts,
    drawing,
    explain,
    graphs,
    maps,
    measured,
    origin,
    require_matplotlib,
    sections,
    write_report,
)
from optimum_moe_prune.publishing.report.data import (
    coverage,
    named,
    relative,
    retained_grid,
    routing_share,
    single_error,
)
from optimum_moe_prune.publishing.report.drawing import Gallery, Picture, style
from optimum_moe_prune.publishing.report.sizes import find_family
from optimum_moe_prune.publishing.report.tables import Table
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


@dataclass(frozen=True)
class Seen:
    """A picture of the page, the function that drew it, and its figures: the wide one and any narrow one."""

    picture: Picture
    make: Callable[..., Figure]
    figures: tuple[Figure, ...]


@contextlib.contextmanager
def watching() -> Iterator[list[Seen]]:
    """What is drawn meanwhile."""
    seen: list[Seen] = []
    figures: list[Figure] = []
    draw, lay_out = Gallery.draw, drawing._laid_out

    def noting_draw(
        gallery: Gallery, name: str, alt: str, make: Callable[..., Figure], *args: Any, **more: Any
    ) -> Any:
        figures.clear()
        picture = draw(gallery, name, alt, make, *args, **more)
        seen.append(Seen(picture, make, tuple(figures)))
        return picture

    def noting_figure(figure: Figure) -> Figure:
        figures.append(lay_out(figure))
        return figure

    with patch.object(Gallery, "draw", noting_draw), patch.object(drawing, "_laid_out", noting_figure):
        yield seen


@pytest.fixture(scope="module")
def pictures(
    stats: CalibrationStats, plans: dict[str, PruningPlan], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Seen]]:
    """A report with everything, and what was drawn for it."""
    folder = tmp_path_factory.mktemp("report")
    inputs = {"stats": stats, "plans": plans, "sensitivity": a_sensitivity(), "evaluation": an_evaluation()}
    with watching() as seen:
        return write_report(folder / "report.html", pictures=folder / "pictures", **inputs), seen


@pytest.fixture(scope="module")
def everything(pictures: tuple[Path, list[Seen]]) -> Path:
    return pictures[0]


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
            elif name in ("src", "srcset"):
                assert value.startswith("data:image/svg+xml;base64,") and " " not in value, value
    (policy,) = [m for m in root.iter("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy.get("content")).startswith("default-src 'none'")
    assert not re.search(r"@import|url\(", str(root.findall(".//style")[0].text))


def test_every_figure_and_table_can_be_read_without_seeing(everything: Path) -> None:
    root = page(everything)
    figures = root.findall(".//figure")
    assert len(figures) > 10
    for figure in figures:
        (picture,) = figure.iter("img")
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
    low = ["low", "20.00", "22.10 (20.20 to 21.20)", "24.43 (20.20 to 22.20)"]  # intervals as the file has them
    assert low in rows(root, "Perplexity")
    assert ["low", "0.100 (0.070 to 0.150)", "0.200 (0.170 to 0.250)"] in rows(root, "Lost, nats per token")
    assert ["low", "6", "80", "0.120", "0.240"] in rows(root, "KL divergence from the reference")
    assert ["low", "6", "80", "90.0%", "90.0%"] in rows(root, "Share of tokens")
    costs = rows(root, "KL divergence, nats per token: all domains")
    points = [p for m in a_sensitivity()["methods"].values() for p in m["model"]]
    across = [float(line[n]) for n in range(1, 5) for line in costs]
    assert across == pytest.approx([p["kl"]["all"] for p in points], rel=0.005)
    alone = rows(root, "KL divergence when one layer is pruned by mosaic")
    assert [line[:3] for line in alone[:2]] == [["0", "6", "14%"], ["0", "5", "29%"]] and len(alone) == 6
    evaluated = dict((line[0], line[1:]) for line in rows(root, "Size and speed"))
    assert evaluated["parameters"] == ["4,000,000,000", "2,000,000,000", "2,000,000,000"]
    assert evaluated["parameters left"] == ["100%", "50%", "50%"] and "tokens/s" not in evaluated
    left = dict((line[0], line[1:]) for line in rows(root, "What the plans leave"))
    assert left["experts removed"] == ["\N{EN DASH}", "6 (42.9%)", "6 (42.9%)", "4 (28.6%)"]
    assert "weights" not in left and "are not shown: they are read from the files" in words(root)
    assert rows(root, "Results of tasks") == [["quiz", "acc", "0.750 ± 0.020", "0.700", "0.700"]]
    glance = dict(rows(root, "At a glance"))
    assert glance["plan"] == "scores: 10 of 14 experts retained, 5 in a layer; 4 (28.6%) removed"
    assert glance["result"] == "harder: perplexity 14.66, before 12.00; the most lost on low, 0.200 nats per token"


def test_pictures_are_written_in_their_formats(everything: Path) -> None:
    root, folder = page(everything), everything.parent / "pictures"
    figures = {str(f.get("id")).removeprefix("figure-"): next(f.iter("img")) for f in root.findall(".//figure")}
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
    "plans": ["retained", "size", "scores", "mosaic", "paths", "origin"],
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
    assert ["low", "20.00", "22.10"] in [[c.split(" ")[0] for c in line] for line in rows(one, "Perplexity")]


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
    assert "3: only here" in text and "1, 2: layers without experts stay as they are: 1" in text


def test_scores_stand_where_they_should(plans: dict[str, PruningPlan]) -> None:
    plan = plans["scores"]
    values = np.array([plan.scores[layer] for layer in sorted(plan.scores)])
    panel = charts.Scores("scores", "reap", values, retained_grid(plan), sorted(plan.scores))
    figure = drawn(charts.scores, [panel])
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
    panel = charts.Scores("x", "x", np.array([[0.0, 1e-6, 1.0, 1.0]]), None, (0,))
    (line,) = drawn(charts.scores, [panel]).axes[0].lines
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


# ------------------------------------------------------------------------------------------- the same as tables


def cells(table: Table, first: int = 1) -> list[list[str]]:
    """What stands in a table beside the names of its rows."""
    return [[str(cell) for cell in row[first:]] for row in table.rows]


def test_tables_below_pictures_hold_exactly_what_these_show(pictures: tuple[Path, list[Seen]]) -> None:
    path, seen = pictures
    root = page(path)
    assert len({each.make for each in seen}) == 9
    for each in seen:
        (figure,) = [f for f in root.iter("figure") if f.get("id") == f"figure-{each.picture.name}"]
        below = [
            (words(t.find("caption")), [[words(cell) for cell in line] for line in t.findall("tbody/tr")])
            for t in figure.iter("table")
        ]
        told = [(" ".join(t.caption.split()), [[str(c) for c in row] for row in t.rows]) for t in each.picture.tables]
        assert below == told and told, each.picture.name
        for drawn_one in each.figures:
            check = AS_TABLES[each.make]
            check(drawn_one, each.picture.tables)


def as_maps(figure: Figure, tables: tuple[Table, ...]) -> None:
    """Maps, and the words in their cells where there are any."""
    for axes, table in zip([axes for axes in figure.axes if axes.get_images()], tables, strict=False):
        (image,) = axes.get_images()
        grid = np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)
        assert [label.get_text() for label in axes.get_xticklabels()] == [short(c, 16) for c in table.head[1:]]
        assert [label.get_text() for label in axes.get_yticklabels()] == [str(row[0]) for row in table.rows]
        for row, line in enumerate(cells(table)):
            for column, cell in enumerate(line):
                value = grid[row, column]
                assert cell == "\N{EN DASH}" if math.isnan(value) else abs(float(cell) - value) <= 0.5 + 1e-9
        written = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
        assert all(cells(table)[row][column] == text for (row, column), text in written.items())
    assert len(tables) == sum(bool(axes.get_images()) for axes in figure.axes)


def as_retained(figure: Figure, tables: tuple[Table, ...]) -> None:
    (table,) = tables
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title(loc="left") for axes in panels] == list(table.head[1:])
    for column, grid in enumerate(images(figure)):
        for line, row in zip(grid, cells(table), strict=True):
            assert row[column] == f"{int(line.sum())} of 7: {spans(np.flatnonzero(line).tolist())}"


def as_scores(figure: Figure, tables: tuple[Table, ...]) -> None:
    for axes, table in zip(figure.axes, tables, strict=True):
        marks = {line.get_label(): line.get_xydata() for line in axes.lines}
        for name, opened in (("retained", False), ("pruned", True)):
            shown = sorted((round(x), number(y)) for x, y in marks[name])
            told = [(row, cell) for row, line in enumerate(cells(table)) for cell in line if ("(" in cell) == opened]
            assert shown == sorted((row, cell.strip("()")) for row, cell in told)


def as_costs(figure: Figure, tables: tuple[Table, ...]) -> None:
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    for axes, table in zip(figure.axes, tables, strict=True):
        assert sorted(legend) == sorted(table.head[1:]) == sorted(line.get_label() for line in axes.lines)
        assert [line.get_label() for line in axes.lines] == list(table.head[1:])
        for column, line in enumerate(axes.lines, 1):
            told = [[f"{x:.0f}%", number(y)] for x, y in line.get_xydata()]
            assert told == [[row[0], row[column]] for row in table.rows]


def as_perplexities(figure: Figure, tables: tuple[Table, ...]) -> None:
    perplexity, lost = tables
    first, second = figure.axes
    for axes, table, digits in ((first, perplexity, 2), (second, lost, 3)):
        assert [label.get_text() for label in first.get_yticklabels()] == [row[0] for row in table.rows]
        shown = {f"{x:.{digits}f}" for line in axes.lines for x in line.get_xdata()}
        told = {n for row in cells(table) for cell in row for n in re.findall(r"[0-9.]+", cell)}
        assert told <= shown and shown - told <= {"0.000"}  # the line at 0
    names = [short(name, 40) for name in perplexity.head[1:]]
    assert perplexity.head[2:] == lost.head[1:] and in_rows(figure) == names


def as_clusters(figure: Figure, tables: tuple[Table, ...]) -> None:
    (grid, *_) = images(figure)
    told = [[float(cell) for cell in row[3:]] for row in tables[0].rows]
    np.testing.assert_allclose(grid.T, told, atol=0.05 + 1e-9)
    above, below = figure.axes[:2]
    named = [t for t in below.texts if t.get_gid() == "expert"]
    assert [t.get_text() for t in named] == [str(row[0]) for row in tables[0].rows]
    assert [t.get_fontweight() == "bold" for t in named] == [row[2] == "retained" for row in tables[0].rows]
    trees = [c for c in above.collections if c.get_gid() == "tree"]
    assert len(tables) == 1 + len(trees)
    if trees:
        heights = sorted(number(path.vertices[1, 1]) for path in trees[0].get_paths())
        assert heights == sorted(row[3] for row in tables[1].rows)


def as_paths(figure: Figure, tables: tuple[Table, ...]) -> None:
    ((table,), (axes,)) = tables, figure.axes
    (lines,) = [c for c in axes.collections if c.get_gid() == "edges"]
    shown = {(int(a[0]), f"{a[1]:.0f}\N{RIGHTWARDS ARROW}{b[1]:.0f}") for a, b in lines.get_segments()}
    told = {(n, e.split(" ")[0]) for n, row in enumerate(table.rows) for e in row[3].split(", ") if "(" in e}
    assert shown == told
    marks = {line.get_gid(): {tuple(map(int, point)) for point in line.get_xydata()} for line in axes.lines}
    for column, gid in ((1, "retained"), (2, "pruned")):
        assert {(n, spans(sorted(y for x, y in marks[gid] if x == n))) for n in range(len(table.rows))} == {
            (n, row[column]) for n, row in enumerate(table.rows)
        }


AS_TABLES: dict[Any, Callable[[Figure, tuple[Table, ...]], None]] = {
    maps.retained: as_retained,
    maps.shares: as_maps,
    maps.errors: as_maps,
    maps.costs: as_maps,
    charts.scores: as_scores,
    charts.model_costs: as_costs,
    charts.perplexities: as_perplexities,
    graphs.clusters: as_clusters,
    graphs.paths: as_paths,
}


def in_rows(figure: Figure) -> list[str]:
    """The texts of a figure's legend as they are read: line after line."""
    FigureCanvasAgg(figure).draw()
    boxes = [(text.get_window_extent(), text.get_text()) for text in figure.legends[0].get_texts()]
    return [
        text.removesuffix(" (reference)") + " (reference)" * text.endswith("(reference)")
        for _, text in sorted(boxes, key=lambda entry: (-round(entry[0].y0 / 8), entry[0].x0))
    ]


def test_models_stand_in_one_order_everywhere(plans: dict[str, PruningPlan], tmp_path: Path) -> None:
    """The reference first, then as the plans are given, whatever the order of the file."""
    evaluation = an_evaluation(("scores", "other", "clusters", "paths"))
    evaluation["models"]["whole"] = evaluation["models"].pop("whole")  # the last in the file
    with watching() as seen:
        root = page(write_report(tmp_path / "r.html", plans=plans, evaluation=evaluation))
    order = ["whole", "clusters", "paths", "scores", "other"]
    tables = {words(table.find("caption")).split(",")[0]: table for table in root.iter("table")}
    heads = {caption: [words(head) for head in table.findall("thead/tr/th")] for caption, table in tables.items()}
    assert heads["Perplexity (95% interval)"] == ["domain", "whole (reference)", *order[1:]]
    assert heads["Size and speed of the evaluated models"] == ["model", *order]
    assert heads["Results of tasks"] == ["task", "metric", *order]
    assert heads["What the plans leave"] == ["plan", "original", *plans]
    assert heads["Retained experts by layer"] == ["layer", *plans]
    for each in seen:
        if each.make is charts.perplexities:
            assert [in_rows(f) for f in each.figures] == [["whole (reference)", *order[1:]]] * 2


def test_legends_are_read_line_by_line() -> None:
    for width, count in itertools.product((drawing.WIDTH, drawing.NARROW), (2, 3, 5, 7)):
        with style():
            figure = drawing.sheet(2.0, width)
            names = [f"a rather long name {n}" for n in range(count)]
            drawing.legend(figure, figure.subplots().plot(np.zeros((2, count)), label=names))
        assert in_rows(figure) == names


# ------------------------------------------------------------------------------------------- scales that hold


def test_axes_hold_every_interval_and_mark_what_is_infinite() -> None:
    evaluation = an_evaluation()
    wide, infinite = (evaluation["models"]["pruned"]["domains"][d] for d in ("high", "low"))
    wide |= {"lost_interval": [-3.0, 9.0], "perplexity_difference_interval": [-7.0, 4000.0]}
    del infinite["perplexity"], infinite["perplexity_difference_interval"]
    infinite |= {"loss": 800.0, "lost_interval": [700.0, 810.0]}
    comparison = Comparison.from_dict(evaluation)
    for width in (drawing.WIDTH, drawing.NARROW):
        figure = drawn(charts.perplexities, comparison, [*DOMAINS, "all"], width)
        first, second = figure.axes
        for axes in figure.axes:
            low, high = axes.get_xlim()
            assert all(low <= x <= high for line in axes.lines for x in line.get_xdata())
        assert any(list(line.get_xdata()) == pytest.approx([8 - 7.0, 8 + 4000.0]) for line in first.lines)
        assert {(-3.0, 9.0), (700.0, 810.0)} <= {tuple(line.get_xdata()) for line in second.lines}
        (sign,) = [t for t in first.texts if t.get_gid() == "infinite"]
        assert (sign.xy[0], sign.get_text()) == (first.get_xlim()[1], "\N{INFINITY}")
    (table, _) = charts.perplexities_tables(comparison, ["low"])
    assert table.rows == [["low", "20.00", "\N{INFINITY}", "24.43 (20.20 to 22.20)"]]


def test_spans_hold_what_they_are_made_of() -> None:
    cases: list[tuple[list[float], bool]] = [
        ([1.0, 2.0], False),
        ([1.0, 200.0], True),
        ([-1.0, 200.0], False),
        ([3.0], False),
        ([], False),
        ([0.0], False),
        ([math.inf, 2.0], False),
        ([1e-9, 1e9], True),
    ]
    for values, log in cases:
        span = drawing.Span.of(values)
        assert span.log == log and span.low < span.high
        assert all(span.low < value < span.high for value in values if math.isfinite(value))
        assert [span.is_beyond(value) for value in values] == [math.isinf(value) for value in values]


def test_the_error_map_has_colours_for_all_errors_and_marks_the_threshold() -> None:
    grid = np.array([[0.0, 0.25, 0.999], [1.001, 3.5, 19.0]])
    shown = [maps.Map("code", [0, 1], list("012"), grid)]
    for width in (drawing.WIDTH, drawing.NARROW):
        figure = drawn(maps.errors, shown, 5.0, "error", width)
        panel, bar = figure.axes
        (image,) = panel.get_images()
        assert (image.norm.vmin, image.norm.vmax) == (0, 19)
        places = image.norm(grid.ravel())
        assert (np.diff(places) > 0).all() and places[-1] == 1 and places[2] < 0.5 < places[3]
        colours = image.cmap(places)
        blue = colours[:, 2] > colours[:, 0]
        assert blue.tolist() == [True] * 3 + [False] * 3  # two hues: below and above no output
        luminance = drawing.luminance(colours)
        assert (np.diff(luminance) < 0).all()  # darker is more, in grey print as well
        assert {1.0, 19.0} <= set(bar.get_xticks())
        (mark,) = [line for line in bar.lines if line.get_gid() == "mark"]
        assert set(mark.get_xdata()) == {1.0}
        assert all("1" in text.get_text() for text in figure.legends[0].get_texts())
        assert [t.get_text() for t in panel.texts] == ["0.00", "0.25", "1.00", "1.00", "3.50", "19.0"]


def test_text_in_cells_can_be_read(pictures: tuple[Path, list[Seen]]) -> None:
    """A contrast of 4.5 to 1 at least, on every colour of every map."""
    for cmap in (drawing.ramp(), drawing.two_hues()):
        with style():
            axes = Figure().subplots()
            image = axes.imshow(np.linspace(0, 1, 101)[None], cmap=cmap)
            drawing.write_in_cells(axes, image, str, 6)
        ground = drawing.luminance(image.cmap(image.norm(image.get_array()))).ravel()
        ink = np.array([{"black": 0.0, "white": 1.0}[text.get_color()] for text in axes.texts])
        contrast = (np.maximum(ground, ink) + 0.05) / (np.minimum(ground, ink) + 0.05)
        assert contrast.min() >= 4.5
    assert any(axes.texts for each in pictures[1] for figure in each.figures for axes in figure.axes)


def test_what_a_scale_leaves_out_is_said() -> None:
    grid = np.array([[1e-9, 0.0, 2.0], [0.5, math.nan, 0.01]])
    figure = drawn(maps.costs, [maps.Map("m", [0, 1], list("321"), grid)])
    label = figure.axes[-1].get_xlabel() or figure.axes[-1].get_title(loc="left")
    assert "less than 0.00020" in " ".join(label.split())
    figure = drawn(maps.shares, [maps.Map("m", [0], list("01"), np.array([[10.0, 99.0]]))], 0.0, 50.0, "%", "expert")
    assert figure.axes[0].get_images()[0].norm.vmax == 99


# ------------------------------------------------------------------------------------------- what is true


def test_no_scores_of_another_method(stats: CalibrationStats, plans: dict[str, PruningPlan], tmp_path: Path) -> None:
    content = sections.scores(stats, plans, gallery_without_drawing())
    captions = [table.caption for figure in content["figures"] for table in figure.tables]
    assert captions == ["scores: reap: reap scores, mean of the layer = 1, pruned experts in brackets"]
    assert content["without"] == ["clusters (mosaic)", "paths (pathfinder)"]
    root = page(write_report(tmp_path / "s.html", stats=None, plans={"clusters": plans["clusters"]}))
    (section,) = [e for e in root.iter("section") if e.get("id") == "scores"]
    assert "No scores are shown for clusters (mosaic)" in words(section) and not section.findall(".//figure")
    content = sections.scores(stats, {}, gallery_without_drawing())
    assert [method.name for method in content["methods"]] == ["reap", "frequency"]


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    """Of the original's folder, where the plan says it is, and of what a plan left, for every plan."""
    model = make_model("qwen2_moe")
    model.save_pretrained(tmp_path / "whole")
    made_for = {**open_layout(tmp_path / "whole").facts(), "name_or_path": str(tmp_path / "whole")}
    plan = PruningPlan("qwen2_moe", 3, "by hand", {0: (0, 1, 2), 2: (0, 1, 2, 5)}, {0: 7, 2: 7})
    plans = {
        "one": replace(plan, provenance={"model": made_for}),
        "two": replace(plan, retained={0: (1, 2, 3), 2: (1, 2, 3)}, provenance={"model": made_for}),
    }
    before = sum(p.numel() for p in model.parameters())
    sizes = {}
    for name, each in plans.items():
        each.apply_to_checkpoint(tmp_path / "whole", tmp_path / name)
        sizes[name] = sum(math.prod(t.shape) for t in Checkpoint.open(tmp_path / name).tensors.values())
    expected = [f"{n:,}" for n in (before, *sizes.values())]
    page_of = {"plans": plans, "overwrite": True}
    (tmp_path / "whole").rename(tmp_path / "moved")
    text = words(page(write_report(tmp_path / "r.html", **page_of)))
    assert "Parameters and bytes of one, two are not shown: they are read from the files of whole, and" in text
    for folder in ("moved", "one", "two"):
        root = page(write_report(tmp_path / "r.html", model=tmp_path / folder, **page_of))
        left = dict((line[0], line[1:]) for line in rows(root, "What the plans leave"))
        assert left["parameters"] == expected and "are not shown" not in words(root)
    (tmp_path / "moved").rename(tmp_path / "whole")
    root = page(write_report(tmp_path / "r.html", **page_of))
    assert dict((line[0], line[1:]) for line in rows(root, "What the plans leave"))["parameters"] == expected
    beside = page(write_report(tmp_path / "two" / "report.html", plans={"two": replace(plans["two"], provenance={})}))
    left = dict((line[0], line[1:]) for line in rows(beside, "What the plans leave"))
    assert left["parameters"] == [expected[0], expected[2]]
    foreign = replace(plan, retained={0: (0, 1, 2)}, original_num_experts={0: 7})
    with pytest.raises(RequestError, match="neither the model that a plan was made for nor one"):
        write_report(tmp_path / "s.html", plans={"foreign": foreign}, model=tmp_path / "whole")


@pytest.mark.parametrize("way", ["prune", "keep", "drop"])
def test_sizes_know_what_becomes_of_heads(way: str, tmp_path: Path) -> None:
    source = checkpoint("deepseek_v3", tmp_path / "whole", loads=False)
    layout = open_layout(source)
    layers = dict.fromkeys(layout.num_experts, tuple(range(8)))
    provenance = {"model": {**layout.facts(), "name_or_path": str(source)}}
    original = dict(layout.num_experts)
    plan = PruningPlan("deepseek_v3", 3, "by hand", layers, original, provenance=provenance, config={"mtp": way})
    plan.apply_to_checkpoint(source, tmp_path / "out")
    whole, left = (Checkpoint.open(folder).nbytes for folder in (source, tmp_path / "out"))
    saved = PruningPlan.load(tmp_path / "out")  # which names the original without its place
    places = (source, tmp_path / "out")
    for each, model in ((plan, None), *itertools.product((plan, saved), places)):
        family = find_family({"plan": each}, model, tmp_path)
        assert family is not None
        assert (family.whole.nbytes, family.pruned(each).nbytes) == (whole, left)


def test_notes_and_verdicts_are_on_top(plans: dict[str, PruningPlan], tmp_path: Path) -> None:
    heads = PruningPlan("m", 1, "by hand", {0: (0,), 1: (0, 2)}, {0: 2, 1: 3}, heads=(1,))
    evil = replace(plans["scores"], provenance={"notes": ["<b>\x1b[31m & so on", "shared"]})
    other = replace(plans["paths"], provenance={"notes": ["shared"]})
    root = page(write_report(tmp_path / "r.html", plans={"a": evil, "b": other, "c": heads}))
    (noted,) = root.findall(".//header/ul")
    assert [words(item) for item in noted] == [
        "a: <b>\N{REPLACEMENT CHARACTER}[31m & so on",
        "a, b: shared",
        "c: heads for further tokens are pruned as well (layer 1: 2 of 3 experts)",
    ]
    comparison = Comparison.from_dict(an_evaluation())
    said: list[tuple[Any, list[str]]] = [
        ("perplexity <doubled>", ["perplexity <doubled>"]),
        (lambda: ["one", "two"], ["one", "two"]),
        ({"m": "worse"}, ["m: worse"]),
        (None, []),
    ]
    for verdict, expected in said:
        object.__setattr__(comparison, "verdict", verdict)
        assert origin.verdict(comparison) == expected


# ------------------------------------------------------------------------------------------- every screen


def test_every_wide_picture_has_one_for_small_screens(pictures: tuple[Path, list[Seen]]) -> None:
    path, seen = pictures
    root = page(path)
    for each in seen:
        (figure,) = [f for f in root.iter("figure") if f.get("id") == f"figure-{each.picture.name}"]
        sources = figure.findall("picture/source")
        assert len(sources) == (each.picture.wide.width > 384) == len(each.figures) - 1
        for source, narrow in zip(sources, each.figures[1:], strict=True):
            assert int(str(source.get("width"))) <= 384 and "screen" in str(source.get("media"))
            ElementTree.fromstring(base64.b64decode(str(source.get("srcset")).split(",")[1]))
            assert not crowded(boxes_of(narrow))
            assert all(text.get_fontsize() >= 5.5 for text in narrow.findobj(Text) if text.get_text().strip())
    style = str(root.findall(".//style")[0].text)
    assert "@media print" in style and not re.search(r"figure[^{}]*\{[^}]*overflow", style)


def test_hundreds_of_domains_stay_few_pictures() -> None:
    names = [f"domain {n}" for n in range(300)]
    compared = {"samples": 9, "tokens": 90, "reference_perplexity": 20.0, "kl_divergence": 0.1, "top1_agreement": 0.9}
    domains = {d: {**compared, "perplexity": 20.0 + n} for n, d in enumerate(names)}
    whole = {d: {"samples": 9, "tokens": 90, "perplexity": 20.0} for d in names}
    models = {"whole": {"domains": whole}, "pruned": {"domains": domains}}
    comparison = Comparison.from_dict({"format_version": 1, "reference": "whole", "models": models})
    content = measured.quality(comparison, gallery_without_drawing())
    assert content["some"] == (24, 300) and len(content["figures"]) == 2
    assert [row[0] for table in content["figures"][0].tables[:1] for row in table.rows] == names[276:288]
    assert [len(table.rows) for table in content["rest"]] == [300, 300]
    kl = {"all": 1.0, **{d: float(n) for n, d in enumerate(names)}}
    sensitivity = a_sensitivity()
    for method in sensitivity["methods"].values():
        for entry in [*method["model"], *(c for layer in method["layers"].values() for c in layer["counts"].values())]:
            entry["kl"] = kl
    found = measured.sensitivity(Sensitivity.from_dict(sensitivity), gallery_without_drawing())
    assert found["some"] == (24, 300) and len(found["by_domain"]) == 2
    assert len(found["layer_tables"]["reap"].head) == 3 + 24 + 1


def gallery_without_drawing() -> Gallery:
    """A gallery whose pictures are their tables alone."""

    class Tables(Gallery):
        def draw(self, name: str, alt: str, make: Any, *args: Any, tables: Any = (), both: bool = True) -> Picture:
            return Picture(name, alt, drawing.Drawing(b"", 1, 1), None, tuple(tables))

    return Tables()


# ------------------------------------------------------------------------------------------- names of plans


def test_plans_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases: list[tuple[list[str], list[str]]] = [
        (["plan.json"], ["plan"]),
        (["a/plan.json", "b/plan.json", "c/plan.json"], ["a", "b", "c"]),
        (["x/a/plan.json", "y/a/plan.json"], ["x", "y"]),
        (["x/a.json", "y/a.json", "y/b.json"], ["x/a", "y/a", "b"]),
        (["out/moe_pruning_plan.json", "other"], ["out", "other"]),
        (["./a", "../a"], [tmp_path.name, tmp_path.parent.name]),
        (["half=a/plan.json", "b/plan.json"], ["half", "plan"]),
        (["plan=a/plan.json", "b/plan.json"], ["plan", "b/plan"]),
        (["one=p.json", "two=p.json"], ["one", "two"]),
        (["."], [tmp_path.name]),
    ]
    for given, names in cases:
        assert list(named_paths(given)) == names, given
    assert named_paths(["half=a/plan.json"]) == {"half": "a/plan.json"}
    (tmp_path / "a=b.json").touch()
    assert named_paths(["a=b.json"]) == {"a=b": "a=b.json"}
    for twice in (["a.json", "a.json"], ["n=a.json", "n=b.json"]):
        with pytest.raises(RequestError, match=r"given twice|are called 'n'"):
            named_paths(twice)


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
        named = [int(text.get_text()) for text in below.texts if text.get_gid() == "expert"]
        assert layer.has_tree and sorted(named) == list(layer.clusters.experts)
        (tree,) = [c for c in axes.collections if c.get_gid() == "tree"]
        joints = [np.asarray(path.vertices) for path in tree.get_paths()]
        assert len(joints) == 4 * len(trees)
        for n in range(len(trees)):  # side by side, each above its own leaves
            own = [j for j in joints if 5 * n - 0.5 < j[:, 0].min() and j[:, 0].max() < 5 * n + 4.5]
            assert sorted(j[1, 1] for j in own) == pytest.approx(sorted(layer.clusters.trees[n][:, 2]))
        cuts = [line for line in axes.lines if line.get_gid() == "cut"]
        assert len(cuts) == (layer.cut is not None) == (len(trees) == 1)
    page(write_report(tmp_path / "r.html", stats=grouped, plans={"grouped": plan}))


def test_a_tree_whose_distances_tie_is_left_out(tmp_path: Path) -> None:
    """Experts that rank all domains alike or equally far apart: numbered bands, and it is said."""
    apart = np.random.default_rng(0).random((6, 9))
    kinds = {"alike": [[1, 2, 3]] * 6, "in threes": [[1, 2, 3]] * 3 + [[3, 2, 1]] * 3, "apart": apart}
    for name, vectors in kinds.items():
        made = np.array(vectors, dtype=float)
        tree, none = ward_tree(made), np.zeros(6)
        clusters = Clusters(tuple(range(6)), none.astype(int), made, (tree,), cut(tree, 2), none, (0, 5))
        shares = np.full(made.shape[1], 1 / made.shape[1])
        layer = explain.MosaicLayer(4, (), clusters, shares, made, None, True)
        assert layer.has_tree == (name == "apart") and layer.arbitrary == (name == "alike")
        for width in (drawing.WIDTH, drawing.NARROW):
            above = drawn(graphs.clusters, layer, width).axes[0]
            trees = [c for c in above.collections if c.get_gid() == "tree"]
            bands = [text.get_text() for text in above.texts if text.get_gid() == "band"]
            assert (len(trees), bands) == ((1, []) if layer.has_tree else (0, ["1", "2"]))
    stats = random_statistics(SoftmaxTopK(2, True, False), 1, 6)
    plan = planned(stats, "mosaic", num_experts=3, method_options={"num_domains": 3, "num_generalists": 0})
    same = replace(stats.layers[0], tensors={**stats.layers[0].tensors, "token_single_error": torch.ones(120, 6)})
    root = page(write_report(tmp_path / "r.html", stats=replace(stats, layers={0: same}), plans={"p": plan}))
    text = words(root.find(".//section[@id='mosaic']"))
    assert "Most distances tie in layer 0: a tree would show an order that is not there" in text
    assert "5 of the 5 distances at which these experts would be joined tie" in text


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
    weights = pathfinder.path_weights(stats, options)
    importance, transitions = weights.nodes(stats), weights.transitions
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


@contextlib.contextmanager
def placing_texts() -> Iterator[dict[Figure, dict[Text, tuple[Any, Any]]]]:
    """Where texts are drawn meanwhile, the last time, and the size of their figures."""
    boxes: dict[Figure, dict[Text, tuple[Any, Any]]] = {}
    draw = Text.draw

    def noting(text: Text, renderer: Any) -> None:
        if text.get_text().strip() and text.get_visible():
            figure = text.get_figure(root=True)
            boxes.setdefault(figure, {})[text] = text.get_window_extent(renderer), tuple(figure.bbox.size)
        draw(text, renderer)

    with patch.object(Text, "draw", noting):
        yield boxes


def boxes_of(figure: Figure) -> dict[Text, tuple[Any, Any]]:
    with placing_texts() as boxes:
        FigureCanvasAgg(figure).draw()
    return boxes[figure]


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
    evaluation = an_evaluation(("short", long))
    sensitivity = a_sensitivity(layers, ("mosaic", "pathfinder", long))
    with placing_texts() as boxes:
        path = write_report(
            tmp_path / "r.html", stats=stats, plans=plans, sensitivity=sensitivity, evaluation=evaluation
        )
    assert len(boxes) > 10
    assert not [problem for texts in boxes.values() for problem in crowded(texts)]
    assert path.stat().st_size < 8_000_000
    root = page(path)
    assert len(root.findall(".//section[@id='mosaic']//figure")) == 2
    assert len(rows(root, "Experts on the best paths by layer")) == layers


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
    with pytest.raises(RequestError, match="is no file and is not replaced"):
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

    monkeypatch.setattr("optimum_moe_prune.storage.atomic.sync", full)
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
