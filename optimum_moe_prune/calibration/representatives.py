# SPDX-License-Identifier: Apache-2.0
"""Representative samples from a larger pool (``sample_selection="kmeans"``).

K-Means over the samples of each domain, and of each cluster the sample nearest to its centre, as MoE Pathfinder
(arXiv 2512.18425) selects its calibration samples; it does not say what the features of a sample are. Here they are
the frequencies of its tokens, weighted by how rare a token is in the pool (TF-IDF, length 1): what a router does with
a token depends above all on the token, and these features need no model. So the choice costs seconds, is made before
any weights are read, and is the same for every model with the tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import RequestError
from ..progress import working
from ..statistics.samples import equal_shares

if TYPE_CHECKING:
    from torch import Tensor

MOST_CLUSTERS = 20
"""The most clusters of a domain that ``"auto"`` tries; the paper uses 5 to 20."""

NumClusters = int | Literal["auto"] | None


def representatives(
    token_ids: Sequence[Tensor],
    domains: Sequence[str],
    num_samples: int | None,
    num_clusters: NumClusters,
    seed: int,
) -> list[int]:
    """Numbers of the samples nearest to the centres of clusters of each domain, in rising order.

    Args:
        token_ids: Token ids of each sample of the pool.
        domains: Its domain.
        num_samples: Where ``num_clusters`` is None: how many of all, in equal shares of the domains.
        num_clusters: How many of each domain; ``"auto"``: for each domain the number, of 2 to 20, whose clusters are
            most distinct (mean silhouette, of a seeded choice where there are more than 2,000). Domains of fewer than
            3 samples are then taken whole.
        seed: For K-Means.

    Raises:
        RequestError: If a domain has fewer samples than clusters.
    """
    members: dict[str, list[int]] = {}
    for number, domain in enumerate(domains):
        members.setdefault(domain, []).append(number)
    ordered = sorted(domains)
    shares = Counter(ordered[i] for i in equal_shares(ordered, len(domains) if num_samples is None else num_samples))
    features = token_features(token_ids)
    chosen: list[int] = []
    with working("finding representatives", len(members), "domain", "found representatives of") as work:
        for domain, numbers in work.over(sorted(members.items())):
            count = shares[domain] if num_clusters is None else num_clusters
            if count != "auto" and count > len(numbers):
                raise RequestError(
                    f"num_clusters is {count}, and domain {domain!r} has {len(numbers)} samples; ask for fewer "
                    "clusters or give more samples."
                )
            if (count == "auto" and len(numbers) < 3) or count == len(numbers):
                chosen += numbers
            elif count:
                chosen += [numbers[row] for row in _nearest_to_centres(features[numbers], count, seed)]
    return sorted(chosen)


def token_features(token_ids: Sequence[Tensor]) -> Any:
    """TF-IDF of the tokens of each sample: a sparse matrix ``(samples, tokens that occur)``, rows of length 1."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfTransformer

    every = np.concatenate([ids.numpy() for ids in token_ids])
    _, columns = np.unique(every, return_inverse=True)
    counts = csr_matrix((np.ones(len(every)), columns, np.cumsum([0, *map(len, token_ids)])))
    counts.sum_duplicates()
    return TfidfTransformer(sublinear_tf=True).fit_transform(counts)


def _nearest_to_centres(features: Any, count: int | Literal["auto"], seed: int) -> list[int]:
    """For each cluster the row nearest to its centre; ties to the first."""
    from ..methods.clustering import kmeans, silhouette  # scikit-learn, only where samples are clustered

    counts = range(2, min(MOST_CLUSTERS, features.shape[0] - 1) + 1) if count == "auto" else [count]
    fits = [kmeans(features, k, seed, n_init=3) for k in counts]
    means = fits[0] if len(fits) == 1 else max(fits, key=lambda fit: silhouette(features, fit.labels_, seed))
    label = means.labels_
    distance = means.transform(features)[np.arange(len(label)), label]
    nearest_first = np.argsort(distance, kind="stable").tolist()
    found: dict[int, int] = {}
    for row in nearest_first:
        found.setdefault(int(label[row]), row)
    # Fewer distinct rows than clusters leave some of these empty: the next nearest rows stand in.
    others = [row for row in nearest_first if row not in found.values()]
    return [*found.values(), *others[: means.n_clusters - len(found)]]
