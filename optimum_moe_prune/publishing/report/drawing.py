# SPDX-License-Identifier: Apache-2.0
"""What all figures share: matplotlib's settings, colours, axes, and how a figure becomes bytes.

Figures are made without pyplot and laid out by matplotlib itself. matplotlib's settings are those of :func:`style`
while a report is drawn, so that a user's settings play no part and the same inputs give the same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import RequestError
from ...storage.values import Json
from .tables import Table, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0
"""Inches: 768 CSS pixels, the column of the page."""

NARROW = 4.0
"""Inches: 384 CSS pixels, the screen of a phone. On these a picture is drawn anew, with text as large as ever."""

FORMATS = ("png", "svg", "pdf")

# Okabe and Ito's colours without yellow, which is too pale for lines on white; markers tell the same apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "<", ">")

INK, MUTED = "#1a1a1a", "#5c5c5c"
RETAINED, PRUNED = "#12406b", "#d9d9d9"

# Darker is more, in every map. One hue, its lightness falling in even steps: the same to every kind of colour vision
# and in grey print, and what is small steps back.
_RAMP = ("#edf2f7", "#c5d6e7", "#97b8d5", "#6896c0", "#3f74a5", "#1f5284", "#12305a", "#081830")

_LOWER, _UPPER = ("#edf2f7", "#c5d6e7", "#97b8d5"), ("#d99a5b", "#b8661f", "#7c3d0a", "#3d1a00")

SMALL, TINY = 8.0, 7.0  # points

MOST_VECTORS = 1200
"""Marks or lines beyond this number are drawn as an image inside their figure, which is smaller and shows as fast."""

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelsize": SMALL,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": SMALL,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "hatch.color": MUTED,
    "image.composite_image": False,
    "image.interpolation": "none",
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text: sharp and small, and a browser has the letters that the fonts here lack
    "svg.hashsalt": "optimum-moe-prune",
    "text.parse_math": False,  # a "$" in a name is a "$"
    "xtick.major.size": 2.5,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "ytick.major.size": 2.5,
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
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


# ------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Drawing:
    """A figure as SVG, and its size in CSS pixels."""

    svg: bytes
    width: int
    height: int

    @property
    def source(self) -> str:
        """The figure as a ``data:`` URI."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        name: Of its files.
        alt: What it shows, in words.
        wide: As it is drawn for the column of the page, and for paper.
        narrow: As it is drawn for small screens; None where it fits as it is.
        tables: The same as tables, made from the same values; none where they would be too large to read.
        cells: How many cells these tables have, or would have.
    """

    name: str
    alt: str
    wide: Drawing
    narrow: Drawing | None = None
    tables: tuple[Table, ...] = ()
    cells: int = 0


@dataclass
class Gallery:
    """Draws pictures, inside :func:`style`, and keeps in ``files`` those that are to be written, in ``formats``."""

    formats: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)

    def draw(
        self,
        name: str,
        alt: str,
        make: Callable[..., Figure],
        *args: Any,
        tables: Sequence[Table] = (),
        both: bool = True,
    ) -> Picture:
        """Draw the figure that ``make(*args, width=...)`` returns, for wide and for narrow screens.

        Args:
            name: Of its files.
            alt: What it shows, in words.
            make: One of the functions that draw.
            args: What it is to draw.
            tables: The same as tables.
            both: Whether small screens have a drawing of their own; else they show the wide one, made smaller.
        """
        figure = _laid_out(make(*args, width=WIDTH))
        wide = _drawing(figure)
        for form in self.formats:
            content = wide.svg if form == "svg" else _saved(figure, form)
            self.files[f"{name}.{form}"] = content
        narrow = _drawing(_laid_out(make(*args, width=NARROW))) if both and wide.width > 96 * NARROW else None
        return Picture(name, alt, wide, narrow, readable(tables), sum(table.cells for table in tables))


def _laid_out(figure: Figure) -> Figure:
    """The figure with all its parts in their places, the same for all formats."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def _drawing(figure: Figure) -> Drawing:
    """A figure as SVG, drawn once: ``savefig`` does it twice, to find what is in its place already."""
    from matplotlib import rcParams
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer, dpi = io.BytesIO(), figure.dpi
    figure.dpi = rcParams["savefig.dpi"]  # of images inside
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    figure.dpi = dpi
    width, height = figure.get_size_inches()
    return Drawing(buffer.getvalue(), round(96 * width), round(96 * height))


def _saved(figure: Figure, form: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, metadata=dict.fromkeys(_DATED.get(form, ())))
    return buffer.getvalue()


_DATED = {"pdf": ("CreationDate",)}  # what the same figure would differ in


# ------------------------------------------------------------------------------------------- parts of figures


