# SPDX-License-Identifier: Apache-2.0
"""Remove whole experts from Mixture-of-Experts models and get back a checkpoint that plain ``from_pretrained`` opens.

Importing this package is light: torch and transformers are imported when a name that needs them is first used. It lets
transformers load checkpoints whose layers have different numbers of experts (``optimum_moe_prune.models.reload``).
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .models.reload import enable as _enable_reload

if TYPE_CHECKING:
    from .architectures import MoESpec, list_architectures, register_architecture
    from .calibration.samples import CalibrationSet
    from .config import MoEPrunerConfig
    from .errors import MoEPruneError, RequestError, RunError
    from .methods import list_methods, register_method
    from .plan import PruningPlan
    from .planning.sensitivity import Sensitivity
    from .pruner import MoEPruner
    from .publishing.report import write_report
    from .statistics.stats import CalibrationStats, Need

try:
    __version__ = version("optimum-moe-prune")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"

_HOME = {
    "CalibrationSet": "calibration.samples",
    "CalibrationStats": "statistics.stats",
    "MoEPruneError": "errors",
    "MoEPruner": "pruner",
    "MoEPrunerConfig": "config",
    "MoESpec": "architectures",
    "Need": "statistics.stats",
    "PruningPlan": "plan",
    "RequestError": "errors",
    "RunError": "errors",
    "Sensitivity": "planning.sensitivity",
    "list_architectures": "architectures",
    "list_methods": "methods",
    "register_architecture": "architectures",
    "register_method": "methods",
    "write_report": "publishing.report",
}

__all__ = [
    "CalibrationSet",
    "CalibrationStats",
    "MoEPruneError",
    "MoEPruner",
    "MoEPrunerConfig",
    "MoESpec",
    "Need",
    "PruningPlan",
    "RequestError",
    "RunError",
    "Sensitivity",
    "list_architectures",
    "list_methods",
    "register_architecture",
    "register_method",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_enable_reload()
