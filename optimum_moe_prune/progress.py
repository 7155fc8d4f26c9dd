# SPDX-License-Identifier: Apache-2.0
"""Progress bars that appear after two seconds, on a terminal only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_DELAY_SECONDS = 2.0


def progress(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate over ``items`` behind a progress bar on standard error.

    The bar shows only when the loop takes longer than two seconds and standard error is a terminal.

    Args:
        items: What to iterate over.
        description: What is being done, shown before the bar.
        total: The number of items, where ``items`` cannot tell.
        unit: What one item is.
    """
    from tqdm import tqdm

    yield from tqdm(items, desc=description, total=total, unit=unit, delay=_DELAY_SECONDS, disable=None)


def progress_bar(total: int, description: str, unit: str) -> Any:
    """A bar to ``update`` inside a ``with``, shown as :func:`progress` shows its own.

    Args:
        total: How much there is to do.
        description: What is being done.
        unit: What is counted, shown with k, M, G.
    """
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, unit_scale=True, delay=_DELAY_SECONDS, disable=None)
