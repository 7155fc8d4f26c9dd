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
_FEWEST_TO_START, _TO_START = 256, 8  # rows among which K-Means++ looks for its start, and so many more a cluster
_FEWEST_TO_FIT, _TO_FIT = 512, 128  # rows on which centres are fitted, likewise
_AT_ONCE = 512  # rows
_FEW, _DIRECTIONS = 16, 128  # centres for which all directions are looked at, and how many are beyond


def kmeans(points: Any, count: int, seed: int, *, weights: np.ndarray | None = None, n_init: int = 1) -> KMeans:
    """K-Means of ``points`` (rows, dense or sparse); with fewer distinct rows than clusters some stay empty."""
    from sklearn.cluster import KMeans

    with _without_convergence_warnings():
        return KMeans(count, n_init=n_init, random_state=seed).fit(points, sample_weight=weights)


def partition(points: Tensor, count: int, seed: int, weights: np.ndarray) -> np.ndarray:
    """The cluster of each of many rows ``(N,)``, by K-Means of as few of them as give the same clusters.

    K-Means++ looks for its start among ``256 + 8 count`` rows of a seeded choice; where many centres are wanted, by
    distances in 128 random directions, which are those in all to a tenth. The centres are fitted on ``512 + 128
    count`` of the rows, or on all where there are no more, and then every row goes to the nearest centre. Of no more
    rows than a start is looked for among it is plain K-Means. Rows become float32 a few at a time: of a tensor that
    lies on disk, or in half precision, there is no copy.

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
    fitted = order[: _FEWEST_TO_FIT + _TO_FIT * count]
    some, of_some = _values(points[fitted]), weights[fitted]
    with _without_convergence_warnings():
        among = _outlines(some[:start], seed) if count > _FEW else some[:start]
        # In float64, which it calculates distances in: of float32 it would make a copy for each centre.
        _, first = kmeans_plusplus(among.astype(np.float64), count, sample_weight=of_some[:start], random_state=seed)
        means = KMeans(count, init=some[first], n_init=1, copy_x=False).fit(some, sample_weight=of_some)
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
