# SPDX-License-Identifier: Apache-2.0
"""Remove whole experts from Mixture-of-Experts models and get back a checkpoint that plain ``from_pretrained`` opens.

Importing this package is light: torch and transformers are imported when a name that needs them is first used. It lets
transformers load checkpoints whose layers have different numbers of experts (``optimum_moe_prune.models.reload``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .environment import check_platform, package_version
from .models.reload import enable as _enable_reload
from .models.unknown import enable as _enable_discovery

if TYPE_CHECKING:
    from .architectures import MoESpec as MoESpec
    from .architectures import list_architectures as list_architectures
    from .architectures import register_architecture as register_architecture
    from .calibration.calibrate import calibrate as calibrate
    from .calibration.samples import CalibrationSet as CalibrationSet
    from .checkpoints.source import Source as Source
    from .config import MoEPrunerConfig as MoEPrunerConfig
    from .errors import MoEPruneError as MoEPruneError
    from .errors import RequestError as RequestError
    from .errors import RunError as RunError
    from .evaluation.compare import compare as compare
    from .evaluation.compare_methods import compare_methods as compare_methods
    from .evaluation.losses import evaluate as evaluate
    from .evaluation.measure_sensitivity import measure_sensitivity as measure_sensitivity
    from .methods import list_methods as list_methods
    from .methods import register_method as register_method
    from .models.memory import Compute as Compute
    from .plan import PruningPlan as PruningPlan
    from .planning.sensitivity import Sensitivity as Sensitivity
    from .planning.work import plan_work as plan_work
    from .pruner import MoEPruner as MoEPruner
    from .publishing.export_statistics import export_statistics as export_statistics
    from .publishing.method_comparison import write_method_comparison as write_method_comparison
    from .publishing.report import write_report as write_report
    from .recovery.by_plan import recover as recover
    from .statistics.stats import CalibrationStats as CalibrationStats
    from .statistics.stats import Need as Need
    from .storage.workspace import Workspace as Workspace

__version__ = package_version()

_HOME = {
    "CalibrationSet": "calibration.samples",
    "CalibrationStats": "statistics.stats",
    "Compute": "models.memory",
    "MoEPruneError": "errors",
    "MoEPruner": "pruner",
    "MoEPrunerConfig": "config",
    "MoESpec": "architectures",
    "Need": "statistics.stats",
    "PruningPlan": "plan",
    "RequestError": "errors",
    "RunError": "errors",
    "Sensitivity": "planning.sensitivity",
    "Source": "checkpoints.source",
    "Workspace": "storage.workspace",
    "calibrate": "calibration.calibrate",
    "compare": "evaluation.compare",
    "compare_methods": "evaluation.compare_methods",
    "evaluate": "evaluation.losses",
    "export_statistics": "publishing.export_statistics",
    "list_architectures": "architectures",
    "list_methods": "methods",
    "measure_sensitivity": "evaluation.measure_sensitivity",
    "plan_work": "planning.work",
    "recover": "recovery.by_plan",
    "register_architecture": "architectures",
    "register_method": "methods",
    "write_method_comparison": "publishing.method_comparison",
    "write_report": "publishing.report",
}
"""Public names and the modules they live in."""
_ANYWHERE = frozenset(
    "MoEPruneError MoESpec RequestError RunError list_architectures list_methods register_architecture "
    "register_method".split()
)
"""Those that are there on every system; the others read and write checkpoints as Linux and macOS do."""

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _ANYWHERE:
        check_platform()
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_enable_reload()
_enable_discovery()
