# SPDX-License-Identifier: Apache-2.0
"""What imports what: the pure half knows no transformers, and help needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import optimum_moe_prune

MODULES = """
import json, sys
import {module}
print(json.dumps(sorted(sys.modules)))
"""


def loaded_by(module: str) -> set[str]:
    command = [sys.executable, "-c", MODULES.format(module=module)]
    return set(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@pytest.mark.parametrize("name", ["architectures", "statistics.stats", "methods", "plan"])
def test_the_pure_half_imports_no_model_code(name: str) -> None:
    modules = loaded_by(f"optimum_moe_prune.{name}")
    assert f"optimum_moe_prune.{name}" in modules
    assert not modules & {"transformers", "huggingface_hub"}


@pytest.mark.parametrize("name", ["architectures.overview", "methods"])
def test_what_lists_are_made_of_is_light(name: str) -> None:
    assert not loaded_by(f"optimum_moe_prune.{name}") & {"torch", "transformers", "sklearn", "scipy"}


@pytest.mark.parametrize(
    "module",
    [
        "optimum_moe_prune",
        "optimum_moe_prune.commands",
        "optimum_moe_prune.config",
        "optimum_moe_prune._optimum_register",
    ],
)
def test_the_package_and_its_command_line_are_light(module: str) -> None:
    assert not loaded_by(module) & {"torch", "transformers", "numpy", "sklearn", "scipy", "safetensors"}


def test_every_public_name_is_there() -> None:
    for name in optimum_moe_prune.__all__:
        assert getattr(optimum_moe_prune, name) is not None
    assert set(optimum_moe_prune.__all__) <= set(dir(optimum_moe_prune))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        optimum_moe_prune.nothing  # noqa: B018
