from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_schedules import extra, texts, torchs_order

from raypipe.schedule import Op, build, dualpipev

stages_, microbatches_ = st.integers(1, 8), st.integers(1, 24)


def test_the_picture() -> None:
    assert str(build("dualpipev", 2, 4)) == (
        "dualpipev: 2 stages, 4 chunks, 4 microbatches\n"
        "stage 0 |0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3\n"
        "stage 1 |.   1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3"
    )


@pytest.mark.parametrize(
    ("stages", "microbatches"), [(1, 2), (1, 5), (2, 4), (3, 6), (4, 8), (4, 11), (5, 20), (8, 32)]
)
def test_the_order_is_torchs(stages: int, microbatches: int) -> None:
    assert texts(dualpipev(stages, microbatches)) == torchs_order("DualPipeV", stages, microbatches)


@given(stages=stages_, microbatches=microbatches_)
def test_memory_is_one_chunk_more_than_1f1bs(stages: int, microbatches: int) -> None:
    peaks = build("dualpipev", stages, microbatches).simulate().peak_in_flight
    assert max(peaks) <= min(2 * microbatches, 2 * stages + 1)
    enough = build("dualpipev", stages, microbatches + 2 * stages)
    assert enough.simulate().peak_in_flight == (2 * stages + 1,) * stages


@given(stages=stages_, microbatches=microbatches_)
def test_one_after_the_other_it_takes_as_long_as_interleaved_zero_bubble(stages: int, microbatches: int) -> None:
    assert extra(build("dualpipev", stages, microbatches + 2 * stages - 1)) == (stages - 1) / 2


@given(stages=stages_, microbatches=microbatches_)
def test_backwards_are_split_only_where_another_stage_waits(stages: int, microbatches: int) -> None:
    """As many on every stage, and never beside a forward that overlaps: the steady state is pairs F, B."""
    for stage, program in enumerate(dualpipev(stages, microbatches + 2 * stages)):
        ops = "".join(action.op.value for action in program)
        assert ops.count("I") == ops.count("W") == stages - 1 - stage + stages
        assert ops.count("FBFB") >= microbatches // 2
        assert sum(action.op is Op.BACKWARD for action in program) == 2 * (microbatches + 2 * stages) - ops.count("I")
