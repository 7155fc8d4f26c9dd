# SPDX-License-Identifier: Apache-2.0
"""How figures look, and how they become pictures.

matplotlib is imported inside functions: it comes with the extra ``[plots]``. Figures are made and drawn with its
object interface inside :func:`style`, so that neither pyplot nor a user's settings play a part and the same inputs
give the same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import RequestError
from .words import SMALL, plain, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0
"""Inches: 768 CSS pixels, the column of the page; on paper it shrinks by a tenth."""

TALLEST = 9.0
"""Inches: what fits on a page."""

FORMATS = ("png", "svg", "pdf")

# Okabe and Ito's colours without yellow, which is too pale for lines on white; markers tell the same apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "<", ">")

INK, MUTED = "#1a1a1a", "#5c5c5c"
RETAINED, PRUNED = "#12406b", "#d9d9d9"

# Darker is more, in every map. One hue, its lightness falling in even steps: the same to every kind of colour vision
# and in grey print, and what is small steps back.
_RAMP = ("#edf2f7", "#c5d6e7", "#97b8d5", "#6896c0", "#3f74a5", "#1f5284", "#12305a", "#081830")

TEXT, TINY = 9.0, 7.0  # points; SMALL is between

_STYLE = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": TEXT,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": TEXT,
    "axes.titleweight": "bold",
    "figure.dpi": 100,
    "font.family": ["DejaVu Sans"],
    "font.size": TEXT,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "image.composite_image": False,
    "image.interpolation": "none",
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text: sharp, small, searched and copied like the rest of the page
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a name is a "$"
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": SMALL,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
    "ytick.minor.size": 0,
}


def require_matplotlib() -> None:
    """Raise unless matplotlib can be imported.

    Raises:
        RequestError: Saying how to install it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f'a report needs matplotlib ({error}); install it with pip install "optimum-moe-prune[plots]".'
        ) from error


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults with those of the report, inside a ``with``; the caller's settings come back."""
    from matplotlib import style as styles

    with warnings.catch_warnings(), styles.context(["default", _STYLE]):
        # In the page the reader's browser has the letters that the fonts here lack.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


# ------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Picture:
    """A figure, drawn.

    Attributes:
        name: For its files.
        alt: What it shows, for those who do not see it.
        html: An element for the page: inline SVG, or PNG where that is much smaller.
        files: Its bytes by file name.
    """

    name: str
    alt: str
    html: str
    files: dict[str, bytes]


@dataclass
class Gallery:
    """Draws pictures, and keeps the files of those that are to be written.

    Attributes:
        formats: Of the files.
        files: Their bytes by name.
    """

    formats: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)

    def draw(self, name: str, alt: str, make: Callable[..., Figure], *args: Any) -> Picture:
        """A picture; see :func:`draw`."""
        picture = draw(name, plain(alt), make, *args, formats=self.formats)
        self.files |= picture.files
        return picture


_SVG_BYTES = 300_000  # from here on a PNG may stand in


def draw(name: str, alt: str, make: Callable[..., Figure], *args: Any, formats: Sequence[str] = ()) -> Picture:
    """Make a figure and draw it.

    Args:
        name: Of the picture.
        alt: What it shows.
        make: Makes the figure.
        args: For ``make``.
        formats: Those of its files, of ``FORMATS``.
    """
    with style():
        figure = make(*args)
        drawn = {"svg": _bytes(figure, "svg")}
        for form in formats:
            if form not in drawn:
                drawn[form] = _bytes(figure, form)
        svg = _tidied(drawn["svg"].decode(), name)
        drawn["svg"] = _titled(svg, alt).encode()
        html = _inline(svg, alt)
        if len(html) > _SVG_BYTES:
            png = drawn.get("png") or _bytes(figure, "png")
            width = round(96 * figure.get_figwidth())
            image = (
                f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" width="{width}" '
                f'alt="{escape(alt)}" />'
            )
            html = min(html, image, key=len)
    return Picture(name, alt, html, {f"{name}.{form}": drawn[form] for form in formats})


