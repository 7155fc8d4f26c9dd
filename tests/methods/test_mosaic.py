# SPDX-License-Identifier: Apache-2.0
"""Mosaic's options against the same steps written once more: Ward by its definition, silhouettes by theirs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import softmax_rule
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from synthetic import Tokens, statistics_of

from optimum_moe_prune import CalibrationStats, MoEPrunerConfig
from optimum_moe_prune.methods import clustering
from optimum_moe_prune.methods.mosaic import Options, cluster_layer, cut, performance_vectors, token_domains, ward_tree
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.statistics.stats import LayerStats

Partition = set[frozenset[int]]


def partition(label: np.ndarray) -> Partition:
    return {frozenset(np.flatnonzero(label == number).tolist()) for number in set(label.tolist())}


def merged(distance: np.ndarray) -> dict[int, Partition]:
    """Ward's partitions by number of clusters, by the recurrence of Lance and Williams on distances ``(C, C)``."""
    clusters = [frozenset([i]) for i in range(len(distance))]
    d = {frozenset(p): distance[next(iter(p[0])), next(iter(p[1]))] for p in itertools.combinations(clusters, 2)}
    partitions = {len(clusters): set(clusters)}
    while len(clusters) > 1:
        s, t = min(itertools.combinations(clusters, 2), key=lambda p: d[frozenset(p)])
        clusters = [c for c in clusters if c not in (s, t)]
        for v in clusters:
            squares = (
                (len(v) + len(s)) * d[frozenset((v, s))] ** 2
                + (len(v) + len(t)) * d[frozenset((v, t))] ** 2
                - len(v) * d[frozenset((s, t))] ** 2
            )
            d[frozenset((v, s | t))] = np.sqrt(squares / (len(v) + len(s) + len(t)))
        clusters.append(s | t)
        partitions[len(clusters)] = set(clusters)
    return partitions


def euclidean(points: np.ndarray) -> np.ndarray:
    return np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))


def spearman(vectors: np.ndarray) -> np.ndarray:
    return np.array([[1.0 if a is b else spearmanr(a, b)[0] for b in vectors] for a in vectors])


# ------------------------------------------------------------------------------------------- Ward


@pytest.mark.parametrize("domains", [1, 2])
def test_with_few_domains_ward_runs_on_standardised_logarithms(domains: int) -> None:
    rng = np.random.default_rng(domains)
    for _ in range(10):
        vectors = np.exp(rng.normal(scale=(3.0, 0.5)[:domains], size=(9, domains)))
        expected = merged(euclidean((np.log(vectors) - np.log(vectors).mean(0)) / np.log(vectors).std(0)))
        for ward in ("ranks", "distances"):
            assert {n: partition(cut(ward_tree(vectors, ward), n)) for n in range(1, 10)} == expected


@pytest.mark.parametrize("domains", [3, 4, 7])
def test_wards_two_readings_of_a_rank_correlation(domains: int) -> None:
    """On ranks the squared distance is 2 K (1 - rho); the literal reading takes 1 - S_perf itself for a distance."""
    rng = np.random.default_rng(domains)
    differ = 0
    for _ in range(10):
        vectors = rng.random((8, domains))
        rho = spearman(vectors)
        clusters = range(1, 9)
        found = {w: {n: partition(cut(ward_tree(vectors, w), n)) for n in clusters} for w in ("ranks", "distances")}
        # Correlations of few domains tie exactly; the trees are then compared by their heights.
        distances = {"ranks": np.sqrt(np.maximum(2 * domains * (1 - rho), 0)), "distances": 1 - (1 + rho) / 2}
        for ward, distance in distances.items():
            values = np.round(distance[np.triu_indices(8, 1)], 9)
            if len(set(values.tolist())) == len(values):
                assert found[ward] == merged(distance)
            first = ward_tree(vectors, ward)[0]
            assert first[2] == pytest.approx(values.min(), abs=1e-7)
        differ += found["ranks"] != found["distances"]
    assert differ


