# SPDX-License-Identifier: Apache-2.0
"""K-Means and the silhouette, as the choice of domains (Mosaic) and of representative samples use them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sklearn.cluster import KMeans
    from torch import Tensor

_SILHOUETTE_ROWS = 2000
_FEWEST_TO_START, _TO_START = 512, 8  # rows among which K-Means++ looks for its start, and so many more a cluster
_MOST_TO_FIT, _TO_FIT = 8192, 128  # the most rows on which centres are fitted, likewise
_AT_ONCE = 512  # rows
_FEW, _DIRECTIONS = 16, 128  # centres for which all directions are looked at, and how many are beyond


def kmeans(points: Any, count: int, seed: int, *, weights: np.ndarray | None = None, n_init: int = 1) -> KMeans:
    """K-Means of ``points`` (rows, dense or sparse); with fewer distinct rows than clusters some stay empty."""
    from sklearn.cluster import KMeans

    with _without_convergence_warnings():
        return KMeans(count, n_init=n_init, random_state=seed).fit(points, sample_weight=weights)


def partition(points: Tensor, count: int, seed: int, weights: np.ndarray) -> np.ndarray:
    """The cluster of each of many rows ``(N,)``, by K-Means with a start that costs little.

    K-Means++ looks for its start among ``512 + 8 count`` rows of a seeded choice; where many centres are wanted, by
    distances in 128 random directions, which are those in all to a tenth. The centres are fitted on all rows, or on
    ``8192 + 128 count`` of the choice where there are more, of which then each goes to the nearest centre. Of no more
    rows than a start is looked for among it is plain K-Means.

    Fitting on fewer rows is faster and no better: of Mixtral (small, 8,192 tokens a layer, 25% removed, 30 runs) it
    costs 0.91 nats a token with 1,152 rows, 0.88 with 2,688 and 0.84 with all, and 0.82 with a start among all.

    Args:
        points: Rows ``(N, H)``.
        count: Clusters; with fewer distinct rows some stay empty.
        seed: Of the choice and of K-Means.
        weights: What each row counts ``(N,)``.
    """
    from sklearn.cluster import KMeans, kmeans_plusplus

    start = _FEWEST_TO_START + _TO_START * count
    if len(points) <= start:
        return kmeans(_values(points), count, seed, weights=weights).labels_
    order = np.random.default_rng(seed).permutation(len(points))
    fitted = order[: _MOST_TO_FIT + _TO_FIT * count]
    of_all = len(fitted) == len(points)
    some, of_some = (points, weights) if of_all else (points[fitted], weights[fitted])
    values = _values(some.clone() if some.dtype.itemsize == 4 else some)  # a copy, which K-Means centres
    among = order[:start] if of_all else np.arange(start)
    with _without_convergence_warnings():
        outlines = _outlines(values[among], seed) if count > _FEW else values[among]
        # In float64, which it calculates distances in: of float32 it would make a copy for each centre.
        _, first = kmeans_plusplus(outlines.astype(np.float64), count, sample_weight=of_some[among], random_state=seed)
        # To the end: a tolerance saves hardly a step, and to find out how large it is takes as long as several.
        means = KMeans(count, init=values[among][first], n_init=1, tol=0, copy_x=False)
        label = means.fit(values, sample_weight=of_some).labels_
    if of_all:
        return label
    return np.concatenate([_nearest(_values(part), means.cluster_centers_) for part in points.split(_AT_ONCE)])


def _outlines(points: np.ndarray, seed: int) -> np.ndarray:
    """Rows in a few random directions, if they have more."""
    if points.shape[1] <= _DIRECTIONS:
        return points
    return points @ np.random.default_rng(seed).standard_normal((points.shape[1], _DIRECTIONS), dtype=points.dtype)


def _values(points: Any) -> Any:
    """Rows as scikit-learn takes them, of a tensor in float32."""
    return points.float().numpy() if hasattr(points, "numpy") else points


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The nearest centre of each row ``(N,)``."""
    return (np.square(centres).sum(axis=1) - 2 * points @ centres.T).argmin(axis=1)


@contextmanager
def _without_convergence_warnings() -> Iterator[None]:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def silhouette(
    points: Any, label: np.ndarray, seed: int, *, weights: np.ndarray | None = None, most: int = _SILHOUETTE_ROWS
) -> float:
    """Mean silhouette of a seeded choice of rows; minus infinity where these form no clusters.

    Args:
        points: Rows, dense, sparse or a tensor's.
        label: The cluster of each row.
        seed: Of the choice.
        weights: What each row counts in the mean; 1 by default.
        most: Rows that are chosen at most.
    """
    return Silhouettes(points, seed, weights=weights, most=most).mean(label)


class Silhouettes:
    """Mean silhouettes of several clusterings of the same rows, whose distances are calculated once.

    Args:
        points, seed, weights, most: As for :func:`silhouette`.
    """

    def __init__(
        self, points: Any, seed: int, *, weights: np.ndarray | None = None, most: int = _SILHOUETTE_ROWS
    ) -> None:
        self._rows = np.random.default_rng(seed).permutation(points.shape[0])[:most]
        self._points = _values(points[self._rows])
        self._weights = None if weights is None else weights[self._rows]

    @functools.cached_property
    def _distances(self) -> np.ndarray:
        from sklearn.metrics import pairwise_distances

        return pairwise_distances(self._points)

    def mean(self, label: np.ndarray) -> float:
        """That of a clustering, by the cluster of each row ``(N,)``."""
        from sklearn.metrics import silhouette_samples

        label = label[self._rows]
        if not 1 < len(set(label.tolist())) < len(label):
            return float("-inf")
        each = silhouette_samples(self._distances, label, metric="precomputed")
        return float(np.average(each, weights=self._weights))
