"""WHEN each stage computes what: schedules as pure data, without torch and without Ray.

A file is a noun: ``action`` the smallest value, ``gpipe`` and ``one_f_one_b`` the generators, ``schedule`` the whole,
``check`` the rules that hold for every schedule, ``dry_run`` who waits for whom, ``simulate`` the times, ``draw`` and
``csv`` the two text forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from .action import Action, Op, Programs
from .check import check_count
from .draw import draw_programs, draw_spans
from .gpipe import gpipe
from .one_f_one_b import one_f_one_b
from .schedule import Schedule
from .simulate import Costs, Simulation, Span, simulate

__all__ = [
    "Action",
    "Costs",
    "Op",
    "Programs",
    "Schedule",
    "Simulation",
    "Span",
    "build",
    "draw_programs",
    "draw_spans",
    "gpipe",
    "names",
    "one_f_one_b",
    "simulate",
]

_GENERATORS: Mapping[str, Callable[[int, int], Programs]] = MappingProxyType({"1f1b": one_f_one_b, "gpipe": gpipe})


def names() -> tuple[str, ...]:
    """The names that ``build`` knows, sorted."""
    return tuple(sorted(_GENERATORS))


def build(name: str, stages: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule of this name.

    Args:
        name: one of ``names()``.
        stages: pipeline stages, at least 1.
        microbatches: microbatches a step, at least 1.
        chunks: chunks a stage; the schedules known here hold one.

    Raises:
        TypeError: a number that is no int.
        ValueError: an unknown name, a number below 1, or more chunks a stage than the schedule holds.
    """
    if name not in _GENERATORS:
        raise ValueError(f"the schedule {name!r} is not known; choose one of {', '.join(names())}")
    check_count("stages", stages)
    check_count("microbatches", microbatches)
    if chunks is not None:
        check_count("chunks", chunks)
        if chunks != 1:
            raise ValueError(f"chunks is {chunks}, but the schedule {name!r} holds one chunk a stage; leave chunks out")
    return Schedule(name, _GENERATORS[name](stages, microbatches), microbatches)
