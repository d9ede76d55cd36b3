from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raypipe.schedule import Action, Op, Schedule
from raypipe.schedule.weight_gradients import weights_behind


def program(count: int, num_warmup: int, behind: int) -> tuple[Action, ...]:
    forwards = [Action(0, Op.FORWARD, number) for number in range(count)]
    inputs = [Action(0, Op.INPUT, number) for number in range(count)]
    return weights_behind(forwards, inputs, num_warmup, behind)


def test_weight_gradients_follow_at_a_distance() -> None:
    assert " ".join(map(str, program(4, 2, 1))) == "0F0 0F1 0I0 0F2 0I1 0W0 0F3 0I2 0W1 0I3 0W2 0W3"


def test_none_behind_is_a_whole_backward_in_two() -> None:
    assert " ".join(map(str, program(3, 1, 0))) == "0F0 0I0 0W0 0F1 0I1 0W1 0F2 0I2 0W2"


@given(count=st.integers(1, 20), num_warmup=st.integers(1, 30), behind=st.integers(0, 30))
def test_all_is_computed_and_as_much_is_in_flight_as_is_said(count: int, num_warmup: int, behind: int) -> None:
    schedule = Schedule("alone", (program(count, num_warmup, behind),), count)
    assert schedule.simulate().peak_in_flight == (min(count, num_warmup + behind),)
    assert len(schedule.programs[0]) == 3 * count
