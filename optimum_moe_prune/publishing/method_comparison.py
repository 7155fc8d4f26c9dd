# SPDX-License-Identifier: Apache-2.0
"""A comparison of methods as a folder: results, tables, a picture of loss against sparsity, and the plans."""

from __future__ import annotations

import io
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..evaluation.comparison import Comparison
from ..evaluation.method_comparison import Judged, MethodComparison, percent
from ..storage.files import write_bytes, write_json, write_text
from ..storage.targets import check_parent
from ..storage.values import Json, read_json
from .report.drawing import COLOURS, MARKERS, require_matplotlib, sheet, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

RESULTS_NAME, TABLE_NAME, PICTURE_NAME, PLANS_NAME = "results.json", "table.md", "picture.png", "plans"

_LINES: Json = {
    "uniform": "-",
    "global": (0, (5, 2)),
    "sensitivity": (0, (1.2, 1.2)),
    "estimated": (0, (4, 1, 1, 1, 1, 1)),
}
_TICKS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)  # nats
_STRAIGHT = 0.05  # nats, up to which the scale is linear
_MOST = 50.0  # nats; what is beyond is drawn there


def check_method_comparison(folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """The folder as a path, if a comparison may be written there.

    Raises:
        RequestError: If it holds anything, unless ``overwrite`` is given and that is an earlier comparison.
    """
    path = Path(os.path.realpath(folder))
    if path.exists() and not path.is_dir():
        raise RequestError(f"{folder} is a file; name a folder that is absent or empty.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise RequestError(
                f"{folder} exists and is not empty; name another folder, or allow replacing it (overwrite=True)."
            )
        _earlier_files(path)
    check_parent(path)
    return path


def write_method_comparison(folder: str | os.PathLike, found: MethodComparison, overwrite: bool = False) -> Path:
    """Write ``results.json``, ``table.md``, ``picture.png`` and, in ``plans``, a file for each plan.

    Without matplotlib there is no picture, and a log line says so.

    Args:
        folder: The target, absent or empty.
        found: What was compared.
        overwrite: Replace an earlier comparison there: the files it wrote, and no others.

    Raises:
        RequestError: If something else is there.
        RunError: If something cannot be written.
    """
    path = check_method_comparison(folder, overwrite)
    for file in _earlier_files(path) if path.is_dir() and any(path.iterdir()) else []:
        file.unlink(missing_ok=True)
    for name, column in found.columns.items():
        found.plans[name].save(path / PLANS_NAME / column.file)
    write_text(path / TABLE_NAME, found.markdown() + "\n")
    try:
        require_matplotlib()
        write_bytes(path / PICTURE_NAME, picture(found))
    except RequestError as error:
        logger.warning("no picture is drawn: %s", error)
    write_json(path / RESULTS_NAME, found.to_dict())  # last: what it names is there
    return path


def _earlier_files(folder: Path) -> list[Path]:
    """The files of an earlier comparison, as its results name them.

    Raises:
        RequestError: If the folder holds none.
    """
    try:
        values = read_json(folder / RESULTS_NAME)
        Comparison.from_dict(values)
        names = [str(plan["file"]) for plan in values["plans"].values()]
    except (RequestError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{folder} holds something else than a comparison of methods and is not replaced: {error}. Name another "
            "folder."
        ) from error
    parts = [Path(name) for name in names]
    plans = [folder / PLANS_NAME / part.name for part in parts if part.parent == Path(PLANS_NAME)]
    return [*plans, *(folder / name for name in (RESULTS_NAME, TABLE_NAME, PICTURE_NAME))]


# ------------------------------------------------------------------------------------------- the picture


def picture(found: MethodComparison) -> bytes:
    """Loss against sparsity, a line for each method; of one sparsity a point for each. A PNG."""
    with style():
        figure = _lines(found) if len(found.sparsities) > 1 else _points(found)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _look(found: MethodComparison, column: Judged) -> Json:
    """A colour and a marker for each method, a line for each allocation."""
    number = list(dict.fromkeys(c.method for c in found.columns.values())).index(column.method)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": _LINES.get(column.allocation, "-"),
        "markersize": 5.0,
        "linewidth": 1.2,
    }


def _lines(found: MethodComparison) -> Figure:
    figure = sheet(max(4.2, 0.9 + 0.2 * len(found.labels)))
    axes = figure.subplots()
    for label in found.labels:
        columns = [c for c in found.columns.values() if c.label == label]
        points = sorted(
            (100 * found.plans[c.name].sparsity, min(_lost(found, label, c.sparsity), _MOST)) for c in columns
        )
        x, y = zip((0.0, 0.0), *points, strict=True)
        axes.plot(x, y, label=label, clip_on=False, zorder=3, **_look(found, columns[0]))
    axes.set_xlim(0, max(100 * plan.sparsity for plan in found.plans.values()))
    axes.set_xlabel("experts removed, %")
    _scale(axes.yaxis, found, "    ")
    axes.set_ylabel(_measure(found).replace(", and ", "\nand "))
    axes.grid()
    axes.set_title(_title(found))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", handlelength=3.2)
    return figure


def _points(found: MethodComparison) -> Figure:
    figure = sheet(1.3 + 0.22 * len(found.labels))
    axes = figure.subplots()
    sparsity = found.sparsities[0]
    for number, column in enumerate(found.columns.values()):
        look = {**_look(found, column), "linestyle": "none"}
        axes.plot(min(_lost(found, column.label, sparsity), _MOST), number, clip_on=False, zorder=3, **look)
    axes.set_yticks(range(len(found.labels)), found.labels)
    axes.set_ylim(len(found.labels) - 0.5, -0.5)
    _scale(axes.xaxis, found, "\n")
    axes.set_xlabel(_measure(found))
    axes.grid()
    axes.set_title(f"{_title(found)}, {percent(sparsity)} of the experts removed")
    return figure


def _lost(found: MethodComparison, label: str, sparsity: float) -> float:
    lost = found.lost(label, sparsity)
    assert lost is not None
    return lost


def _scale(axis: Any, found: MethodComparison, between: str) -> None:
    """Nats, with the factor of the perplexity; linear up to little, logarithmic beyond it."""
    from matplotlib.ticker import NullLocator

    lost = [min(_lost(found, c.label, c.sparsity), _MOST) for c in found.columns.values()]
    high = max(*lost, 2 * _STRAIGHT)
    ticks = [tick for tick in _TICKS if tick <= 1.05 * high]
    axes, name = axis.axes, axis.axis_name
    getattr(axes, f"set_{name}scale")("symlog", linthresh=_STRAIGHT, linscale=0.6)
    getattr(axes, f"set_{name}lim")(min(0.0, 1.1 * min(lost)), 1.15 * high)
    axis.set_ticks(ticks, [f"x {math.exp(tick):.3g}{between}{tick:g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def _measure(found: MethodComparison) -> str:
    several = any(len(result.evaluation.domains) > 1 for result in found.comparison.compared.values())
    return "perplexity as a multiple of the original's, and nats per token lost" + (
        " (mean of the domains)" if several else ""
    )


def _title(found: MethodComparison) -> str:
    model = found.comparison.settings.get("model")
    return f"What pruning costs{f' {model}' if model else ''} on {found.comparison.text_kind}"