def test_both_readings_on_vectors_without_ties() -> None:
    rng = np.random.default_rng(0)
    differ = 0
    for _ in range(10):
        vectors = rng.random((8, 25))
        rho = spearman(vectors)
        expected = {"ranks": merged(np.sqrt(2 * 25 * (1 - rho))), "distances": merged((1 - rho) / 2)}
        for ward, partitions in expected.items():
            assert {n: partition(cut(ward_tree(vectors, ward), n)) for n in range(1, 9)} == partitions
        differ += expected["ranks"] != expected["distances"]
    assert differ


@pytest.mark.parametrize("nothing", [0.0, 1e-300, 1e-12])
def test_an_error_of_zero_erases_no_domain(nothing: float) -> None:
    """Experts that group by the first domain still do when one of them is perfect in it."""
    vectors = np.array([[1.0, 5.0], [1.1, 5.2], [0.9, 4.9], [nothing, 5.1], [40.0, 5.0], [44.0, 5.3], [38.0, 4.8]])
    assert partition(cut(ward_tree(vectors), 2)) == {frozenset({0, 1, 2, 3}), frozenset({4, 5, 6})}
    raised = np.where(vectors == nothing, 0.9, vectors)
    for count in range(1, 8):
        assert partition(cut(ward_tree(vectors), count)) == partition(cut(ward_tree(raised), count))


def test_small_errors_that_are_no_rounding_stay_what_they_are() -> None:
    vectors = np.array([[1.0], [3.0], [1e-9], [3e-9]])
    assert partition(cut(ward_tree(vectors), 2)) == {frozenset({0, 1}), frozenset({2, 3})}
    assert partition(cut(ward_tree(np.zeros((4, 2))), 4)) == {frozenset({i}) for i in range(4)}
    # A domain in which nobody errs says nothing; the other one decides.
    assert partition(cut(ward_tree(np.column_stack([np.zeros(4), vectors])), 2)) == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }


# ------------------------------------------------------------------------------------------- domains of tokens


def layer_of(inputs: np.ndarray, weights: np.ndarray | None = None, error: np.ndarray | None = None) -> LayerStats:
    """A layer with these inputs ``(N, H)``, every token a sample of its own with its weight ``(N,)``."""
    weights = np.ones(len(inputs)) if weights is None else weights
    tensors = {"inputs": torch.from_numpy(inputs).float()}
    if error is not None:
        tensors["token_single_error"] = torch.from_numpy(error).float()
    experts = 4 if error is None else error.shape[1]
    return LayerStats(experts, softmax_rule(2), tensors, torch.from_numpy(weights), torch.arange(len(inputs)))


def blobs(rng: np.random.Generator, counts: list[int], spread: float = 0.05) -> np.ndarray:
    centres = rng.normal(size=(len(counts), 3)) * 5
    return np.concatenate([c + spread * rng.normal(size=(n, 3)) for c, n in zip(centres, counts, strict=True)])


