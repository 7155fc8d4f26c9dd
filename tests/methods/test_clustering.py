# SPDX-License-Identifier: Apache-2.0
"""K-Means on some of many rows beside K-Means on all, silhouettes of several clusterings, and cuts of trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from optimum_moe_prune.methods import clustering
from optimum_moe_prune.methods.clustering import Silhouettes, partition, silhouette
from optimum_moe_prune.methods.mosaic import cut


def clouds(count: int, rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Rows around far centres ``(count * rows, width)``, mixed, and the centre of each."""
    random = np.random.default_rng(seed)
    label = random.permutation(np.repeat(np.arange(count), rows))
    points = 20 * random.normal(size=(count, width))[label] + random.normal(size=(len(label), width))
    return torch.from_numpy(points).float(), label


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


def inertia(points: torch.Tensor, label: np.ndarray, weights: np.ndarray) -> float:
    total = 0.0
    for cluster in set(label.tolist()):
        rows = label == cluster
        of_rows = points.double().numpy()[rows]
        mean = np.average(of_rows, axis=0, weights=weights[rows])
        total += float((weights[rows] * np.square(of_rows - mean).sum(1)).sum())
    return total


def test_of_few_rows_it_is_plain_k_means() -> None:
    points, _ = clouds(5, 40, 4)
    weights = np.random.default_rng(1).random(200)
    expected = KMeans(7, n_init=1, random_state=3).fit(points.numpy(), sample_weight=weights).labels_
    assert np.array_equal(partition(points, 7, 3, weights), expected)


@pytest.fixture(params=["all rows are fitted", "some rows are fitted"])
def most(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "some rows are fitted":
        monkeypatch.setattr(clustering, "_MOST_TO_FIT", 600)
        monkeypatch.setattr(clustering, "_TO_FIT", 20)


@pytest.mark.parametrize(("count", "rows", "width"), [(3, 1000, 8), (20, 150, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("most")
def test_clouds_are_found_among_many_rows(count: int, rows: int, width: int, dtype: torch.dtype) -> None:
    """Also where the start is looked for in a few directions."""
    points, label = clouds(count, rows, width)
    points = points.to(dtype)
    before = points.clone()
    found = partition(points, count, 0, np.ones(len(points)))
    assert same(found, label)
    assert np.array_equal(found, partition(points, count, 0, np.ones(len(points))))
    assert torch.equal(points, before)


@pytest.mark.usefixtures("most")
def test_clusters_are_as_good_as_with_a_start_among_all() -> None:
    points = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))
    weights = np.random.default_rng(0).random(len(points)) + 0.5
    mine = [inertia(points, partition(points, 4, seed, weights), weights) for seed in range(4)]
    whole = [
        inertia(points, KMeans(4, n_init=1, random_state=seed).fit(points.numpy(), sample_weight=weights).labels_,
                weights) for seed in range(4)
    ]  # fmt: skip
    assert np.mean(mine) < 1.02 * np.mean(whole)
    assert len({tuple(partition(points, 4, seed, weights).tolist()) for seed in range(3)}) == 3


@pytest.mark.usefixtures("most")
def test_weights_decide_among_many_rows() -> None:
    """Three groups on a line, two clusters: a heavy outer group is one of its own."""
    group = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], 600))
    points = torch.from_numpy(4.0 * group[:, None] + np.random.default_rng(1).random((1800, 1))).float()
    for heavy in (0, 2):
        label = partition(points, 2, 0, np.where(group == heavy, 50.0, 1.0))
        assert same(label, (group == heavy).astype(int))


@pytest.mark.usefixtures("most")
def test_more_clusters_than_distinct_rows_leave_some_empty() -> None:
    points = torch.arange(3.0).repeat(300)[:, None]
    assert same(partition(points, 5, 0, np.ones(900)), points[:, 0].numpy().astype(int))


def test_distances_are_calculated_once_for_all_silhouettes(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.metrics

    calls, pairwise = [], sklearn.metrics.pairwise_distances
    monkeypatch.setattr(sklearn.metrics, "pairwise_distances", lambda rows: calls.append(len(rows)) or pairwise(rows))
    points, label = clouds(4, 30, 3)
    means = Silhouettes(points, 0)
    for count in (2, 3, 4):
        of_count = label % count
        assert means.mean(of_count) == pytest.approx(silhouette_score(points.numpy(), of_count), abs=1e-5)
    assert calls == [120]
    few = silhouette(points, label, 5, most=50)
    rows = np.random.default_rng(5).permutation(120)[:50]
    assert few == pytest.approx(silhouette_score(points.numpy()[rows], label[rows]), abs=1e-5)
    assert clustering.silhouette(points, 0 * label, 5) == -np.inf


def test_a_cut_is_that_of_scipy_among_equal_distances_as_well() -> None:
    random = np.random.default_rng(0)
    for experts in (2, 3, 7, 20):
        for values in (random.integers(0, 3, (experts, 3)).astype(float), random.random((experts, 3))):
            tree = linkage(values, "ward")
            for count in range(1, experts + 1):
                assert np.array_equal(cut(tree, count), cut_tree(tree, n_clusters=count)[:, 0])
    assert cut(np.zeros((0, 4)), 1).tolist() == [0]
