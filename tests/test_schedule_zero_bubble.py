from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_schedules import extra, idle_between

from raypipe.schedule import build

stages_, microbatches_, costs = st.integers(1, 8), st.integers(1, 24), st.integers(0, 8)


def test_the_picture_of_zb_h1() -> None:
    assert str(build("zb_h1", 3, 4)) == (
        "zb_h1: 3 stages, 4 microbatches\n"
        "stage 0 |0F0 0F1 0F2 .   .   0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3\n"
        "stage 1 |.   1F0 1F1 .   1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3\n"
        "stage 2 |.   .   2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3"
    )


def test_the_picture_of_zb_h2_is_a_parallelogram() -> None:
    assert str(build("zb_h2", 3, 6)) == (
        "zb_h2: 3 stages, 6 microbatches\n"
        "stage 0 |0F0 0F1 0F2 0F3 0F4 0I0 0W0 0F5 0I1 0W1 0I2 0W2 0I3 0W3 0I4 0W4 0I5 0W5 .   .\n"
        "stage 1 |.   1F0 1F1 1F2 1I0 1F3 1I1 1F4 1I2 1W0 1F5 1I3 1W1 1I4 1W2 1I5 1W3 1W4 1W5 .\n"
        "stage 2 |.   .   2F0 2I0 2F1 2I1 2F2 2I2 2F3 2I3 2F4 2I4 2W0 2F5 2I5 2W1 2W2 2W3 2W4 2W5"
    )


@given(stages=stages_, microbatches=microbatches_)
def test_memory_is_the_closed_form_on_every_stage(stages: int, microbatches: int) -> None:
    for name, most in (("zb_h1", stages), ("zb_h2", 2 * stages - 1)):
        found = build(name, stages, microbatches).simulate()
        assert found.peak_in_flight == (min(microbatches, most),) * stages


@given(stages=stages_, microbatches=microbatches_, weight=costs, forward=costs, input=costs)
def test_the_bubble_of_zb_h1(stages: int, microbatches: int, weight: int, forward: int, input: int) -> None:
    forward, input = forward + weight, input + weight  # the weight gradient is the smallest
    found = extra(build("zb_h1", stages, microbatches + stages - 1), forward, input, weight)
    assert found == (stages - 1) * (forward + input - weight)


@given(stages=stages_, microbatches=microbatches_, weight=costs, forward=costs, input=costs)
def test_the_bubble_of_zb_h2(stages: int, microbatches: int, weight: int, forward: int, input: int) -> None:
    forward, input = forward + weight, input + weight
    schedule = build("zb_h2", stages, microbatches + 2 * stages - 2)
    assert idle_between(schedule, forward, input, weight) <= (stages - 1) * (forward + input - 2 * weight)
    assert extra(schedule, forward, input, weight) <= (stages - 1) * (2 * forward + input - 2 * weight)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 3), (4, 8), (8, 32)])
def test_zb_h2_idles_nowhere_where_all_costs_are_equal(stages: int, microbatches: int) -> None:
    schedule = build("zb_h2", stages, microbatches)
    assert idle_between(schedule) == 0
    assert extra(schedule) == stages - 1  # the last stage starts so much later than the first
    assert idle_between(build("zb_h1", stages, microbatches)) == stages - 1
    assert idle_between(build("1f1b", stages, microbatches)) == 3 * (stages - 1)


@given(stages=st.integers(2, 8), microbatches=microbatches_)
def test_each_stage_is_ahead_of_the_next_by_the_hops(stages: int, microbatches: int) -> None:
    """Forwards before the first input gradient: 1F1B's in ZB-H1, as many as there is time for in ZB-H2."""
    for name, hop in (("zb_h1", 1), ("zb_h2", 2)):
        programs = build(name, stages, microbatches + 2 * stages).programs
        ahead = ["".join(action.op.value for action in program).index("I") for program in programs]
        assert ahead == [1 + hop * (stages - 1 - stage) for stage in range(stages)]
