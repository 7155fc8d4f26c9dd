# SPDX-License-Identifier: Apache-2.0
"""How often evaluation, measuring and checks wait for a device: once for a batch, whatever there is to measure."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from waits import Waits

from optimum_moe_prune import CalibrationSet, RunError
from optimum_moe_prune.evaluation.divergence import AGREEMENT, KL, LOSS, outcomes
from optimum_moe_prune.evaluation.losses import evaluate
from optimum_moe_prune.models.checks import check_finite
from optimum_moe_prune.models.experts import by_expert
from optimum_moe_prune.models.layerwise import LayerByLayer
from optimum_moe_prune.models.transfers import rows_of


def samples() -> CalibrationSet:
    lengths = (9, 13, 16, 7, 11, 5)
    return CalibrationSet.build(
        [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    )


@pytest.mark.parametrize("compared", [False, True])
def test_an_evaluation_waits_once_for_a_batch(compared: bool) -> None:
    model, other = make_model("mixtral"), make_model("mixtral")
    with Waits([*model.parameters(), *other.parameters()]) as waits:
        evaluate(model, samples(), reference=other if compared else None, batch_size=2)
    assert len(waits.places) == 3, waits.places


@pytest.mark.parametrize("figures", [(KL,), (KL, LOSS, AGREEMENT)])
def test_plans_are_measured_with_one_wait_for_a_batch(figures: tuple[str, ...]) -> None:
    model = make_model("mixtral")
    plans = [{}, {0: (0, 1, 2)}, {1: (0, 3)}, {1: (0, 3), 2: (1, 2, 4)}]
    with Waits(model.parameters()) as waits:
        outcomes(LayerByLayer(model), samples(), plans, figures, batch_size=3)
    assert len(waits.places) == 2, waits.places


def test_layers_one_at_a_time_wait_for_nothing() -> None:
    model = make_model("mixtral")
    runner, (batch,) = LayerByLayer(model), samples().batches(6)
    with Waits(model.parameters()) as waits, runner.running():
        (state,) = runner.embedded([batch])
        for index in range(runner.num_layers):
            state = runner.forward(index, batch, state)
        runner.logits(batch, state)
    # Whether a layer can be run alone is looked at once.
    assert not [place for place in waits.places if "equal" not in place], waits.places


def test_weights_are_checked_with_one_wait() -> None:
    model = make_model("mixtral")
    with Waits(model.parameters()) as waits:
        check_finite(model)
    assert len(waits.places) == 1, waits.places
    model.model.layers[2].self_attn.k_proj.weight.data[1, 1] = torch.inf
    model.model.layers[1].self_attn.k_proj.weight.data[1, 1] = torch.nan
    with pytest.raises(RunError, match=r"^model.layers.1.self_attn.k_proj.weight holds NaN or infinite weights"):
        check_finite(model)


def test_the_device_of_these_tests_is_waited_for() -> None:
    """Or nothing above would mean anything."""
    x, host = torch.arange(6.0).view(2, 3), torch.zeros(2, 3)
    with Waits([x]) as waits:
        rows_of(x[..., None], torch.tensor([[True, False, True], [False, True, False]]))
        assert not waits.places
        list(by_expert(x.long()))
    assert len(waits.places) == 2  # how many there are, and the numbers
    with Waits([x]) as waits:
        host.copy_(x + 1)
        assert bool((x > 1).any()) and (x > 1).cpu().any()
        exec(compile("x[x > 1]; (2 * x).tolist()", f"{waits_of_package()}/made_up.py", "exec"), {"x": x})
    assert [place.split()[1] for place in waits.places] == ["__getitem__", "tolist"], "the others are this file's"


def waits_of_package() -> str:
    from waits import PACKAGE

    return PACKAGE