def sheet(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend(figure: Figure, handles: Sequence[Any], **options: Any) -> None:
    """A legend above everything, in as many columns as its labels allow; line by line in the order of the handles."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, int(12.5 * figure.get_figwidth()) // (longest + 8)))
    # matplotlib fills column after column, the first ones with one more where they do not come out even.
    by_column = [handle for column in range(columns) for handle in handles[column::columns]]
    figure.legend(handles=by_column, loc="outside upper left", ncols=columns, columnspacing=1.6, **options)


@dataclass(frozen=True)
class Span:
    """The part of an axis that is shown. What is beyond, as an infinite value, stands on its edge.

    Attributes:
        low: Its lower end.
        high: Its upper end.
        log: Whether it is logarithmic.
    """

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Iterable[float | None], log: bool | None = None) -> Span:
        """The span that holds all finite values, and on a logarithmic axis the positive ones.

        Args:
            values: What is to be shown, ends of intervals among it.
            log: Whether the axis is logarithmic; None: where positive values differ more than fivefold.
        """
        finite = [value for value in values if value is not None and math.isfinite(value)]
        positive = [value for value in finite if value > 0]
        if log is None:
            log = len(positive) == len(finite) > 0 and max(positive) > 5 * min(positive)
        if log and positive:
            margin = max(1.15, (max(positive) / min(positive)) ** 0.04)
            return cls(min(positive) / margin, max(positive) * margin, True)
        low, high = min(finite, default=0.0), max(finite, default=1.0)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - margin, high + margin, False)

    def inside(self, value: float) -> float:
        """The value, or the edge that it is beyond."""
        return min(max(value, self.low), self.high)

    def is_beyond(self, value: float) -> bool:
        """Whether it cannot be shown where it is."""
        return not self.low <= value <= self.high

    def limit(self, axis: Any) -> None:
        """Show this part on an axis."""
        if self.log:
            logarithmic(axis, self.low, self.high)
        else:
            axis.axes.set(**{f"{axis.axis_name}lim": (self.low, self.high)})


def every(numbers: Sequence[int], most: int) -> list[int]:
    """Positions of the numbers that are labelled, at most so many: all, or multiples of 2, 5, 10, 20 ..."""
    steps = (step * 10**power for power in range(7) for step in (1, 2, 5))
    step = next(step for step in steps if len(numbers) <= step * max(1, most))
    return [position for position, number in enumerate(numbers) if number % step == 0]


def ramp() -> Any:
    """The colours of maps, from pale to dark; what is no number stays blank."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("more", _RAMP).with_extremes(bad="white")


def two_hues() -> Any:
    """Colours of maps with a threshold in the middle: blue up to there, brown beyond, and darker is more in both."""
    from matplotlib.colors import LinearSegmentedColormap

    places = np.linspace(0, 0.5, len(_LOWER)).tolist() + np.linspace(0.5, 1, len(_UPPER)).tolist()
    colours = list(zip(places, (*_LOWER, *_UPPER), strict=True))
    return LinearSegmentedColormap.from_list("threshold", colours, N=512).with_extremes(bad="white")


def paint(axes: Axes, values: np.ndarray, norm: Any, size: tuple[float, float], cmap: Any = None) -> Any:
    """A map of values ``(rows, columns)``, NaN blank, the first row on top; ``size`` of the axes in inches, about.

    White lines part cells that are large enough for them.
    """
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=cmap or ramp(), norm=norm)
    rows, columns = values.shape
    if min(size[0] / columns, size[1] / rows) >= 0.055:
        for count, ends, across in ((columns, rows, False), (rows, columns, True)):
            line = np.repeat(np.arange(1, count) - 0.5, 3), np.tile([-0.5, ends - 0.5, np.nan], count - 1)
            axes.plot(*(line[::-1] if across else line), color="white", linewidth=0.8, scalex=False, scaley=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2)
    return image


def write_in_cells(axes: Axes, image: Any, words: Callable[[float], str], size: float) -> None:
    """Write each value of a map into its cell, black on light and white on dark, whichever is easier to read."""
    values = image.get_array()
    light = luminance(np.asarray(image.cmap(image.norm(values)))) > 0.1791  # where both have a contrast of 4.6
    for row, column in np.argwhere(~np.ma.getmaskarray(values)):
        colour = "black" if light[row, column] else "white"
        place: Json = {"ha": "center", "va": "center_baseline"}
        axes.text(
            column, row, words(float(values[row, column])), fontsize=size, color=colour, in_layout=False, **place
        )


def luminance(colours: np.ndarray) -> np.ndarray:
    """Relative luminance of colours ``(..., 3)`` or with an alpha, from 0 to 1, as contrasts are reckoned with."""
    rgb = np.asarray(colours)[..., :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def logarithmic(axis: Any, low: float, high: float) -> None:
    """Make an axis logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
