from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_by_hand import EVERY_KIND, looped, mine
from made_up_traces import any_steps, played

from raypipe.observe.difference import Difference, difference
from raypipe.observe.events import Trace
from raypipe.observe.runs import measured_runs, nanoseconds, planned_runs
from raypipe.schedule import Costs, Schedule, build

PIPE = mine("0F0 0B0", "1F0 1B0", "2F0 2B0", microbatches=1)


def lost(schedule: Schedule, traces: list[Trace], costs: Costs, before: list[Trace] | None = None) -> Difference:
    planned = planned_runs(schedule.programs, schedule.simulate(costs))
    return difference(schedule, costs, planned, measured_runs(traces, before))


def in_seconds(found: Difference) -> list[float]:
    return [*(slower / 1e9 for slower in found.compute), *(part / 1e9 for part in found[1:])]


def test_as_predicted_there_is_no_difference() -> None:
    costs = Costs(latency=0.25, boundary_bytes=2, bandwidth=8)
    assert in_seconds(lost(PIPE, played(PIPE, costs), costs)) == [0, 0, 0, 0, 0, 0, 0, 0]


def test_each_message_is_predicted_by_its_size_and_channel() -> None:
    costs = Costs(
        latency={(0, 1): 0.25, (1, 2): 0.5, (2, 1): 1.0, (1, 0): 2.0},
        bandwidth=4,
        boundary_bytes=(1, 2),
        gradient_bytes=(4, 8),
    )
    found = lost(PIPE, played(PIPE, costs), costs)
    assert (found.communication, found.another_path) == (0, 0)
    free = lost(PIPE, played(PIPE, costs), Costs())
    assert free.communication == nanoseconds(0.25 + 0.5 + 1.0 + 2.0 + (1 + 2 + 4 + 8) / 4)


def test_each_cause_shows_where_it_arose() -> None:
    real = Costs(forward=(1.0, 1.5, 1.0), backward=(2.0, 2.0, 1.75), latency=0.125)
    before, now = played(PIPE, Costs(), at=100.0), played(PIPE, real, at=111.0, data=0.5, optimizer=0.25)
    found = lost(PIPE, now, Costs(), before)
    assert in_seconds(found) == [0, 0.5, -0.25, 0.5, 0.5, 2, 0.25, 0]
    assert found.total == nanoseconds(3.5)


def test_what_is_off_the_path_does_not_count() -> None:
    # Stage 1 is so slow that the path stays on it; stage 0's extra time is hidden but for its first forward.
    schedule = build("1f1b", 2, 6)
    costs = Costs(forward=(1.0, 3.0), backward=(1.0, 3.0))
    assert in_seconds(lost(schedule, played(schedule, replace(costs, forward=(1.5, 3.0))), costs))[0] == 0.5


def test_another_path_than_the_predicted_one() -> None:
    # Predicted, stage 0 is always busy: 12 times 2. Measured, stage 1 is: 12 times 3, and 1 before and after it.
    schedule = build("1f1b", 2, 6)
    plan = Costs(forward=(2.0, 1.0), backward=(2.0, 1.0))
    real = Costs(forward=(1.0, 3.0), backward=(1.0, 3.0))
    found = lost(schedule, played(schedule, real), plan)
    assert found.total / 1e9 == schedule.simulate(real).makespan - schedule.simulate(plan).makespan == 38 - 24
    assert in_seconds(found) == [-2, 24, 0, 0, 0, 0, -8]


def test_a_message_on_a_busy_channel_is_predicted_as_if_alone() -> None:
    schedule = build("gpipe", 2, 3)
    costs = Costs(boundary_bytes=4, gradient_bytes=0, bandwidth=1)
    found = lost(schedule, played(schedule, costs), costs)
    assert found.total == 0
    assert found.communication == -found.another_path


def test_several_chunks_and_clocks_of_several_hosts() -> None:
    schedule = looped(3, 2, 4, folded=True)
    real = Costs(forward=1.25, latency=0.5)
    found = lost(schedule, played(schedule, real, clocks=(0.0, 1e5, 3e6)), Costs())
    assert found.total / 1e9 == pytest.approx(schedule.simulate(real).makespan - schedule.simulate().makespan, abs=1e-7)


quarters = st.integers(0, 20).map(lambda n: n / 4)


@given(st.sampled_from(EVERY_KIND), quarters, quarters, quarters)
def test_the_total_is_the_step_less_the_prediction(
    schedule: Schedule, forward: float, latency: float, optimizer: float
) -> None:
    real = Costs(forward=forward, latency=latency)
    found = lost(schedule, played(schedule, real, data=0.5, optimizer=optimizer), Costs())
    assert found.total / 1e9 == schedule.simulate(real).makespan + 0.5 + optimizer - schedule.simulate().makespan
    assert found.another_path <= 0


@given(any_steps(), st.booleans())
def test_any_step_has_a_path(case: tuple[Schedule, list[list[Trace]]], known: bool) -> None:
    schedule, (before, now) = case
    found = lost(schedule, now, Costs(1e-3, 2e-3, 1e-3, 1e-3), before if known else None)
    assert found.another_path <= 0
    assert found.data >= 0
    assert found.driver >= 0
    assert found.optimizer >= 0
