# SPDX-License-Identifier: Apache-2.0
"""Representative samples: one of each cluster, by domain, the same in every run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer
from sklearn.feature_extraction.text import TfidfVectorizer

from optimum_moe_prune import CalibrationSet, MoEPruner, MoEPrunerConfig, RequestError
from optimum_moe_prune.calibration.representatives import representatives, token_features


def topics(number: int, each: int = 6) -> list[dict[str, str]]:
    """Texts of so many topics without common words, in each of two domains."""
    rng = np.random.default_rng(0)
    records = []
    for domain in range(2):
        for topic in range(number):
            first = domain * 46 + topic * 9
            for _ in range(each):
                words = rng.integers(first, first + 9, size=12)
                records.append({"text": " ".join(f"w{w}" for w in words), "domain": f"d{domain}"})
    rng.shuffle(records)
    return records


def topic_of(ids: torch.Tensor) -> int:
    return int((ids[1] - 3) % 46) // 9


@pytest.mark.parametrize("settings", [{"num_clusters": 4}, {"num_clusters": "auto"}, {"num_samples": 8}])
def test_each_topic_of_each_domain_is_represented(settings: dict[str, object]) -> None:
    chosen = CalibrationSet.build(topics(4), make_tokenizer(), sample_selection="kmeans", **settings)
    assert Counter((s.domain, topic_of(ids)) for s, ids in zip(chosen.samples, chosen.token_ids, strict=True)) == {
        (f"d{domain}", topic): 1 for domain in range(2) for topic in range(4)
    }
    again = CalibrationSet.build(topics(4)[::-1], make_tokenizer(), sample_selection="kmeans", **settings)
    assert again.samples == chosen.samples


def test_a_representative_is_nearest_to_the_centre_of_its_cluster() -> None:
    pool = CalibrationSet.build(topics(3), make_tokenizer())
    domains = [sample.domain for sample in pool.samples]
    chosen = representatives(pool.token_ids, domains, None, 3, seed=0)
    features = token_features(pool.token_ids).toarray()
    for number in chosen:
        key = (domains[number], topic_of(pool.token_ids[number]))
        cluster = [n for n, d in enumerate(domains) if (d, topic_of(pool.token_ids[n])) == key]
        distance = np.linalg.norm(features[cluster] - features[cluster].mean(0), axis=1)
        assert number == cluster[int(distance.argmin())]


def test_features_are_those_of_scikit_learn() -> None:
    pool = CalibrationSet.build(topics(3), make_tokenizer())
    words = [" ".join(f"t{i}" for i in ids.tolist()) for ids in pool.token_ids]
    expected = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\S+").fit(words)
    order = np.argsort([int(word[1:]) for word in expected.get_feature_names_out()])
    np.testing.assert_allclose(token_features(pool.token_ids).toarray(), expected.transform(words).toarray()[:, order])


def test_shares_of_uneven_domains() -> None:
    records = [r for r in make_texts(20) if r["domain"] == "low"] + make_texts(4, seed=9)
    chosen = CalibrationSet.build(records, make_tokenizer(), sample_selection="kmeans", num_samples=9)
    assert Counter(s.domain for s in chosen.samples) == {"low": 7, "high": 2}
    everything = CalibrationSet.build(records, make_tokenizer(), sample_selection="kmeans", num_samples=500)
    assert len(everything) == 14
    one = CalibrationSet.build(records, make_tokenizer(), sample_selection="kmeans", num_samples=1)
    assert len(one) == 1


def test_samples_that_do_not_differ_are_filled_up() -> None:
    words = [["w1", "w2", "w3"], ["w3", "w1", "w2"], ["w2", "w3", "w1"], ["w2", "w1", "w3"], ["w7", "w8", "w9"]]
    texts = [" ".join(w) for w in words]  # four of them have the same features
    assert len(CalibrationSet.build(texts, make_tokenizer(), sample_selection="kmeans", num_clusters=4)) == 4
    assert len(CalibrationSet.build(texts[:4], make_tokenizer(), sample_selection="kmeans", num_clusters="auto")) == 2
    assert len(CalibrationSet.build(texts[:2], make_tokenizer(), sample_selection="kmeans", num_clusters="auto")) == 2


def test_what_was_cut_is_said_of_the_chosen_samples(caplog: pytest.LogCaptureFixture) -> None:
    chosen = CalibrationSet.build(topics(4), make_tokenizer(), sample_selection="kmeans", num_clusters=2, max_length=8)
    assert len(chosen) == chosen.truncated == 4
    assert [record.getMessage() for record in caplog.records] == [
        "4 of 4 samples are longer than 8 tokens and were cut."
    ]


def test_packed_samples_can_be_represented() -> None:
    packed = CalibrationSet.build(
        topics(4), make_tokenizer(), sample_selection="kmeans", num_clusters=3, pack=True, max_length=16
    )
    assert len(packed) == 6 and {s.num_tokens for s in packed.samples} == {16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": 0}, "num_clusters is 0; it must be an integer of at least 1"),
        ({"num_clusters": "many"}, "num_clusters is 'many'"),
        ({"num_clusters": 2.5}, "num_clusters is 2.5"),
        ({"num_clusters": 3, "sample_selection": "first"}, "num_clusters is for sample_selection 'kmeans'"),
    ],
)
def test_numbers_of_clusters_that_cannot_be_meant(settings: dict[str, object], message: str) -> None:
    settings = {"sample_selection": "kmeans", **settings}
    with pytest.raises(RequestError, match=message):
        CalibrationSet.build(make_texts(), make_tokenizer(), **settings)
    with pytest.raises(RequestError, match=message):
        MoEPrunerConfig(method="pathfinder", sparsity=0.5, **settings)


def test_fewer_samples_than_clusters_are_refused() -> None:
    with pytest.raises(RequestError, match="num_clusters is 7, and domain 'high' has 6 samples; ask for fewer"):
        CalibrationSet.build(make_texts(12), make_tokenizer(), sample_selection="kmeans", num_clusters=7)


def test_every_method_can_use_them(tmp_path: Path) -> None:
    pool = make_texts(30)
    for method in ("pathfinder", "reap"):
        config = MoEPrunerConfig(method=method, sparsity=0.25, sample_selection="kmeans", num_clusters=3)
        pruner = MoEPruner(config, tokenizer=make_tokenizer())
        pruner.prune(make_model(), calibration=pool)
        assert len(pruner.stats.samples) == 6
        assert MoEPrunerConfig.from_dict(config.to_dict()) == config
