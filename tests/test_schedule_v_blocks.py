from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch_schedules import extra

from raypipe.schedule import build

stages_, microbatches_ = st.integers(1, 8), st.integers(1, 24)


def most(name: str, stages: int) -> int:
    """The paper's activation memory in whole stages, (p+2)/2 and (p+4)/3 rounded down, as chunks."""
    return 2 * ((stages + 2) // 2) if name == "v_half" else 2 * ((stages + 4) // 3)


def test_the_picture_of_v_half() -> None:
    assert str(build("v_half", 2, 3)) == (
        "v_half: 2 stages, 4 chunks, 3 microbatches\n"
        "stage 0 |0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 0I0 0W0 3W1 3F2 3I2 3W2 0I1 0W1 .   .   0I2 0W2\n"
        "stage 1 |.   1F0 2F0 1F1 2F1 2I0 2W0 1I0 1W0 1F2 2F2 2I1 2W1 1I1 1W1 2I2 2W2 1I2 1W2 ."
    )


def test_the_picture_of_v_min() -> None:
    assert str(build("v_min", 3, 3)) == (
        "v_min: 3 stages, 6 chunks, 3 microbatches\n"
        "stage 0 |0F0 0F1 0F2 .   .   5F0 5I0 5W0 5F1 5I1 5W1 0I0 0W0 .   .   5F2 5I2 0I1 0W1 5W2 .   .   0I2 0W2\n"
        "stage 1 |.   1F0 1F1 .   4F0 .   4F1 4I0 4W0 1F2 1I0 1W0 4I1 4W1 4F2 .   1I1 1W1 4I2 4W2 .   1I2 1W2 .\n"
        "stage 2 |.   .   2F0 3F0 2F1 3F1 .   .   3I0 2I0 3W0 2W0 2F2 3F2 3I1 2I1 3W1 2W1 .   3I2 2I2 3W2 2W2 ."
    )


@pytest.mark.parametrize("name", ["v_half", "v_min"])
@given(stages=stages_, microbatches=microbatches_)
def test_memory_is_bounded_by_the_papers_form(name: str, stages: int, microbatches: int) -> None:
    peaks = build(name, stages, microbatches).simulate().peak_in_flight
    assert max(peaks) <= min(2 * microbatches, most(name, stages))
    assert max(build(name, stages, microbatches + stages).simulate().peak_in_flight) == most(name, stages)


@pytest.mark.parametrize(("stages", "half", "third"), [(4, 3, 2), (8, 5, 4), (12, 7, 5), (16, 9, 6), (32, 17, 12)])
def test_memory_in_whole_stages(stages: int, half: int, third: int) -> None:
    """1F1B's first stage holds as many as there are stages."""
    for name, expected in (("v_half", half), ("v_min", third)):
        assert max(build(name, stages, 2 * stages).simulate().peak_in_flight) / 2 == expected


@given(stages=stages_, microbatches=microbatches_)
def test_the_bubble_of_v_half(stages: int, microbatches: int) -> None:
    found = extra(build("v_half", stages, microbatches + stages - 1))
    assert found == (7 * (stages - 1) / 4 if stages % 2 else (7 * stages - 10) / 4)


@given(stages=st.integers(2, 8), microbatches=microbatches_)
def test_the_bubble_of_v_min(stages: int, microbatches: int) -> None:
    found = extra(build("v_min", stages, microbatches + stages - 1))
    assert (stages - 1) / 2 <= found <= 2 * stages - 5 / 2


@pytest.mark.parametrize("name", ["v_half", "v_min"])
def test_alone_there_is_no_bubble(name: str) -> None:
    assert extra(build(name, 1, 5)) == 0


@pytest.mark.parametrize("stages", [4, 7, 8])
def test_less_memory_than_zbv_and_less_time_than_1f1b(stages: int) -> None:
    by_name = {name: build(name, stages, 3 * stages) for name in ("1f1b", "v_half", "v_min", "zbv")}
    held = {
        name: max(schedule.simulate().peak_in_flight) / (schedule.chunks / stages) for name, schedule in by_name.items()
    }
    assert held["v_min"] < held["v_half"] < held["zbv"] == held["1f1b"]
    taken = {name: extra(schedule) for name, schedule in by_name.items()}
    assert taken["zbv"] < taken["v_half"] < taken["v_min"] < taken["1f1b"]


def test_the_steady_state_of_v_min_has_no_gaps_where_all_costs_are_equal() -> None:
    assert len({extra(build("v_min", 5, microbatches)) for microbatches in range(5, 30)}) == 1


@given(stages=stages_, forward=st.integers(1, 12), input=st.integers(1, 12), weight=st.integers(1, 12))
def test_the_steady_state_of_v_half_has_no_gaps_under_the_papers_condition(
    stages: int, forward: int, input: int, weight: int
) -> None:
    assume(weight + 2 * forward >= 2 * input and weight + 2 * input >= 2 * forward)
    few, many = (extra(build("v_half", stages, m), forward, input, weight) for m in (3 * stages + 6, 3 * stages + 12))
    assert few == many
