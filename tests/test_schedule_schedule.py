from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.schedule import Action, Op, Schedule, build, names
from raypipe.schedule.dry_run import given_by, needed_by

V = "0F0,0F1,3F0,3F1,3B0,3B1,0B0,0B1\n1F0,1F1,2F0,2F1,2B0,2B1,1B0,1B1"

schedules = st.builds(build, st.sampled_from(names()), st.integers(1, 10), st.integers(1, 10))


@given(schedules)
def test_the_order_runs_everything_and_never_waits(schedule: Schedule) -> None:
    order = schedule.order()
    for stage, program in enumerate(schedule.programs):
        assert tuple(action for at, action in order if at == stage) == program
    there = set()
    for _, action in order:
        assert needed_by(action, schedule.chunks) in there | {None}
        there.add(given_by(action))


def test_the_order_is_that_of_time_slots() -> None:
    assert " ".join(f"{stage}:{action}" for stage, action in build("1f1b", 2, 2).order()) == (
        "0:0F0 0:0F1 1:1F0 1:1B0 0:0B0 1:1F1 1:1B1 0:0B1"
    )


@given(schedules)
def test_survives_pickling_equal_and_with_the_same_hash(schedule: Schedule) -> None:
    schedule.placement  # noqa: B018  what is derived on the way must not make a difference
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    assert copy.placement == schedule.placement


def test_is_cheap_to_send() -> None:
    assert len(pickle.dumps(build("1f1b", 8, 32))) < 20 * 2 * 8 * 32 + 1000


def test_lists_become_tuples() -> None:
    rows = [[Action(0, Op.FORWARD, 0), Action(0, Op.BACKWARD, 0)]]
    schedule = Schedule("mine", rows, 1)  # type: ignore[arg-type]
    rows[0].clear()
    assert len(schedule.programs[0]) == 2
    assert hash(schedule) == hash(dataclasses.replace(schedule))


def test_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        build("gpipe", 2, 2).microbatches = 3  # type: ignore[misc]


def test_the_placement_is_that_of_the_programs() -> None:
    schedule = Schedule.from_csv(V)
    assert (schedule.stages, schedule.chunks) == (2, 4)
    assert schedule.placement == (0, 1, 1, 0)
    assert [schedule.stage_of(chunk) for chunk in range(4)] == [0, 1, 1, 0]


@pytest.mark.parametrize("chunk", [-1, 4])
def test_a_chunk_that_is_not_there_is_refused(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk is {chunk}, but the chunks of schedule 'csv' are 0 to 3"):
        Schedule.from_csv(V).stage_of(chunk)


def test_forwards_for_evaluation() -> None:
    schedule = build("1f1b", 3, 8).forwards(2)
    assert schedule.forward_only
    assert str(schedule) == (
        "1f1b forwards: 3 stages, 2 microbatches\n"
        "stage 0 |0F0 0F1 .   .\n"
        "stage 1 |.   1F0 1F1 .\n"
        "stage 2 |.   .   2F0 2F1"
    )


def test_forwards_of_several_chunks_keep_the_placement() -> None:
    schedule = Schedule.from_csv(V).forwards(3)
    assert schedule.placement == (0, 1, 1, 0)
    assert schedule.to_csv() == "0F0,0F1,3F0,3F1,0F2,3F2\n1F0,1F1,2F0,2F1,1F2,2F2\n"


@pytest.mark.parametrize(("microbatches", "error"), [(0, ValueError), (True, TypeError)])
def test_forwards_of_no_microbatches_are_refused(microbatches: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="microbatches is"):
        build("1f1b", 2, 2).forwards(microbatches)


def test_how_it_prints() -> None:
    assert repr(build("gpipe", 1, 1)) == "<Schedule gpipe: 1 stage, 1 microbatch>"
    assert repr(Schedule.from_csv(V)) == "<Schedule csv: 2 stages, 4 chunks, 2 microbatches>"
