from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_by_hand import EVERY_KIND, mine
from made_up_traces import any_steps, played

from raypipe.observe.causes import Cause, Times, attribute
from raypipe.observe.events import Trace
from raypipe.observe.runs import Run, measured_runs, nanoseconds, planned_runs
from raypipe.schedule import Costs, Schedule, build

PIPE = mine("0F0 0B0", "1F0 1B0", "2F0 2B0", microbatches=1)


def seconds(times: Times) -> dict[str, float]:
    """What is not zero."""
    return {str(Cause(place)): time / 1e9 for place, time in enumerate(times) if time}


def found(schedule: Schedule, traces: list[Trace], costs: Costs, before: list[Trace] | None = None) -> list[Times]:
    expected = attribute(schedule, planned_runs(schedule.programs, schedule.simulate(costs)))
    return list(attribute(schedule, measured_runs(traces, before), expected.inherent).times)


def moved(trace: Trace, by: float, first: int = 0) -> Trace:
    """The trace with the actions from ``first`` on later."""
    times = trace.times.copy()
    times[first:] += by
    return replace(trace, times=times, ended=trace.ended + by)


def test_a_step_that_goes_as_planned_has_compute_and_dependency() -> None:
    times = found(PIPE, played(PIPE, Costs()), Costs())
    assert [seconds(of_stage) for of_stage in times] == [{"compute": 3, "dependency": 6}] * 3


def test_what_is_before_and_after_the_actions() -> None:
    before, now = played(PIPE, Costs(), at=100.0, optimizer=1.0), played(PIPE, Costs(), at=112.5, data=0.5, optimizer=2)
    expected = {"compute": 3, "dependency": 6, "data": 0.5, "driver": 2.5, "optimizer": 2}
    assert [seconds(of_stage) for of_stage in found(PIPE, now, Costs(), before)] == [expected] * 3


def test_messages_are_communication_on_every_stage_that_waits_for_them() -> None:
    # Each of four messages takes half a second; the prediction has none. No stage was slow.
    times = found(PIPE, played(PIPE, Costs(latency=0.5)), Costs())
    assert [seconds(of_stage) for of_stage in times] == [
        {"compute": 3, "dependency": 6, "exposed communication": 2}
    ] * 3


def test_predicted_messages_are_communication_too() -> None:
    times = found(PIPE, played(PIPE, Costs(latency=0.5)), Costs(latency=0.5))
    assert seconds(times[1]) == {"compute": 3, "dependency": 6, "exposed communication": 2}


def test_a_slow_stage_makes_the_others_wait_for_a_straggler() -> None:
    slow = Costs(forward=(1.0, 1.75, 1.0))
    times = found(PIPE, played(PIPE, slow), Costs())
    assert [seconds(of_stage) for of_stage in times] == [
        {"compute": 3, "dependency": 6, "straggler": 0.75},
        {"compute": 3.75, "dependency": 6},
        {"compute": 3, "dependency": 6, "straggler": 0.75},
    ]


def test_who_waits_for_a_stage_that_waits_for_its_batch_waits_for_data() -> None:
    # Stage 0 prepares its batch for 2 seconds, the others at once.
    costs = Costs()
    traces = played(PIPE, costs)
    first, second, third = (moved(trace, 2.0) for trace in traces)
    late = [first]
    for trace in (second, third):
        times = trace.times.copy()
        times[0, 0] -= 2.0  # it has turned to its first action already
        late.append(replace(trace, times=times))
    assert [seconds(of_stage) for of_stage in found(PIPE, late, costs)] == [
        {"compute": 3, "dependency": 6, "data": 2}
    ] * 3


def test_who_waits_for_a_stage_that_was_not_called_yet_waits_for_the_driver() -> None:
    before = played(PIPE, Costs(), at=100.0)
    now = [moved(trace, 2.0) for trace in played(PIPE, Costs(), at=109.0)]
    now[0] = replace(now[0], started=111.0)
    for trace in now[1:]:
        trace.times[0, 0] -= 2.0
    times = found(PIPE, now, Costs(), before)
    assert [seconds(of_stage) for of_stage in times] == [{"compute": 3, "dependency": 6, "driver": 2}] * 3


