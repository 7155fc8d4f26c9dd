# SPDX-License-Identifier: Apache-2.0
"""What all figures share: matplotlib's settings, colours, axes, and how a figure becomes bytes.

Figures are made without pyplot and laid out by matplotlib itself. matplotlib's settings are those of :func:`style`
while a report is drawn, so that a user's settings play no part and the same inputs give the same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import RequestError
from ...storage.values import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0
"""Inches: 768 CSS pixels, the column of the page."""

FORMATS = ("png", "svg", "pdf")

# Okabe and Ito's colours without yellow, which is too pale for lines on white; markers tell the same apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "<", ">")

INK, MUTED = "#1a1a1a", "#5c5c5c"
RETAINED, PRUNED = "#12406b", "#d9d9d9"

# Darker is more, in every map. One hue, its lightness falling in even steps: the same to every kind of colour vision
# and in grey print, and what is small steps back.
_RAMP = ("#edf2f7", "#c5d6e7", "#97b8d5", "#6896c0", "#3f74a5", "#1f5284", "#12305a", "#081830")

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
class Picture:
    """A drawn figure: the name of its files, what it shows in words, its SVG, and its width in CSS pixels."""

    name: str
    alt: str
    svg: bytes
    width: int

    @property
    def source(self) -> str:
        """The figure as a ``data:`` URI."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


@dataclass
class Gallery:
    """Draws pictures, inside :func:`style`, and keeps in ``files`` those that are to be written, in ``formats``."""

    formats: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)

    def draw(self, name: str, alt: str, make: Callable[..., Figure], *args: Any) -> Picture:
        """Draw the figure that ``make(*args)`` returns."""
        figure = make(*args)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out, once for all formats
        drawn = {}
        for form in dict.fromkeys(["svg", *self.formats]):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, metadata=dict.fromkeys(_DATED.get(form, ())))
            drawn[form] = buffer.getvalue()
        self.files |= {f"{name}.{form}": drawn[form] for form in self.formats}
        return Picture(name, alt, drawn["svg"], round(96 * figure.get_figwidth()))


_DATED = {"svg": ("Date",), "pdf": ("CreationDate",)}  # what the same figure would differ in


# ------------------------------------------------------------------------------------------- parts of figures


def sheet(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend(figure: Figure, handles: Sequence[Any], **options: Any) -> None:
    """A legend above everything, in as many columns as its labels allow."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, 100 // (longest + 8)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.6, **options)


def every(numbers: Sequence[int], most: int) -> list[int]:
    """Positions of the numbers that are labelled, at most so many: all, or multiples of 2, 5, 10, 20 ..."""
    steps = (step * 10**power for power in range(7) for step in (1, 2, 5))
    step = next(step for step in steps if len(numbers) <= step * max(1, most))
    return [position for position, number in enumerate(numbers) if number % step == 0]


def ramp() -> Any:
    """The colours of maps, from pale to dark; what is no number stays blank."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("more", _RAMP).with_extremes(bad="white")


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
    """Write each value of a map into its cell, light on dark and dark on light."""
    values = image.get_array()
    # Relative luminance, near enough: the eye is most sensitive to green.
    light = (np.asarray(image.cmap(image.norm(values)))[..., :3] ** 2.2 @ np.array([0.2126, 0.7152, 0.0722])) > 0.21
    for row, column in np.argwhere(~np.ma.getmaskarray(values)):
        colour = INK if light[row, column] else "white"
        place: Json = {"ha": "center", "va": "center_baseline"}
        axes.text(
            column, row, words(float(values[row, column])), fontsize=size, color=colour, in_layout=False, **place
        )


def logarithmic(axis: Any, low: float, high: float) -> None:
    """Make an axis logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
