# SPDX-License-Identifier: Apache-2.0
"""K-Means and the silhouette, as the choice of domains (Mosaic) and of representative samples use them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

_SILHOUETTE_ROWS = 2000


def kmeans(points: Any, count: int, seed: int, *, weights: np.ndarray | None = None, n_init: int = 1) -> KMeans:
    """K-Means of ``points`` (rows, dense or sparse); with fewer distinct rows than clusters some stay empty."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(count, n_init=n_init, random_state=seed).fit(points, sample_weight=weights)


def silhouette(points: Any, label: np.ndarray, seed: int, *, weights: np.ndarray | None = None) -> float:
    """Mean silhouette of a seeded choice of at most 2,000 rows; minus infinity where these form no clusters.

    Args:
        points: Rows, dense or sparse.
        label: The cluster of each row.
        seed: Of the choice.
        weights: What each row counts in the mean; 1 by default.
    """
    from sklearn.metrics import silhouette_samples

    rows = np.random.default_rng(seed).permutation(len(label))[:_SILHOUETTE_ROWS]
    if not 1 < len(set(label[rows].tolist())) < len(rows):
        return float("-inf")
    each = silhouette_samples(points[rows], label[rows])
    return float(np.average(each, weights=None if weights is None else weights[rows]))