def _bytes(figure: Figure, form: str) -> bytes:
    """The figure in a format, without the time and the version of what drew it."""
    from matplotlib import rc_context

    keys = {
        "svg": ("Date", "Creator", "Format", "Type"),
        "png": ("Software",),
        "pdf": ("CreationDate", "Creator", "Producer"),
    }[form]
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "optimum-moe-prune"}):
        figure.savefig(buffer, format=form, metadata=dict.fromkeys(keys))
    return buffer.getvalue()


_FAMILY = "'DejaVu Sans', Verdana, Arial, sans-serif"


def _tidied(svg: str, name: str) -> str:
    """An SVG that can stand beside others in a page: ids that are used, and unlike those of others; and no more.

    Only what is between ``<`` and ``>`` is changed, and there no text of a user can be.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style[^>]*>[^<]*</style>", "", svg)  # would count for the whole page; see _STROKES
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))

    def tidy(match: re.Match[str]) -> str:
        tag = match[0]
        tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", tag)
        tag = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", tag)
        tag = re.sub(r" ?font-family: [^;\"]*;?", "", tag)
        tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
        return re.sub(r' (d|points)="([^"]*)"', _rounded, tag)

    svg = re.sub(r"<[^<>]*>", tidy, svg)
    svg = re.sub(r">\s+<", ">\n<", svg)
    return svg.replace("<svg ", f'<svg style="{_STROKES}" ', 1)


_STROKES = "stroke-linejoin:round;stroke-linecap:butt"


def _rounded(match: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point."""
    numbers = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), match[2])
    return f' {match[1]}="{" ".join(numbers.split())}"'


def _titled(svg: str, alt: str) -> str:
    """An SVG as a file of its own."""
    root, rest = svg.split(">", 1)
    root = root.replace("<svg ", f'<svg role="img" font-family="{_FAMILY}" ', 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{root}>\n<title>{escape(alt)}</title>{rest}'


def _inline(svg: str, alt: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1).strip()


# ------------------------------------------------------------------------------------------- parts of figures


class Sheet:
    """A figure on which axes are placed in inches from its upper left corner, so that cells have the size needed."""

    def __init__(self, height: float, width: float = WIDTH) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height))
        self._size = width, height

    def axes(self, left: float, top: float, width: float, height: float, **options: Any) -> Axes:
        """New axes."""
        across, down = self._size
        place = (left / across, 1 - (top + height) / down, width / across, height / down)
        return self.figure.add_axes(place, **options)

    def text(self, left: float, top: float, text: str, **options: Any) -> None:
        """Text whose upper left corner (or what ``ha`` and ``va`` say) is there."""
        across, down = self._size
        self.figure.text(left / across, 1 - top / down, text, **{"ha": "left", "va": "top", **options})

    def legend(self, handles: Sequence[Any], left: float, top: float = 0.0, **options: Any) -> None:
        """A legend in lines as wide as the figure, and the height of these in inches: see :func:`legend_lines`."""
        across, down = self._size
        look = {"borderaxespad": 0.0, "borderpad": 0.1, "columnspacing": 1.6, "handletextpad": 0.5}
        look["ncols"] = legend_lines(handles, across - left)[0]
        place = (left / across, 1 - top / down)
        self.figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, **{**look, **options})


def legend_lines(handles: Sequence[Any], width: float = WIDTH) -> tuple[int, float]:
    """How many entries of a legend stand in a line, and the height of all lines in inches."""
    entry = 0.62 + text_width([str(handle.get_label()) for handle in handles])
    per_line = max(1, min(len(handles), int(width / entry)))
    return per_line, 0.19 * math.ceil(len(handles) / per_line) + 0.05


def count_ticks(numbers: Sequence[int], size: float, room: float) -> list[int]:
    """Which of a row of numbered cells are labelled: all, or those whose number is a multiple of 2, 5, 10, 20 ...

    Args:
        numbers: Of the cells, rising.
        size: Of a cell, in inches.
        room: What a label needs, in inches.

    Returns:
        Their positions.
    """
    steps = (step * 10**power for power in range(6) for step in (1, 2, 5))
    step = next(step for step in steps if step * size >= room * (1 if step == 1 else 1.4))
    return [position for position, number in enumerate(numbers) if number % step == 0]


