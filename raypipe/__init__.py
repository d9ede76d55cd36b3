"""raypipe: exact pipeline-parallel training of unmodified PyTorch models, on Ray.

Public names load on first use, so that ``import raypipe`` imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from raypipe.errors import (
    BatchError,
    CutError,
    NonFiniteError,
    PeerLost,
    RaypipeError,
    ResourcesError,
    ScheduleError,
    StageError,
    StageLost,
    StageStuck,
    StepError,
)

if TYPE_CHECKING:
    from raypipe import data, schedule
    from raypipe.model.pretrained import from_pretrained
    from raypipe.plan import Plan
    from raypipe.schedule import Schedule
    from raypipe.trainer import PipelineTrainer

__version__ = "0.1.0"

__all__ = [
    "BatchError",
    "CutError",
    "NonFiniteError",
    "PeerLost",
    "PipelineTrainer",
    "Plan",
    "RaypipeError",
    "ResourcesError",
    "Schedule",
    "ScheduleError",
    "StageError",
    "StageLost",
    "StageStuck",
    "StepError",
    "__version__",
    "data",
    "from_pretrained",
    "schedule",
]

_HOME: Mapping[str, str] = MappingProxyType(
    {
        "PipelineTrainer": "raypipe.trainer",
        "Plan": "raypipe.plan",
        "Schedule": "raypipe.schedule",
        "from_pretrained": "raypipe.model.pretrained",
    }
)
_ROOMS = ("data", "schedule")


def __getattr__(name: str) -> Any:
    """Loads a public name on its first use (PEP 562)."""
    if name in _ROOMS:
        return import_module(f"raypipe.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'raypipe' has no attribute {name!r}; its names are {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
