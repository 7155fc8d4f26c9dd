# SPDX-License-Identifier: Apache-2.0
"""``storage/FORMATS.md`` names every key and tensor that is written."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

import optimum_moe_prune
from optimum_moe_prune import MoEPrunerConfig, Need, PruningPlan
from optimum_moe_prune.evaluation.comparison import Comparison, ModelResult
from optimum_moe_prune.evaluation.losses import DomainResult
from optimum_moe_prune.evaluation.speed import Generation
from optimum_moe_prune.planning.sensitivity import MethodSensitivity, Sensitivity
from optimum_moe_prune.statistics.needs import tensor_names
from optimum_moe_prune.storage.outputs import MARKERS

TEXT = (Path(optimum_moe_prune.__file__).parent / "storage" / "FORMATS.md").read_text(encoding="utf-8")
STATISTICS = Path(__file__).parents[1] / "data" / "statistics_mixtral" / "stats.json"


def fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def written() -> dict[str, Iterable[str]]:
    header = json.loads(STATISTICS.read_text())
    plan = PruningPlan("mixtral", 2, "reap", {0: (0, 3)}, {0: 4})
    values = plan.to_dict()
    sensitivity = Sensitivity({}, {}, {"reap": MethodSensitivity({}, {})}).to_dict()
    return {
        "markers": [*MARKERS, *(key for keys in MARKERS.values() for key in keys)],
        "statistics": [*header, *header["model"], *header["layers"]["0"], *header["samples"][0]],
        "routing": header["layers"]["0"]["routing"],
        "made": header["provenance"],
        "needs": map(str, Need),
        "tensors": tensor_names(Need),
        "plan": [*values, *values["layers"]["0"]],
        "recipe": MoEPrunerConfig(method="reap", sparsity=0.5).to_dict(),
        "sensitivity": [*sensitivity, *sensitivity["methods"]["reap"]],
        "evaluation": [*Comparison({}).to_dict(), *ModelResult(parameters=1, nbytes=1).to_dict()],
        "measured": [*fields(DomainResult), *fields(Generation)],
        "exported": [*json.loads(plan.export()), *json.loads(plan.export())["layers"]["0"]],
    }


@pytest.mark.parametrize("keys", written().values(), ids=written())
def test_every_key_is_named(keys: Iterable[str]) -> None:
    named = set(re.findall(r"`([^`\s]+)`", TEXT))
    assert not [key for key in keys if key not in named]
