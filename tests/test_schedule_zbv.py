from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_schedules import extra, idle_between, texts, torchs_order

from raypipe.schedule import build, zbv

stages_, microbatches_ = st.integers(1, 8), st.integers(1, 24)


def test_the_picture() -> None:
    assert str(build("zbv", 2, 3)) == (
        "zbv: 2 stages, 4 chunks, 3 microbatches\n"
        "stage 0 |0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2 .\n"
        "stage 1 |.   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2"
    )


@pytest.mark.parametrize(
    ("stages", "microbatches"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 4), (4, 4), (4, 8), (5, 20), (8, 32)]
)
def test_the_order_is_torchs(stages: int, microbatches: int) -> None:
    assert texts(zbv(stages, microbatches)) == torchs_order("ZBVZeroBubble", stages, microbatches)


@given(stages=stages_, microbatches=microbatches_)
def test_memory_is_that_of_1f1b(stages: int, microbatches: int) -> None:
    peaks = build("zbv", stages, microbatches).simulate().peak_in_flight
    assert max(peaks) <= min(2 * microbatches, 2 * stages)
    enough = build("zbv", stages, microbatches + 2 * stages - 2)
    assert enough.simulate().peak_in_flight == (2 * stages,) * stages


@pytest.mark.parametrize(("stages", "microbatches", "makespan"), [(4, 8, 25.5), (8, 32, 99.5)])
def test_known_makespans(stages: int, microbatches: int, makespan: float) -> None:
    assert extra(build("zbv", stages, microbatches)) + 3 * microbatches == makespan


@given(stages=stages_, microbatches=microbatches_)
def test_no_stage_idles_where_all_costs_are_equal(stages: int, microbatches: int) -> None:
    schedule = build("zbv", stages, microbatches + 2 * stages - 2)
    assert idle_between(schedule) == 0
    assert extra(schedule) == (stages - 1) / 2


def test_the_loss_is_on_the_first_stage() -> None:
    assert build("zbv", 3, 4).placement == (0, 1, 2, 2, 1, 0)
