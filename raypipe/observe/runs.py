"""A step of every stage in whole nanoseconds of one clock, measured or planned: numbers that add up exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raypipe.observe.events import Trace
from raypipe.observe.timeline import origins
from raypipe.schedule import Action, Programs, Simulation

__all__ = ["Row", "Run", "measured_runs", "nanoseconds", "planned_runs"]


class Row(NamedTuple):
    """When a stage turned to an action, when it had its input and began to compute, when it ended."""

    turned: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Run:
    """One stage's step.

    Attributes:
        actions: of its program, in order; at least one.
        rows: the times of each.
        began: when the step began on this stage.
        ended: when it was over.
        gap: how long before ``began`` the stage's step before was over; None where that is not known.
    """

    actions: tuple[Action, ...]
    rows: tuple[Row, ...]
    began: int
    ended: int
    gap: int | None = None

    @property
    def span(self) -> int:
        """From the end of the step before, where that is known, to the end of this one."""
        return self.ended - self.began + (self.gap or 0)


def nanoseconds(seconds: float) -> int:
    """To the nearest."""
    return round(seconds * 1e9)


def measured_runs(traces: Sequence[Trace], previous: Sequence[Trace] | None = None) -> tuple[Run, ...]:
    """What the ranks measured.

    Args:
        traces: of one step, by stage; at least one action each.
        previous: of the step right before, of the same ranks.

    Raises:
        ValueError: times that run backwards, or a step before that is not the one before.
    """
    shifts = origins(traces)
    first = min(trace.started - shift for trace, shift in zip(traces, shifts, strict=True))
    if previous is not None and len(previous) != len(traces):
        raise ValueError(f"the step before has {len(previous)} traces, but this one has {len(traces)}; give as many")
    before = [None] * len(traces) if previous is None else list(previous)
    return tuple(
        _run(stage, trace, last, shift + first)
        for stage, (trace, last, shift) in enumerate(zip(traces, before, shifts, strict=True))
    )


def planned_runs(programs: Programs, found: Simulation) -> tuple[Run, ...]:
    """What a simulation in seconds has found: all stages begin at 0, and are over when the last one is."""
    rows: list[list[Row]] = [[] for _ in programs]
    for span in found.spans:
        of_stage = rows[span.stage]
        turned = of_stage[-1].end if of_stage else 0
        of_stage.append(Row(turned, nanoseconds(span.start), nanoseconds(span.end)))
    ended = nanoseconds(found.makespan)
    return tuple(Run(program, tuple(of_stage), 0, ended) for program, of_stage in zip(programs, rows, strict=True))


def _run(stage: int, trace: Trace, before: Trace | None, origin: float) -> Run:
    began, ended = nanoseconds(trace.started - origin), nanoseconds(trace.ended - origin)
    rows: list[Row] = []
    now = began
    for action, times in zip(trace.actions, trace.times.tolist(), strict=True):
        turned, start, end = (nanoseconds(time - origin) for time in times)
        row = Row(max(turned, now), start, end)
        if not now <= row.turned <= start <= end:
            raise ValueError(
                f"the trace of stage {stage} runs backwards at {action}; give the times as the ranks wrote them"
            )
        rows.append(row)
        now = end
    if ended < now:
        raise ValueError(
            f"the step of stage {stage} ended before its last action; give the times as the ranks wrote them"
        )
    if before is None:
        return Run(trace.actions, tuple(rows), began, ended)
    gap = began - nanoseconds(before.ended - origin)
    if gap < 0:
        raise ValueError(
            f"on stage {stage} the step before ended after this one had begun; give the traces of the step right before"
        )
    return Run(trace.actions, tuple(rows), began, ended, gap)