def label_map(
    axes: Axes,
    cell: tuple[float, float],
    layers: Sequence[int],
    columns: int | Sequence[str],
    what: str = "expert",
    upright: bool = False,
) -> None:
    """Name the rows and columns of a map, the columns on top.

    Args:
        axes: The map.
        cell: Width and height of a cell in inches.
        layers: The layers its rows are.
        columns: Names of the columns; or how many there are, to be numbered.
        what: What the columns are.
        upright: Whether their names run upwards.
    """
    for side in axes.spines.values():
        side.set_visible(False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=2)
    rows = count_ticks(layers, cell[1], 0.13)
    axes.set_yticks(rows, [str(layers[row]) for row in rows])
    if isinstance(columns, int):
        places = count_ticks(range(columns), cell[0], text_width([str(columns - 1)]) + 0.03)
        axes.set_xticks(places, list(map(str, places)))
    else:
        axes.set_xticks(range(len(columns)), columns, rotation=90 if upright else 0)
    axes.set_ylabel("layer", fontsize=SMALL, labelpad=3)
    axes.annotate(what, (0, 1), (-5, 2), "axes fraction", "offset points", ha="right", va="bottom", fontsize=SMALL)


def ramp() -> Any:
    """The colours of maps, from pale to dark."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("more", _RAMP)


def paint(axes: Axes, values: np.ndarray, cell: tuple[float, float], **options: Any) -> Any:
    """A map of values, the first row on top, NaN blank; white lines between cells that are large enough for them."""
    cmap = options.pop("cmap", None) or ramp()
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=cmap.with_extremes(bad="white"), **options)
    rows, columns = values.shape
    if min(cell) >= 0.055:
        x, y = np.full(3 * (rows + columns + 2), np.nan), np.full(3 * (rows + columns + 2), np.nan)
        for n, place in enumerate(np.arange(rows + 1) - 0.5):
            x[3 * n : 3 * n + 2], y[3 * n : 3 * n + 2] = (-0.5, columns - 0.5), place
        for n, place in enumerate(np.arange(columns + 1) - 0.5, rows + 1):
            x[3 * n : 3 * n + 2], y[3 * n : 3 * n + 2] = place, (-0.5, rows - 0.5)
        axes.plot(x, y, color="white", linewidth=1.2 if min(cell) >= 0.15 else 0.5, scalex=False, scaley=False)
    return image


def write_in_cells(axes: Axes, image: Any, values: np.ndarray, words: Callable[[float], str], size: float) -> None:
    """Write each value into its cell, light on dark and dark on light."""
    shown = np.ma.masked_invalid(values)
    colours = image.cmap(image.norm(shown))
    # Relative luminance, near enough: the eye is most sensitive to green.
    light = (np.asarray(colours)[..., :3] ** 2.2 @ np.array([0.2126, 0.7152, 0.0722])) > 0.21
    for row, column in np.argwhere(~np.ma.getmaskarray(shown)):
        axes.text(
            column,
            row,
            words(values[row, column]),
            ha="center",
            va="center_baseline",
            fontsize=size,
            color=INK if light[row, column] else "white",
        )


def bar_of_colours(sheet: Sheet, image: Any, place: tuple[float, float, float, float], label: str, ticks: Any) -> Any:
    """A horizontal colour scale with its label above it.

    Args:
        sheet: Where it goes.
        image: What it explains.
        place: Left, top, width, height in inches.
        label: What it measures, and its unit.
        ticks: Values and their texts.
    """
    left, top, width, height = place
    axes = sheet.axes(left, top, width, height)
    bar = sheet.figure.colorbar(image, cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    values, words = zip(*ticks, strict=True)
    bar.set_ticks(list(values), labels=list(words))
    bar.minorticks_off()
    axes.tick_params(labelsize=SMALL, length=2, pad=1.5)
    low, high = image.get_clim()
    for value, word in zip(values, axes.get_xticklabels(), strict=True):
        if value in (low, high) and len(word.get_text()) > 4:  # longer ones stay inside the ends
            word.set_horizontalalignment("left" if value == low else "right")
    sheet.text(left, top - 0.05, label, va="bottom", fontsize=SMALL)
    return bar
