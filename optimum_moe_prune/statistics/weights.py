# SPDX-License-Identifier: Apache-2.0
r"""Domain weights: each domain's share of what a method minimises or counts.

A method adds up what the samples :math:`s` contribute, :math:`\sum_s w_s A_s`. How much a sample can contribute grows
with its length, and not in every method alike: call :math:`a_s` what it would contribute if all tokens were alike,

- a sum over tokens (counts, norms, probabilities): :math:`a_s = T_s`, its tokens; over kept tokens alone, those kept;
- the reconstruction loss :math:`L_{recon} = \sum_s w_s \sqrt{\sum_{t \in s} \epsilon_t}`: :math:`a_s =
  \sqrt{N_s}` with :math:`N_s` kept tokens, because a root of a sum of N equal terms is :math:`\sqrt N` times the root
  of one;
- a vote of the whole sample (Pathfinder's participation): :math:`a_s = 1`.

Where not all tokens are kept, each of the :math:`N_s` kept ones stands for :math:`r_s = T_s / N_s` (up to a common
factor), since of every sample at least a few are kept: kept tokens count with :math:`r_s`, roots with
:math:`\sqrt{r_s}`, also where no domain weights are set, and :math:`N_s` above is :math:`r_s N_s`.

With the share :math:`\omega_d` of domain d (the shares add up to 1) a sample of the domain counts

.. math:: w_s = \omega_d \frac{\sum_{s'} a_{s'}}{\sum_{s' \in d} a_{s'}}, \qquad \sum_s w_s A_s \propto
    \sum_d \omega_d \frac{\sum_{s \in d} A_s}{\sum_{s \in d} a_s},

so the objective is the mean of the domains' own means (per token; the root mean square error per token; per sample),
with their shares, whatever the number and length of their samples. Domains whose tokens are alike contribute exactly
their shares; beyond that a domain contributes more only where its tokens really lose more. That is why errors are not
divided by the size of the domain's outputs: they are added to the same residual stream, and where a layer does next
to nothing for a domain, what it loses there should weigh next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .samples import Sample


def sample_weights(samples: Sequence[Sample], domain_weights: Mapping[str, float], amount: Tensor) -> Tensor:
    """The weight of each sample ``(S,)`` float64, with which domains count with their shares.

    Args:
        samples: The samples.
        domain_weights: A positive number for each domain; only ratios matter.
        amount: What each sample would contribute if all tokens were alike ``(S,)``, not 0 for all.

    Returns:
        Weights whose mean over ``amount`` is 1: all are 1 where each domain's share is that of its amount. A domain
        that contributes nothing has weight 0.
    """
    amount = amount.double()
    by_domain = dict.fromkeys(domain_weights, 0.0)
    for sample, value in zip(samples, amount.tolist(), strict=True):
        by_domain[sample.domain] += value
    scale = float(amount.sum()) / sum(weight for domain, weight in domain_weights.items() if by_domain[domain])
    weights = {
        domain: weight * scale / by_domain[domain] if by_domain[domain] else 0.0
        for domain, weight in domain_weights.items()
    }
    return torch.tensor([weights[sample.domain] for sample in samples], dtype=torch.float64)
