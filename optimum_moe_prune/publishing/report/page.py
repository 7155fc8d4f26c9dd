# SPDX-License-Identifier: Apache-2.0
"""HTML: elements whose text is escaped unless it is HTML already, tables, figures, and the page around them.

The page is well-formed XML too, has no script, and forbids itself any (and anything from elsewhere) by its policy, so
that names out of a plan that somebody sent are text and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from .canvas import Picture
from .words import plain

GENERATOR = "optimum-moe-prune report"
"""Marks a file as a report of this package."""

_VOID = {"br", "meta", "col"}


class Html(str):
    """Text that is HTML already."""


def element(name: str, *children: Any, **attributes: Any) -> Html:
    """An element; children that are not :class:`Html` are text.

    Args:
        name: Of the element.
        children: In turn.
        attributes: ``class_`` and the like without their underscore; those that are None are left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given} />")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    """Parts in turn, those that are not HTML escaped; a space at the beginning or end of one is kept."""
    return Html("".join(part if isinstance(part, Html) else escape(_spaced(str(part))) for part in parts))


def _spaced(text: str) -> str:
    inner = plain(text)
    return f"{' ' * text.startswith(' ')}{inner}{' ' * text.endswith(' ')}" if inner else " " * bool(text)


def paragraph(*parts: Any, class_: str | None = None) -> Html:
    """A paragraph."""
    return element("p", *parts, class_=class_)


def note(*parts: Any) -> Html:
    """A paragraph that says what is missing or different."""
    return paragraph(*parts, class_="note")


def items(parts: Iterable[Any]) -> Html:
    """A list."""
    return element("ul", *(element("li", part) for part in parts))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, caption: str, words: Collection[int] = (0,)) -> Html:
    """A table whose first column names its rows.

    Args:
        head: Titles of the columns; none for a table of facts, two columns of words over the whole width.
        rows: Their cells.
        caption: What it shows.
        words: Columns of words, set to the left; the others are numbers, set to the right.
    """

    def kind(column: int) -> str | None:
        return None if column in words or not head else "n"

    titles = [element("th", title, scope="col", class_=kind(n)) for n, title in enumerate(head)]
    lines = []
    for first, *others in rows:
        cells = [element("td", cell, class_=kind(n)) for n, cell in enumerate(others, 1)]
        lines.append(element("tr", element("th", first, scope="row", class_=kind(0)), *cells))
    parts = [element("caption", caption), *([element("thead", element("tr", *titles))] if head else [])]
    whole = element("table", *parts, element("tbody", *lines), class_=None if head else "facts")
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def figure(picture: Picture, *caption: Any) -> Html:
    """A picture and how to read it."""
    return element("figure", Html(picture.html), element("figcaption", *caption), id=f"figure-{picture.name}")


def details(summary: Any, *children: Any, open_: bool = False) -> Html:
    """Something that opens on demand."""
    return element("details", element("summary", summary), *children, open="open" if open_ else None)


@dataclass
class Section:
    """A part of the page: its anchor, title, and what it holds."""

    anchor: str
    title: str
    blocks: list[Html] = field(default_factory=list)

    def add(self, *blocks: Html) -> None:
        """Put more at the end."""
        self.blocks += blocks


def page(title: str, lead: Sequence[Html], sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
        title: Its title.
        lead: What comes before the contents.
        sections: Those that hold something are shown and listed.
    """
    shown = [section for section in sections if section.blocks]
    contents = element(
        "nav",
        element("h2", "Contents", id="contents"),
        element("ol", *(element("li", element("a", s.title, href=f"#{s.anchor}")) for s in shown)),
        aria_labelledby="contents",
    )
    body = [
        element(
            "section",
            element("h2", s.title, id=f"{s.anchor}-title"),
            *s.blocks,
            id=s.anchor,
            aria_labelledby=f"{s.anchor}-title",
        )
        for s in shown
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        ),
        element("meta", name_="generator", content=GENERATOR),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        Html(f"<style>{_CSS}</style>"),
    )
    header = element("header", element("h1", title), *lead)
    whole = element("html", head, element("body", element("main", header, contents, *body)), lang="en-GB")
    return f"<!DOCTYPE html>\n{whole}\n"


_CSS = """
:root { color-scheme: light; }
html { background: #fff; color: #1a1a1a; -webkit-text-size-adjust: 100%; }
body { margin: 0; font: 1rem/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; }
main { max-width: 48rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 3rem 0 .5rem; padding-top: .6rem; border-top: 2px solid #12406b; }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; overflow-wrap: anywhere; }
p, ul { margin: .5rem 0; max-width: 44rem; overflow-wrap: anywhere; }
a { color: #0a4f8f; }
nav h2 { font-size: 1rem; margin: 1.5rem 0 .25rem; padding: 0; border: 0; }
nav ol { margin: 0; padding-left: 1.5rem; columns: 2; column-gap: 2rem; }
code { font: .875em/1.4 ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.note { border-left: 3px solid #b35900; padding-left: .75rem; }
figure { margin: 1.25rem 0 1.75rem; }
figure svg, figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .5rem; max-width: 44rem; color: #404040; overflow-wrap: anywhere; }
figcaption, pre { font-size: .875rem; line-height: 1.45; }
pre { white-space: pre-wrap; margin: .5rem 0 1.5rem; }
.scroll { overflow-x: auto; margin: 1rem 0 1.5rem; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #404040; padding-bottom: .35rem; }
th, td { padding: .2rem 1.1rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e2e2e2; }
th:last-child, td:last-child { padding-right: 0; }
thead th { border-bottom: 1px solid #5c5c5c; vertical-align: bottom; max-width: 9rem; }
tbody th { font-weight: 600; }
th.n, td.n { text-align: right; }
td.n { white-space: nowrap; }
td, tbody th { overflow-wrap: break-word; max-width: 26rem; }
.facts { width: 100%; border-top: 1px solid #5c5c5c; }
.facts td { max-width: none; }
.facts td, caption { overflow-wrap: anywhere; }
details { margin: .5rem 0; }
details > figure, details > div, details > p { margin-left: 0; }
h3 + details, details + details { margin-top: 0; }
.layers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); column-gap: 1rem; }
.layers > details { margin: 0; min-width: 0; }
.layers > details[open] { grid-column: 1 / -1; }
summary { cursor: pointer; padding: .2rem 0; overflow-wrap: anywhere; }
summary:hover { color: #0a4f8f; }
:focus-visible { outline: 2px solid #0a4f8f; outline-offset: 2px; }
@media screen and (max-width: 40rem) {
  main { padding: 1rem .9rem 3rem; }
  nav ol { columns: 1; }
  figure { overflow-x: auto; }
  figure svg, figure img { max-width: none; width: 40rem; }
}
@media print {
  @page { margin: 15mm; }
  html { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  a { color: inherit; text-decoration: none; }
  figure, tr { break-inside: avoid; }
  h2, h3, caption, summary { break-after: avoid; }
  .scroll { overflow: visible; }
  .layers { display: block; }
  details:not([open]) { display: none; }
  thead { display: table-header-group; }
}
"""
