"""Traces that no rank has measured: of a simulation, or of any times at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from made_by_hand import EVERY_KIND

from raypipe.observe.events import Trace
from raypipe.observe.report import Report
from raypipe.schedule import Costs, Schedule, build

__all__ = ["MS", "SLOW", "any_steps", "played", "slow_report"]

MS = Costs(forward=1e-3, backward=2e-3)
SLOW = replace(MS, forward=(1e-3, 1.5e-3), latency=2.5e-4)


def played(
    schedule: Schedule,
    costs: Costs,
    *,
    data: float = 0.0,
    optimizer: float = 0.0,
    at: float = 1000.0,
    clocks: Sequence[float] = (),
) -> list[Trace]:
    """What ranks would measure if a step that begins at ``at`` went as simulated after ``data`` seconds.

    All are over ``optimizer`` seconds after the last action of the pipeline. ``clocks`` is added to each rank's times.
    """
    found = schedule.simulate(costs)
    traces = []
    for stage, program in enumerate(schedule.programs):
        spans = [span for span in found.spans if span.stage == stage]
        ends = [0.0, *(span.end for span in spans)]
        rows = [(turned, span.start, span.end) for turned, span in zip(ends, spans, strict=False)]
        clock = at + (clocks[stage] if clocks else 0.0)
        ended = clock + data + found.makespan + optimizer
        traces.append(Trace(program, np.array(rows) + clock + data, clock, ended, 1))
    return traces


def slow_report() -> Report:
    """Predicted by a step of MS, measured one of SLOW: 0.5 ms after it, with 0.5 ms of data and 1 of the optimizer."""
    schedule = build("gpipe", 2, 2)
    before = played(schedule, MS, at=10.0)  # over at 10.009
    return Report.of(schedule, played(schedule, SLOW, at=10.0095, data=5e-4, optimizer=1e-3), earlier=[before])


@st.composite
def any_steps(draw: st.DrawFn) -> tuple[Schedule, list[list[Trace]]]:
    """A schedule and two steps in a row whose times are in order on each stage, and otherwise without any sense."""
    schedule = draw(st.sampled_from(EVERY_KIND))
    lengths = st.sampled_from([0.0, 1e-9, 1e-4, 3e-3, 0.1])
    clocks = draw(st.lists(st.sampled_from([0.0, 5.5, 1e6]), min_size=schedule.stages, max_size=schedule.stages))
    steps: list[list[Trace]] = [[], []]
    for program, clock in zip(schedule.programs, clocks, strict=True):
        now = clock
        for step in steps:
            count = 3 * len(program)
            times = draw(st.lists(lengths, min_size=count + 3, max_size=count + 3))
            moments = now + np.cumsum(times)
            started, ended, now = float(moments[0]), float(moments[-2]), float(moments[-1])
            step.append(Trace(program, moments[1:-2].reshape(-1, 3), started, ended, 1))
    return schedule, steps