def silhouettes(points: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Of each point, by the definition."""
    distance = euclidean(points)
    values = []
    for i, own in enumerate(label):
        others = [distance[i, label == other].mean() for other in set(label.tolist()) - {own}]
        same = label == own
        inside = distance[i, same].sum() / max(same.sum() - 1, 1)
        values.append(0.0 if same.sum() == 1 else (min(others) - inside) / max(min(others), inside))
    return np.array(values)


def best_by_silhouette(points: np.ndarray, weights: np.ndarray, seed: int) -> tuple[Partition, int]:
    best, score = np.zeros(len(points)), -np.inf
    for count in range(2, min(16, len(points) - 1) + 1):
        points32 = points.astype(np.float32)
        label = KMeans(count, n_init=1, random_state=seed).fit(points32, sample_weight=weights).labels_
        found = np.average(silhouettes(points32.astype(float), label), weights=weights)
        if found > score + 1e-9:
            best, score = label, found
    return partition(best), len(set(best.tolist()))


def test_auto_takes_the_number_of_domains_with_the_best_silhouette() -> None:
    rng = np.random.default_rng(0)
    for seed, counts in enumerate(([10, 14], [9, 8, 12, 10], [7] * 6, [40], [3, 3])):
        points = blobs(rng, counts)
        found = token_domains(layer_of(points), "auto", seed)
        expected, _ = best_by_silhouette(points, np.ones(len(points)), seed)
        assert partition(found) == expected
        assert sorted(set(found.tolist())) == list(range(len(expected)))
    clear = blobs(np.random.default_rng(5), [9, 8, 12, 10])
    assert len(partition(token_domains(layer_of(clear), "auto", 0))) == 4


def test_auto_counts_tokens_with_their_weights() -> None:
    rng = np.random.default_rng(1)
    differ = 0
    for seed in range(8):
        points = rng.normal(size=(60, 2)) * np.repeat([[1.0, 0.2], [0.3, 3.0]], 30, axis=0)
        weights = np.repeat(rng.permutation([3.0, 0.05]), 30)
        found = partition(token_domains(layer_of(points, weights), "auto", seed))
        assert found == best_by_silhouette(points, weights, seed)[0]
        label = KMeans(5, n_init=1, random_state=seed).fit(points).labels_
        assert clustering.silhouette(points, label, seed) == pytest.approx(silhouettes(points, label).mean())
        assert clustering.silhouette(points, label, seed, weights=weights) == pytest.approx(
            np.average(silhouettes(points, label), weights=weights)
        )
        differ += found != partition(token_domains(layer_of(points), "auto", seed))
    assert differ


def test_auto_looks_at_2_to_16_domains() -> None:
    points = blobs(np.random.default_rng(2), [4] * 20, spread=1e-4)
    assert len(partition(token_domains(layer_of(points), "auto", 0))) <= 16
    assert set(token_domains(layer_of(points[:2]), "auto", 0)) == {0}  # no number is below that of the tokens
    assert len(partition(token_domains(layer_of(points[[0, 1, 9]]), "auto", 0))) == 2


def test_the_silhouette_of_many_rows_is_of_2000_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    points, weights = rng.normal(size=(2050, 2)), rng.random(2050)
    label = (points[:, 0] > 0).astype(int)
    rows = np.random.default_rng(7).permutation(2050)[:2000]
    expected = np.average(silhouettes(points[rows], label[rows]), weights=weights[rows])
    assert clustering.silhouette(points, label, 7, weights=weights) == pytest.approx(expected)
    assert clustering.silhouette(points, 0 * label, 7) == -np.inf
    assert clustering.silhouette(points[:5], np.arange(5), 7) == -np.inf


def best_split(points: np.ndarray, weights: np.ndarray) -> Partition:
    """The two weighted clusters of numbers with the least inertia, by trying every bound."""
    order = np.argsort(points)

    def inertia(rows: np.ndarray) -> float:
        mean = np.average(points[rows], weights=weights[rows])
        return float((weights[rows] * (points[rows] - mean) ** 2).sum())

    bound = min(range(1, len(points)), key=lambda b: inertia(order[:b]) + inertia(order[b:]))
    return {frozenset(order[:bound].tolist()), frozenset(order[bound:].tolist())}


def test_domains_are_found_with_the_weights_of_tokens() -> None:
    """Three groups, two clusters: the weights say which two groups are one domain."""
    points = np.concatenate([np.linspace(0, 1, 10), np.linspace(4, 5, 10), np.linspace(8, 9, 10)])
    for heavy, apart in ((0, frozenset(range(10))), (2, frozenset(range(20, 30)))):
        weights = np.repeat(np.where(np.arange(3) == heavy, 20.0, 1.0), 10)
        expected = best_split(points, weights)
        assert apart in expected
        for seed in range(5):
            assert partition(token_domains(layer_of(points[:, None], weights), 2, seed)) == expected


def test_performance_is_the_weighted_mean_error_in_each_domain() -> None:
    rng = np.random.default_rng(4)
    error, weights = rng.random((30, 5)), rng.random(30) + 0.1
    domain = rng.permutation(np.arange(30) % 4)
    found = performance_vectors(layer_of(np.zeros((30, 2)), weights, error), domain)
    for expert, number in np.ndindex(5, 4):
        rows = domain == number
        assert found[expert, number] == pytest.approx(np.average(error[rows, expert], weights=weights[rows]), rel=1e-6)


# ------------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    random = torch.Generator().manual_seed(0)
    samples = []
    for number in range(8):
        shape = (2, 20, 10)
        outputs = torch.randn(*shape, 6, generator=random) * torch.logspace(-1, 1, 10)[:, None]
        inputs = torch.randn(2, 20, 6, generator=random) + 3 * (number % 4)
        samples.append((f"{number % 2}", Tokens(torch.randn(shape, generator=random), outputs, inputs)))
    return statistics_of(samples, softmax_rule(2))


@pytest.mark.parametrize("weights", [None, {"0": 1.0, "1": 6.0}])
@pytest.mark.parametrize("num_domains", [1, 2, 5, "auto", None])
@pytest.mark.parametrize("ward", ["ranks", "distances"])
def test_every_option_reaches_the_choice(
    stats: CalibrationStats, ward: str, num_domains: int | str | None, weights: dict[str, float] | None
) -> None:
    """The plan is the one of the steps, each by its own oracle, for all options and weights."""
    options = {"num_generalists": 0, "num_domains": num_domains, "ward": ward}
    config = MoEPrunerConfig(method="mosaic", num_experts=4, method_options=options, seed=2)
    plan = build_plan(stats, config, weights)
    said = [note for note in plan.provenance["notes"] if "fewer than 3 domains" in note]
    few = 0
    for index, layer in stats.with_domain_weights(weights).layers.items():
        of_token = layer.token_weights.numpy()
        inputs = layer.tensors["inputs"].numpy()
        if num_domains == "auto":
            domains, count = best_by_silhouette(inputs, of_token, 2)
        else:
            count = num_domains or 4
            domains = partition(KMeans(count, n_init=1, random_state=2).fit(inputs, sample_weight=of_token).labels_)
        error = layer.tensors["token_single_error"].double().numpy()
        columns = [np.average(error[sorted(d)], axis=0, weights=of_token[sorted(d)]) for d in sorted(domains, key=min)]
        vectors = np.stack(columns, axis=1)
        if count < 3:
            few += 1
            clusters = merged(euclidean((np.log(vectors) - np.log(vectors).mean(0)) / np.log(vectors).std(0)))[4]
        else:
            rho = spearman(vectors)
            distance = np.sqrt(np.maximum(1 - rho, 0)) if ward == "ranks" else 1 - rho
            clusters = merged(distance)[4]
        p = torch.softmax(layer.tensors["logits"].double(), -1).numpy()
        q = p * of_token[:, None] / (p * of_token[:, None]).sum(0)
        score = (q * np.log2(p / (p * of_token[:, None]).sum(0) * of_token.sum())).sum(0)
        expected = sorted(max(cluster, key=lambda e: score[e]) for cluster in clusters)
        assert plan.retained[index] == tuple(expected), index
    assert said == ([] if not few else [
        "mosaic: with fewer than 3 domains ranks say almost nothing, so experts are compared by log errors in "
        f"{few} of 2 layers; num_domains sets the number of domains"
    ])  # fmt: skip


def test_the_option_decides_between_wards_readings(stats: CalibrationStats) -> None:
    differ = 0
    for seed in range(12):
        labels = {}
        for ward in ("ranks", "distances"):
            found = cluster_layer(stats.layers[1], (), 4, seed, Options(num_domains=12, ward=ward))
            assert partition(found.label) == partition(cut(ward_tree(found.vectors, ward), 4))
            labels[ward] = partition(found.label)
        differ += labels["ranks"] != labels["distances"]
    assert differ


def test_of_equal_representatives_the_lower_one_stays(stats: CalibrationStats) -> None:
    layer = stats.layers[0]
    even = {name: torch.ones_like(layer.tensors[name]) for name in ("probability", "probability_log2")}
    layer = replace(layer, tensors={**layer.tensors, **even})
    found = cluster_layer(layer, (3,), 4, 0, Options(num_domains=4))
    assert found.experts == (0, 1, 2, 4, 5, 6, 7, 8, 9) and 3 not in found.representatives
    for number, expert in enumerate(found.representatives):
        assert expert == min(e for e, label in zip(found.experts, found.label, strict=True) if label == number)


def test_the_order_of_domains_decides_nothing() -> None:
    """Ranks agree alike between many experts; no rounding of sums over domains may choose among them."""
    random = np.random.default_rng(0)
    for _ in range(50):
        vectors = random.random((12, 5))
        expected = ward_tree(vectors, "distances")
        for _ in range(5):
            assert np.array_equal(ward_tree(vectors[:, random.permutation(5)], "distances"), expected)
