from __future__ import annotations

import numpy as np
import pytest
from made_by_hand import mine
from made_up_traces import played

from raypipe.observe.events import Trace
from raypipe.observe.runs import Row, measured_runs, nanoseconds, planned_runs
from raypipe.schedule import Costs, build

ONE = mine("0F0 0B0", microbatches=1)


def one(*times: float, started: float = 0.0, ended: float = 9.0) -> Trace:
    return Trace(ONE.programs[0], np.array(times).reshape(2, 3), started, ended, 1)


def test_times_count_from_the_first_start() -> None:
    runs = measured_runs([one(12, 13, 14, 14.5, 15, 16, started=11, ended=18)])
    second = 10**9
    assert runs[0].rows == (
        Row(second, 2 * second, 3 * second),
        Row(3 * second + second // 2, 4 * second, 5 * second),
    )
    assert (runs[0].began, runs[0].ended, runs[0].gap) == (0, 7 * second, None)
    assert runs[0].span == 7 * second


def test_the_gap_is_that_to_the_step_before() -> None:
    schedule = build("1f1b", 2, 3)
    before, now = (played(schedule, Costs(), at=at, optimizer=1.0, clocks=(0.0, 5e5)) for at in (10.0, 26.0))
    # 12 seconds of actions and 1 of the optimizer: over at 23, 3 before the next one begins.
    runs = measured_runs(now, before)
    assert [run.gap for run in runs] == [nanoseconds(3)] * 2
    assert [run.span for run in runs] == [nanoseconds(16)] * 2
    assert [run.began for run in runs] == [0, 0]


def test_a_plan_begins_at_once_and_ends_together() -> None:
    schedule = build("gpipe", 2, 1)
    first, second = planned_runs(schedule.programs, schedule.simulate(Costs(forward=1e-9, backward=2e-9)))
    assert first.rows == (Row(0, 0, 1), Row(1, 4, 6))
    assert second.rows == (Row(0, 1, 2), Row(2, 2, 4))
    assert (first.began, first.ended, second.began, second.ended) == (0, 6, 0, 6)


def test_an_action_is_not_turned_to_before_the_last_one_ended() -> None:
    runs = measured_runs([one(0, 1, 2, 1.5, 3, 4)])
    assert runs[0].rows[1] == Row(nanoseconds(2), nanoseconds(3), nanoseconds(4))


@pytest.mark.parametrize(
    ("trace", "sentence"),
    [
        (one(1, 2, 1.5, 3, 4, 5), "the trace of stage 0 runs backwards at 0F0; give the times as the ranks wrote them"),
        (one(1, 2, 3, 3, 2.5, 5), "the trace of stage 0 runs backwards at 0B0"),
        (one(1, 2, 3, 3, 4, 5, started=2.5), "the trace of stage 0 runs backwards at 0F0"),
        (one(1, 2, 3, 3, 4, 5, ended=4.5), "the step of stage 0 ended before its last action"),
    ],
)
def test_times_that_run_backwards_are_refused(trace: Trace, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        measured_runs([trace])


def test_the_step_before_must_be_the_one_before() -> None:
    now = one(12, 13, 14, 14.5, 15, 16, started=11, ended=18)
    with pytest.raises(ValueError, match="on stage 0 the step before ended after this one had begun; give the traces"):
        measured_runs([now], [now])
    with pytest.raises(ValueError, match="the step before has 2 traces, but this one has 1; give as many"):
        measured_runs([now], [now, now])
