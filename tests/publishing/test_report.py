# SPDX-License-Identifier: Apache-2.0
"""The report: figures show what was measured, the page is sound and safe, and files are whole or absent."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
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
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

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
from optimum_moe_prune.methods import pathfinder
from optimum_moe_prune.methods.budget import UniformBudget
from optimum_moe_prune.methods.mosaic import cut, ward_tree
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.publishing import report as package
from optimum_moe_prune.publishing.report import curves, explain, graphs, grids, maps, write_report
from optimum_moe_prune.publishing.report.canvas import Picture, draw, style
from optimum_moe_prune.publishing.report.data import coverage, named, reduce_stats, relative, retained_grid
from optimum_moe_prune.publishing.report.measured import read_evaluation, read_sensitivity
from optimum_moe_prune.publishing.report.words import fitting, number, plain, spans
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


def a_sensitivity(layers: tuple[int, ...] = (0, 2), methods: tuple[str, ...] = ("mosaic", "reap")) -> dict[str, Any]:
    """Costs that differ in every place, so that none can be taken for another."""

    def costs(*place: float) -> dict[str, float]:
        whole = 0.001 * math.exp(sum(p * w for p, w in zip(place, (1.1, 0.7, 0.31), strict=False)))
        return {"all": whole, "high": 1.5 * whole, "low": 0.5 * whole}

    return {
        "format_version": 1,
        "model": {"name_or_path": "some/model", "revision": "0123"},
        "samples": {"fingerprint": "f", "tokens_by_domain": {"high": 70, "low": 80}},
        "methods": {
            method: {
                "config": {},
                "layers": {
                    str(layer): {
                        "original_num_experts": 7,
                        "counts": {
                            str(count): {"retained": list(range(count)), "kl": costs(m, layer, 7 - count)}
                            for count in (6, 5, 4)
                        },
                    }
                    for layer in layers
                },
                "model": [
                    {"allocation": a, "sparsity": s, "num_experts": {}, "kl": costs(m, n, 12 * s)}
                    for n, a in enumerate(("uniform", "sensitivity"))
                    for s in (0.25, 0.5, 0.75)
                ],
            }
            for m, method in enumerate(methods)
        },
        "provenance": {},
    }


def an_evaluation(labels: tuple[str, ...] = ("pruned", "harder")) -> dict[str, Any]:
    before = {"high": 8.0, "low": 20.0, "all": 12.0}
    models: dict[str, Any] = {
        "whole": {
            "domains": {d: {"samples": 6, "tokens": 80, "perplexity": p} for d, p in before.items()},
            "parameters": 4_000_000_000,
            "bytes": 8_000_000_000,
            "generation": {"prompt_tokens": 16, "new_tokens": 8, "prompt_seconds": 0.5, "tokens_per_second": 20.0},
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
                    "lost": 0.1 * n,
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


def words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def tags(root: ElementTree.Element) -> list[str]:
    return [str(element.tag).split("}")[-1] for element in root.iter()]


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


def by_gid(figure: Figure, gid: str) -> list[Any]:
    return figure.findobj(lambda artist: artist.get_gid() == gid)


# ------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def everything(
    stats: CalibrationStats, plans: dict[str, PruningPlan], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(
        folder / "report.html",
        stats=stats,
        plans=plans,
        sensitivity=a_sensitivity(),
        evaluation=an_evaluation(),
        pictures=folder / "pictures",
    )


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
    assert len(root.findall(".//h1")) == 1


def test_nothing_comes_from_elsewhere_and_nothing_runs(everything: Path) -> None:
    root = page(everything)
    assert not set(tags(root)) & {"script", "link", "iframe", "object", "embed", "base", "form", "foreignObject"}
    for element in root.iter():
        for name, value in element.attrib.items():
            local = name.split("}")[-1]
            assert not local.startswith("on"), name
            if local == "href" and str(element.tag).endswith("a"):
                assert re.match(r"#|https://arxiv\.org/abs/[0-9.]+$", value), value
            elif local in ("href", "src"):
                assert value.startswith(("#", "data:image/png;base64,")), value
            assert "url(" not in value or value.split("url(")[1].startswith("#"), value
    (style_,) = root.findall(".//style")
    assert not re.search(r"@import|url\(", str(style_.text))
    (policy,) = [m for m in root.iter("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy.get("content")).startswith("default-src 'none'")


def test_every_figure_and_table_can_be_read_without_seeing(everything: Path) -> None:
    root = page(everything)
    figures = root.findall(".//figure")
    assert len(figures) > 10
    for figure in figures:
        (picture,) = [e for e in figure if str(e.tag).split("}")[-1] in ("svg", "img")]
        assert len(picture.get("aria-label") or picture.get("alt") or "") > 20, figure.get("id")
        assert figure.find("figcaption") is not None
    for table in root.iter("table"):
        assert words(table.find("caption"))
        heads = table.findall(".//th")
        assert heads and all(head.get("scope") in ("row", "col") for head in heads)


def test_references_inside_a_picture_lead_to_it(everything: Path) -> None:
    """Several pictures stand in one page: a clip path or mark must be that of its own picture."""
    root = page(everything)
    for figure in root.findall(".//figure"):
        own = {e.get("id") for e in figure.iter()}
        text = ElementTree.tostring(figure, encoding="unicode")
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
        assert used <= own
        assert {name for name in own if name and not name.startswith("figure-")} <= used


def by_domain(stats: CalibrationStats, layer: int, name: str, domain: str) -> np.ndarray:
    rows = [row for row, sample in enumerate(stats.samples) if sample.domain == domain]
    return stats.layers[layer].tensors[name][rows].sum(0).numpy()


def rows(root: ElementTree.Element, caption: str) -> list[list[str]]:
    """The cells of the table whose caption begins so."""
    (table,) = [t for t in root.iter("table") if words(t.find("caption")).startswith(caption)]
    return [[words(cell) for cell in line] for line in table.findall("tbody/tr")]


def test_tables_say_what_the_figures_show(
    everything: Path, stats: CalibrationStats, plans: dict[str, PruningPlan]
) -> None:
    root, reduced = page(everything), reduce_stats(stats)
    used, alone = rows(root, "The 3 most used experts"), rows(root, "The 3 experts with the least error")
    for (row, layer), (column, domain) in itertools.product(enumerate((0, 2)), enumerate(DOMAINS)):
        share = (
            by_domain(stats, layer, "routed_tokens", domain) / by_domain(stats, layer, "routed_tokens", domain).sum()
        )
        most = np.argsort(-share, kind="stable")[:3]
        assert used[row][column + 1] == ", ".join(f"{e} ({share[e]:.0%})" for e in most)
        least = np.argsort(reduced.error[column, row], kind="stable")[:3]
        assert re.findall(r"(\d+) \(", alone[row][column + 1]) == list(map(str, least))
    for name, plan in plans.items():
        assert rows(root, f"Retained experts by layer: {name}") == [
            [str(layer), f"{len(experts)} of 7", spans(experts)] for layer, experts in plan.retained.items()
        ]
    removed = rows(root, "Routed experts, of all layers together")
    assert [line[:4] for line in removed] == [
        [name, "14", str(kept), str(14 - kept)]
        for name, kept in [(name, sum(plan.num_experts.values())) for name, plan in plans.items()]
    ]
    assert ["low", "6", "80", "22.10", "20.00", "0.100 (0.070 to 0.150)", "0.120", "90.0%"] in rows(
        root, "pruned, against"
    )
    costs = rows(root, "KL divergence, nats per token")
    points = [p for m in a_sensitivity()["methods"].values() for p in m["model"]]
    assert [float(line[3]) for line in costs] == pytest.approx([p["kl"]["all"] for p in points], rel=0.005)
    (whole, pruned, _) = rows(root, "Size and speed")
    assert whole[1:3] == ["4,000,000,000", "8.00 GB"] and pruned[1:3] == ["2,000,000,000 (-50%)", "4.00 GB (-50%)"]


def test_pictures_are_written_in_their_formats(everything: Path) -> None:
    names = {path.name for path in (everything.parent / "pictures").iterdir()}
    stems = {name.split(".")[0] for name in names}
    assert names == {f"{stem}.{form}" for stem in stems for form in ("png", "svg")}
    assert {f.get("id") for f in page(everything).findall(".//figure")} == {f"figure-{stem}" for stem in stems}
    for name in names:
        content = (everything.parent / "pictures" / name).read_bytes()
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG")
        else:
            root = ElementTree.fromstring(content)
            assert root.tag.endswith("svg") and str(root[0].text).strip()


def test_the_same_inputs_give_the_same_bytes(
    everything: Path, stats: CalibrationStats, plans: dict[str, PruningPlan], tmp_path: Path
) -> None:
    """Whatever the user has set in matplotlib, and without changing that."""
    theirs = {"font.size": 30.0, "svg.fonttype": "path", "axes.titlepad": 40.0, "lines.markeredgewidth": 5.0}
    with matplotlib.rc_context(theirs):
        again = write_report(
            tmp_path / "report.html",
            stats=stats,
            plans=plans,
            sensitivity=a_sensitivity(),
            evaluation=an_evaluation(),
            pictures=tmp_path / "pictures",
        )
        assert {key: matplotlib.rcParams[key] for key in theirs} == theirs
    assert again.read_bytes() == everything.read_bytes()
    for path in (everything.parent / "pictures").iterdir():
        assert (tmp_path / "pictures" / path.name).read_bytes() == path.read_bytes(), path.name


def test_every_format_is_drawn_the_same_each_time(plans: dict[str, PruningPlan]) -> None:
    first, second = (draw("n", "alt", maps.retained, plans, formats=("png", "svg", "pdf")) for _ in range(2))
    assert first == second
    starts = {"n.png": b"\x89PNG", "n.svg": b"<?xml", "n.pdf": b"%PDF"}
    assert {name: content[:5].startswith(starts[name]) for name, content in first.files.items()} == dict.fromkeys(
        starts, True
    )


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
    if given == "plans":
        assert words(root).count("none were given") == 2  # of the set methods


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing to report"):
        write_report(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_objects_that_become_mappings_are_taken(tmp_path: Path) -> None:
    class Thing:
        def __init__(self, values: dict[str, Any]) -> None:
            self.to_dict = lambda: values

    as_objects = write_report(
        tmp_path / "a.html", sensitivity=Thing(a_sensitivity()), evaluation=Thing(an_evaluation())
    )
    as_mappings = write_report(tmp_path / "b.html", sensitivity=a_sensitivity(), evaluation=an_evaluation())
    assert as_objects.read_bytes() == as_mappings.read_bytes()
    with pytest.raises(RequestError, match="the evaluation is damaged"):
        write_report(tmp_path / "c.html", evaluation=3)


HOSTILE = "<script>alert('$x$')</script> & \"q\" $\\frac{ _\x00\ud800\u202e\n" + "n" * 300


def test_names_are_text_and_nothing_else(stats: CalibrationStats, tmp_path: Path) -> None:
    """Domains, plans, methods, models, options: all of them come from files that anybody may have written."""
    samples = tuple(replace(s, domain=HOSTILE if s.domain == "low" else "_$") for s in stats.samples)
    hostile = replace(
        stats,
        samples=samples,
        model={**stats.model, "name_or_path": HOSTILE, "revision": HOSTILE},
        provenance={HOSTILE: {HOSTILE: [HOSTILE]}},
    )
    made = planned(hostile, "mosaic")
    foreign = replace(
        planned(hostile, "reap"),
        method=HOSTILE,
        config={HOSTILE: [HOSTILE]},
        provenance={"notes": [HOSTILE], "findings": {HOSTILE: HOSTILE}, "made": HOSTILE},
    )
    sensitivity, evaluation = a_sensitivity(methods=(HOSTILE, "_$")), an_evaluation((HOSTILE, "_$"))
    for method in sensitivity["methods"].values():
        for place in [c for layer in method["layers"].values() for c in layer["counts"].values()] + method["model"]:
            place["kl"][HOSTILE] = place["kl"].pop("low")
            place["allocation"] = HOSTILE
    for model in evaluation["models"].values():
        model["domains"][HOSTILE] = model["domains"].pop("low")
        model["tasks"] = {HOSTILE: {HOSTILE: 0.5}}
    path = write_report(
        tmp_path / "r.html",
        stats=hostile,
        plans={HOSTILE: made, "_$": foreign},
        sensitivity=sensitivity,
        evaluation=evaluation,
        title=HOSTILE,
        pictures=tmp_path / "pictures",
        formats=("svg",),
    )
    root = page(path)
    assert not {"script", "frac"} & set(tags(root))
    assert words(root).count("<script>alert('$x$')</script>") > 20
    legend = words(root.find(".//figure[@id='figure-perplexity-1']"))
    assert "<script>alert('$x$')" in legend and "_$" in legend  # signs and no formula, also in a picture
    for picture in (tmp_path / "pictures").glob("*.svg"):
        assert "script" not in tags(ElementTree.fromstring(picture.read_bytes()))


# ------------------------------------------------------------------------------------------- figures


def test_maps_of_retained_experts_are_the_plans(plans: dict[str, PruningPlan]) -> None:
    unequal = PruningPlan("mixtral", 2, "by hand", {0: (0, 2), 3: (0, 1, 4)}, {0: 3, 3: 5})
    shown = {**plans, "unequal": unequal}
    figure = drawn(maps.retained, shown)
    for (name, plan), grid in zip(shown.items(), images(figure), strict=True):
        for row, layer in enumerate(sorted(plan.retained)):
            experts = range(plan.original_num_experts[layer])
            assert grid[row, : len(experts)].tolist() == [float(e in plan.retained[layer]) for e in experts], name
            assert np.isnan(grid[row, len(experts) :]).all()
    bars = [[bar.get_width() for bar in axes.patches] for axes in figure.axes if axes.patches]
    assert bars == [[len(plan.retained[layer]) for layer in sorted(plan.retained)] for plan in shown.values()]


def test_maps_by_domain_are_sums_over_its_samples(stats: CalibrationStats) -> None:
    reduced = reduce_stats(stats)
    routing, error = images(drawn(maps.routing, reduced, [0, 1])), images(drawn(maps.single_error, reduced, [0, 1]))
    for n, domain in enumerate(DOMAINS):
        for row, layer in enumerate((0, 2)):
            routed = by_domain(stats, layer, "routed_tokens", domain)
            tokens = sum(s.num_tokens for s in stats.samples if s.domain == domain)
            np.testing.assert_allclose(routing[n][row], 100 * routed / (3 * tokens))  # 3 experts for each token
            wrong, output = (by_domain(stats, layer, name, domain) for name in ("single_error", "output_energy"))
            np.testing.assert_allclose(error[n][row], wrong / output)
    assert maps.domain_pages(replace(reduced, domains=tuple(map(str, range(50))))) != [[0, 1]]
    every = itertools.chain.from_iterable(maps.domain_pages(replace(reduced, domains=tuple(map(str, range(50))))))
    assert list(every) == list(range(50))


def test_plans_are_compared_where_they_are_for_one_shape(plans: dict[str, PruningPlan], tmp_path: Path) -> None:
    one, two = plans["clusters"], plans["paths"]
    (first, second) = rows(page(write_report(tmp_path / "a.html", plans={"1": one, "2": two})), "Share that the other")
    shared = sum(len(set(one.retained[layer]) & set(two.retained[layer])) for layer in (0, 2))
    assert first == ["1", "100%", f"{shared / 8:.0%}"] and second == ["2", f"{shared / 8:.0%}", "100%"]
    other = PruningPlan("mixtral", 2, "by hand", {0: (0, 2)}, {0: 3}, provenance={"notes": ["only here"]})
    text = words(page(write_report(tmp_path / "b.html", plans={"1": one, "2": two, "3": other})))
    assert "Share that the other" not in text
    assert "only here (3)" in text and "layers without experts stay as they are: 1 (1; 2)" in text


def test_coverage_is_the_routing_to_retained_experts(stats: CalibrationStats, plans: dict[str, PruningPlan]) -> None:
    reduced = reduce_stats(stats)
    tables = [coverage(plan, reduced) for plan in plans.values()]
    shown = images(drawn(grids.coverage, list(plans), tables, reduced))
    for plan, layers, mean in zip(plans.values(), shown[0::2], shown[1::2], strict=True):
        for row, layer in enumerate((0, 2)):
            for column, domain in enumerate(DOMAINS):
                routed = by_domain(stats, layer, "routed_tokens", domain)
                kept = routed[list(plan.retained[layer])].sum()
                assert layers[row, column] == pytest.approx(100 * kept / routed.sum())
        np.testing.assert_allclose(mean[0], layers.mean(0))


def test_scores_stand_where_they_should(plans: dict[str, PruningPlan]) -> None:
    plan = plans["scores"]
    values = np.array([plan.scores[layer] for layer in sorted(plan.scores)])
    figure = drawn(curves.scores, values, retained_grid(plan), sorted(plan.scores), "reap")
    for name, shift in (("retained", -0.17), ("pruned", 0.17)):
        (line,) = by_gid(figure, name)
        expected = [
            (row + shift, plan.scores[layer][e] / np.mean(plan.scores[layer]))
            for row, layer in enumerate(sorted(plan.retained))
            for e in range(plan.original_num_experts[layer])
            if (e in plan.retained[layer]) == (name == "retained")
        ]
        np.testing.assert_allclose(line.get_xydata(), expected)


def test_scores_without_spread_and_without_scale() -> None:
    values = np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 4.0], [math.nan] * 3])
    np.testing.assert_allclose(relative(values), [[1, 1, 1], [1, 0, 2], [math.nan] * 3])
    drawn(curves.scores, values, None, (0, 1, 2), "x")
    wide = np.array([[0.0, 1e-6, 1.0, 1.0]])
    (line,) = by_gid(drawn(curves.scores, wide, None, (0,), "x"), "expert")
    assert line.axes.get_yscale() == "log"
    low, heights = line.axes.get_ylim()[0], line.get_ydata()
    assert heights[0] == pytest.approx(low) and heights[1] > low  # 0 on the edge, the least above it


def test_costs_by_layer_are_as_measured() -> None:
    values = a_sensitivity()
    del values["methods"]["reap"]["layers"]["2"]["counts"]["5"]
    shown = images(drawn(grids.layer_costs, read_sensitivity(values).layers, "low"))
    for grid, method in zip(shown, values["methods"].values(), strict=True):
        for (row, layer), (column, count) in itertools.product(enumerate("02"), enumerate("654")):
            entry = method["layers"][layer]["counts"].get(count)
            expected = math.nan if entry is None else entry["kl"]["low"]
            assert grid[row, column] == pytest.approx(expected, nan_ok=True)


def test_costs_of_the_model_are_as_measured() -> None:
    values = a_sensitivity()
    figure = drawn(curves.model_costs, read_sensitivity(values).curves, ["all", "high", "low"])
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
    values = an_evaluation()
    figure = drawn(curves.perplexities, read_evaluation(values), [*DOMAINS, "all"])
    for n, label in enumerate(("pruned", "harder")):
        for domain, found in values["models"][label]["domains"].items():
            perplexity, lost = by_gid(figure, f"{n}:{domain}")
            assert perplexity.get_xdata() == [found["perplexity"]] and lost.get_xdata() == [found["lost"]]
            assert perplexity.get_ydata() == lost.get_ydata()
    for domain, found in values["models"]["whole"]["domains"].items():
        (mark,) = by_gid(figure, f"reference:{domain}")
        assert mark.get_xdata() == [found["perplexity"]]
    ends = sorted(tuple(line.get_xdata()) for line in by_gid(figure, "interval"))
    pruned = [
        (d, before)
        for label in ("pruned", "harder")
        for d in values["models"][label]["domains"].values()
        for before in [d["reference_perplexity"]]
    ]
    expected = [tuple(d["lost_interval"]) for d, _ in pruned]
    expected += [tuple(before + end for end in d["perplexity_difference_interval"]) for d, before in pruned]
    np.testing.assert_allclose(ends, sorted(expected))


def test_one_model_without_a_reference(tmp_path: Path) -> None:
    values = an_evaluation(())
    figure = drawn(curves.perplexities, read_evaluation(values), [*DOMAINS, "all"])
    assert len(figure.axes) == 1 and by_gid(figure, "0:low")[0].get_xdata() == [20.0]
    values["reference"] = None
    root = page(write_report(tmp_path / "r.html", evaluation=values))
    assert "20.00" in words(root) and "against" not in words(root.find(".//section[@id='quality']"))
    only_size = {"format_version": 1, "reference": None, "models": {"m": {"domains": {}, "parameters": 5, "bytes": 9}}}
    root = page(write_report(tmp_path / "s.html", evaluation=only_size))
    assert [section.get("id") for section in root.iter("section")] == ["size"]


def test_sizes_are_as_measured() -> None:
    evaluation = read_evaluation(an_evaluation(("pruned",)))
    figure = drawn(curves.sizes, evaluation)
    titles = {axes.get_title("left"): [bar.get_width() for bar in axes.patches] for axes in figure.axes}
    assert titles == {
        "parameters, billions": [4.0, 2.0],
        "size of the tensors, GB": [8.0, 4.0],
        "generation, tokens per second": [20.0],
    }
    assert [bar.get_hatch() for bar in figure.axes[0].patches] == ["////", None]


# ------------------------------------------------------------------------------------------- why plans are as they are

MOSAIC: list[dict[str, Any]] = [
    {},
    {"method_options": {"num_domains": 5}},
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
    ward = settings.get("method_options", {}).get("ward", "ranks")
    for layer in found:
        assert layer.agrees
        assert sorted([*layer.generalists, *layer.representatives]) == list(plan.retained[layer.layer])
        if not layer.representatives:
            continue
        assert layer.domain_share.sum() == pytest.approx(1) and (np.diff(layer.domain_share) <= 0).all()
        assert layer.silhouette is None or -1 <= layer.silhouette <= 1
        # The tree that is drawn, cut, gives the clusters that were chosen from.
        clusters = len(layer.representatives)
        below = layer.tree[: len(layer.experts) - clusters]
        joined = {n: {n} for n in range(len(layer.experts))}
        for n, (a, b, *_) in enumerate(below, len(layer.experts)):
            joined[n] = joined.pop(int(a)) | joined.pop(int(b))
        label = cut(ward_tree(layer.vectors, ward), clusters)
        assert {frozenset(group) for group in joined.values()} == {
            frozenset(np.flatnonzero(label == c).tolist()) for c in range(clusters)
        }
        for representative, members in layer.clusters:
            scores = {e: layer.scores[layer.experts.index(e)] for e in members}
            assert scores[representative] == max(scores.values())


def test_the_tree_shows_representatives_and_ranks(stats: CalibrationStats, plans: dict[str, PruningPlan]) -> None:
    recipe = explain.recipe_of(plans["clusters"], stats)
    for found in explain.mosaic_layers(plans["clusters"], recipe):
        figure = drawn(graphs.clusters, found)
        bold = {int(t.get_text()) for t in figure.texts if t.get_fontweight() == "bold"}
        numbers = [int(t.get_text()) for t in figure.texts if t.get_text().isdigit()]
        assert bold == set(found.representatives) and sorted(numbers) == list(found.experts)
        (grid,) = images(figure)[:1]
        for column, expert in enumerate(numbers):
            vector = found.vectors[found.experts.index(expert)]
            assert grid[:, column].tolist() == [1 + sum(vector < v) for v in vector]
        heights = [0.0, *found.tree[:, 2], math.inf]
        merges = len(found.experts) - len(found.representatives)
        (line,) = by_gid(figure, "cut")
        assert heights[merges] <= line.get_ydata()[0] <= heights[merges + 1]


def test_a_plan_that_was_edited_is_said_to_be(stats: CalibrationStats, plans: dict[str, PruningPlan]) -> None:
    plan = plans["clusters"]
    other = tuple(e for e in range(7) if e not in plan.retained[2]) + plan.retained[2][:1]
    edited = replace(plan, retained={**plan.retained, 2: tuple(sorted(other))})
    found = list(explain.mosaic_layers(edited, explain.recipe_of(edited, stats)))
    assert [layer.agrees for layer in found] == [True, False]


def test_what_cannot_be_explained_is_said(
    stats: CalibrationStats, plans: dict[str, PruningPlan], tmp_path: Path
) -> None:
    plan = plans["clusters"]
    model = {**plan.provenance["model"], "fingerprint": "other"}
    calibration = {**plan.provenance["calibration"], "domain_weights": {"nowhere": 1.0}}
    lacking = replace(stats, needs=stats.needs - {Need.INPUTS})
    cases: list[tuple[CalibrationStats, PruningPlan, str]] = [
        (stats, replace(plan, provenance={**plan.provenance, "model": model}), "made for another model"),
        (stats, replace(plan, retained={0: (0, 1, 2)}, original_num_experts={0: 7}), "names other layers"),
        (stats, replace(plan, config={}), "the recipe in the plan cannot be read"),
        (stats, replace(plan, config={"method": "reap", "num_experts": 4}), "is one for method 'reap'"),
        (stats, replace(plan, provenance={**plan.provenance, "calibration": calibration}), "domain_weights must"),
        (lacking, plan, "needs the statistics inputs"),
    ]
    for statistics, case, said in cases:
        with pytest.raises(RequestError, match=re.escape(said)):
            explain.recipe_of(case, statistics)
    root = page(write_report(tmp_path / "r.html", stats=stats, plans=[cases[0][1]]))
    section = root.find(".//section[@id='mosaic']")
    assert "cannot be shown: the plan was made for another model" in words(section)
    assert section.find(".//figure") is None


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
    options = recipe.config.options()
    importance = None if method == "transition" else pathfinder.log_importance(stats, options.tau)
    transitions = None if method == "importance" else pathfinder.log_transitions(stats, options.transitions)
    edges, best = np.zeros((7, 7), int), np.zeros((7, 7), int)
    nodes = np.zeros((2, 7), int)
    for s in range(len(stats.samples)):
        weight = {
            (a, b): (0 if importance is None else importance[0][s, a] + importance[1][s, b])
            + (0 if transitions is None else transitions(s)[0][a, b])
            for a, b in itertools.product(range(7), repeat=2)
        }
        first = sorted(weight, key=lambda path: -weight[path])[: graph.paths_per_sample]
        for a, b in first:
            edges[a, b] += 1
        best[first[0]] += 1
        for column in (0, 1):
            nodes[column, list({path[column] for path in first})] += 1
    assert (graph.edges[0] == edges).all() and (graph.best[0] == best).all()
    assert (np.array(graph.nodes) == nodes).all()


def test_the_graph_shows_retained_experts_and_edges(stats: CalibrationStats, plans: dict[str, PruningPlan]) -> None:
    plan = plans["paths"]
    graph = explain.path_graph(plan, explain.recipe_of(plan, stats))
    figure = drawn(graphs.paths, plan, graph)
    (kept,), (pruned,) = by_gid(figure, "retained"), by_gid(figure, "pruned")
    expected = {(row, e) for row, layer in enumerate((0, 2)) for e in plan.retained[layer]}
    assert {tuple(point) for point in kept.get_xydata().astype(int)} == expected
    assert {tuple(point) for point in pruned.get_xydata().astype(int)} == set(
        itertools.product((0, 1), range(7))
    ) - expected
    (lines,) = by_gid(figure, "edges")
    assert isinstance(lines, LineCollection)
    shown, _ = graphs.drawn_edges(graph)
    drawn_ = {
        (int(a[1]), int(b[1])): width
        for (a, b), width in zip(lines.get_segments(), lines.get_linewidths(), strict=True)
    }
    assert drawn_.keys() == {tuple(map(int, pair)) for pair in np.argwhere(shown[0])}
    order = sorted(drawn_, key=lambda pair: shown[0][pair])
    widths = [drawn_[pair] for pair in order]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_of_too_many_edges_those_of_the_best_paths_are_drawn() -> None:
    many, few = [np.ones((20, 20), int)] * 3, [np.eye(20, dtype=int)] * 3
    graph = explain.PathGraph((0, 1, 2, 3), 5, 30, False, [np.ones(20, int)] * 4, many, few)
    assert graphs.drawn_edges(graph) == (few, 1)
    assert graphs.drawn_edges(replace(graph, edges=few)) == (few, 30)


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
        made[layer] = LayerStats(experts, SoftmaxTopK(8, True, False), tensors, weights, token_sample)
    needs = {Need.ROUTING, Need.ROUTED_NORMS, Need.DENSE_NORMS, Need.SINGLE_ERROR, Need.INPUTS}
    model = {"model_type": "mixtral", "top_k": 8, "fingerprint": "random"}
    return CalibrationStats(model, entries, made, frozenset(needs), token_sample, token_position, 96, 0)


def crowded(make: Callable[..., Figure], *args: Any) -> Iterator[str]:
    """Texts of a figure that stand over each other or outside of it."""
    boxes = []

    def draw_text(text: Text, renderer: Any) -> None:
        if text.get_text().strip():
            boxes.append((text.get_text(), text.get_window_extent(renderer)))

    with patch.object(Text, "draw", draw_text):
        figure = drawn(make, *args)
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
            yield f"{text!r} is cut off"
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if across > 1 and down > 2:  # the boxes of lines of text touch
            yield f"{one!r} and {two!r} overlap"


@pytest.mark.parametrize(("layers", "experts"), [(6, 8), (12, 60), (60, 128)])
def test_nothing_overlaps_or_is_cut_off_at_any_size(
    layers: int, experts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stats = synthetic(layers, experts)
    if experts == 8:
        stats = replace(
            stats,
            model={**stats.model, "top_k": 2},
            layers={n: replace(layer, routing=SoftmaxTopK(2, True, False)) for n, layer in stats.layers.items()},
        )
    long = "a name that is far too long to be shown whole, and must be cut"
    half, skip = {"num_experts": experts // 2}, tuple(range(2, layers))
    clusters = {"num_generalists": 0, "num_domains": 6}
    plans = {
        long: planned(stats, "mosaic", **half, skip_layers=skip, method_options=clusters),
        "best paths": planned(stats, "pathfinder", **half, method_options={"num_paths": 3}),
        "scores": planned(stats, "reap", **half, allocation="global"),
    }
    found: list[str] = []

    def looked_at(name: str, alt: str, make: Callable[..., Figure], *args: Any, **kwargs: Any) -> Any:
        found.extend(f"{name}: {problem}" for problem in crowded(make, *args))
        return draw(name, alt, make, *args, **kwargs) if experts == 128 else Picture(name, alt, "<svg/>", {})

    monkeypatch.setattr("optimum_moe_prune.publishing.report.canvas.draw", looked_at)
    counts = {str(round(experts * share)): share for share in (0.875, 0.75, 0.5, 0.375, 0.25)}
    sensitivity = a_sensitivity(tuple(range(layers)), ("mosaic", "pathfinder", long))
    for method in sensitivity["methods"].values():
        for layer in method["layers"].values():
            layer["counts"] = {c: {"retained": [], "kl": {"all": 0.3 * (1 - s) ** 3}} for c, s in counts.items()}
            layer["original_num_experts"] = experts
    path = write_report(
        tmp_path / "r.html",
        stats=stats,
        plans=plans,
        sensitivity=sensitivity,
        evaluation=an_evaluation(("short", long)),
    )
    assert not found
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
    with pytest.raises(RequestError, match=re.escape('pip install "optimum-moe-prune[plots]"')):
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
    write_report(path, plans=plans, title="Another", overwrite=True, pictures=tmp_path / "p", formats="svg")
    assert path.read_bytes() != before
    (tmp_path / "thesis.html").write_text("<p>years of work</p>")
    with pytest.raises(RequestError, match="no report of this package"):
        write_report(tmp_path / "thesis.html", plans=plans, overwrite=True)
    with pytest.raises(RequestError, match="is a folder"):
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

    for place in ("optimum_moe_prune.storage.files.sync", "optimum_moe_prune.publishing.report.sync"):
        with monkeypatch.context() as patched:
            patched.setattr(place, full)
            with pytest.raises(RunError, match="no space left"):
                write_report(path, plans=plans, overwrite=True, title="New", pictures=tmp_path / place)
        assert path.read_bytes() == before
        assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".partial")]


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"methods": 3},
        {"methods": {"m": {"layers": {"x": {}}}}},
        {"methods": {"m": {"layers": {"0": {"original_num_experts": 4, "counts": {"2": {}}}}}}},
        {"methods": {"m": {"model": [{"allocation": "uniform", "kl": {}}]}}},
    ],
)
def test_damaged_sensitivities_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the sensitivity"):
        write_report(tmp_path / "r.html", sensitivity={**a_sensitivity(), **change})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": None},
        {"models": {}},
        {"reference": "nobody"},
        {"models": {"m": {"domains": {"d": {"tokens": 3}}}}, "reference": None},
        {"models": {"m": {"domains": {"d": {"perplexity": 3, "lost_interval": 5}}}}, "reference": None},
    ],
)
def test_damaged_evaluations_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="the evaluation"):
        read_evaluation({**an_evaluation(), **change})


def test_plans_are_named_apart(plans: dict[str, PruningPlan]) -> None:
    plan = plans["paths"]
    assert list(named([plan, plan])) == ["pathfinder, 43% pruned", "pathfinder, 43% pruned (2)"]
    assert list(named(plan)) == ["pathfinder, 43% pruned"]
    with pytest.raises(RequestError, match="one is a str"):
        named(["plan.json"])


def test_words() -> None:
    assert plain("a\n b\x00\u202e") == "a b\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    assert spans([0, 1, 2, 4, 5, 9]) == "0\N{NON-BREAKING HYPHEN}2, 4, 5, 9"
    numbers = {0: "0", 0.00123: "0.00123", 1.5: "1.50", 1234.5: "1,234", 2e9: "2.00e+09", math.inf: "\N{EN DASH}"}
    assert [number(value) for value in numbers] == list(numbers.values())
    assert fitting("words", 5) == "words" and len(fitting("n" * 99, 1)) < 20
    assert package.__all__ == ["write_report"]