def test_sending_is_communication() -> None:
    trace = Trace(build("gpipe", 1, 1).programs[0], np.array([[0.0, 0.25, 1.0], [1.5, 1.5, 3.0]]), 0.0, 3.0, 1)
    times = found(build("gpipe", 1, 1), [trace], Costs())
    assert seconds(times[0]) == {"compute": 2.25, "exposed communication": 0.75}


def test_without_a_common_end_the_last_wait_moves_to_the_next_step() -> None:
    # Stage 1 is through after 1B0, at 4, and waits from then on for stage 0, which is still in its step until 6.
    pipe = build("gpipe", 2, 1)
    before = played(pipe, Costs(), at=100.0)
    now = played(pipe, Costs(), at=106.0)
    before[1] = replace(before[1], ended=104.0)
    times = now[1].times.copy()
    times[0, 0] = 104.0
    now[1] = replace(now[1], times=times, started=104.0, ended=110.0)
    assert [seconds(of_stage) for of_stage in found(pipe, now, Costs(), before)] == [
        {"compute": 3, "dependency": 3},
        {"compute": 3, "dependency": 3},
    ]


def test_who_waits_for_a_stage_in_its_step_before() -> None:
    # As above, but stage 0's step before takes 1.5 seconds longer, its optimizer's: nobody predicted that.
    pipe = build("gpipe", 2, 1)
    before = played(pipe, Costs(), at=100.0)
    before = [replace(before[0], ended=107.5), replace(before[1], ended=104.0)]
    now = played(pipe, Costs(), at=107.5)
    times = now[1].times.copy()
    times[0, 0] = 104.0
    now[1] = replace(now[1], times=times, started=104.0, ended=112.0)
    expected = {"compute": 3, "dependency": 3}
    assert seconds(found(pipe, now, Costs(), before)[1]) == {**expected, "straggler": 1.5, "optimizer": 0.5}
    # Without that step nobody knows what stage 0 did before it began this one.
    assert seconds(found(pipe, now, Costs())[1]) == {**expected, "driver": 1.5, "optimizer": 0.5}


def test_the_optimizer_of_a_stage_that_is_through_early_is_its_own() -> None:
    pipe = build("gpipe", 2, 1)
    traces = played(pipe, Costs(), optimizer=0.5)
    traces[1] = replace(traces[1], ended=traces[1].times[-1, 2] + 0.5)
    assert seconds(found(pipe, traces, Costs())[1]) == {"compute": 3, "dependency": 1, "optimizer": 0.5}


def test_a_prediction_is_its_makespan_on_every_stage() -> None:
    schedule = build("1f1b", 4, 8)
    plan = attribute(schedule, planned_runs(schedule.programs, schedule.simulate(Costs(latency=0.25))))
    makespan = nanoseconds(schedule.simulate(Costs(latency=0.25)).makespan)
    assert [sum(times) for times in plan.times] == [makespan] * 4
    assert all(times.communication > 0 and not times.straggler for times in plan.times)


quarters = st.integers(0, 20).map(lambda n: n / 4)


@given(st.sampled_from(EVERY_KIND), quarters, quarters, quarters)
def test_what_goes_as_predicted_has_no_straggler(
    schedule: Schedule, forward: float, backward: float, latency: float
) -> None:
    costs = Costs(forward=forward, backward=backward, latency=latency)
    plan = attribute(schedule, planned_runs(schedule.programs, schedule.simulate(costs)))
    assert found(schedule, played(schedule, costs, at=64.0), costs) == list(plan.times)
    assert all(not times.straggler for times in plan.times)


@given(any_steps(), st.booleans())
def test_the_causes_of_any_step_add_up_exactly(case: tuple[Schedule, list[list[Trace]]], known: bool) -> None:
    schedule, (before, now) = case
    runs = measured_runs(now, before if known else None)
    expected = attribute(schedule, planned_runs(schedule.programs, schedule.simulate(Costs(1e-3, 2e-3, 1e-3, 1e-3))))
    times = attribute(schedule, runs, expected.inherent).times
    assert [sum(of_stage) for of_stage in times] == [run.span for run in runs]
    assert all(part >= 0 for of_stage in times for part in of_stage)
    assert [of_stage.compute for of_stage in times] == [computed(run) for run in runs]


def computed(run: Run) -> int:
    return sum(row.end - row.start for row in run.rows)


@pytest.mark.parametrize("cause", Cause)
def test_a_cause_is_named_as_its_place(cause: Cause) -> None:
    assert Times._fields[cause] == cause.name.lower()
