from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from raypipe.schedule import Op, Schedule, build, one_f_one_b

sizes = st.integers(1, 12)


def test_the_picture() -> None:
    assert str(build("1f1b", 3, 4)) == (
        "1f1b: 3 stages, 4 microbatches\n"
        "stage 0 |0F0 0F1 0F2 .   .   0B0 0F3 0B1 .   0B2 .   0B3\n"
        "stage 1 |.   1F0 1F1 .   1B0 1F2 1B1 1F3 1B2 .   1B3 .\n"
        "stage 2 |.   .   2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 .   ."
    )


def test_the_picture_with_fewer_microbatches_than_stages() -> None:
    assert str(build("1f1b", 4, 2)) == (
        "1f1b: 4 stages, 2 microbatches\n"
        "stage 0 |0F0 0F1 .   .   .   .   .   0B0 .   0B1\n"
        "stage 1 |.   1F0 1F1 .   .   .   1B0 .   1B1 .\n"
        "stage 2 |.   .   2F0 2F1 .   2B0 .   2B1 .   .\n"
        "stage 3 |.   .   .   3F0 3B0 3F1 3B1 .   .   ."
    )


@given(stages=sizes, microbatches=sizes)
def test_the_closed_form(stages: int, microbatches: int) -> None:
    for stage, program in enumerate(one_f_one_b(stages, microbatches)):
        warmup = min(microbatches, stages - stage - 1)
        steady = microbatches - warmup
        assert "".join(action.op.value for action in program) == "F" * warmup + "FB" * steady + "B" * warmup
        for op in (Op.FORWARD, Op.BACKWARD):
            assert [a.microbatch for a in program if a.op is op] == list(range(microbatches))


@given(stages=sizes, microbatches=sizes)
def test_memory_is_bounded_by_the_stages_behind(stages: int, microbatches: int) -> None:
    found = Schedule("1f1b", one_f_one_b(stages, microbatches), microbatches).simulate()
    assert found.peak_in_flight == tuple(min(microbatches, stages - stage) for stage in range(stages))


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 8), (8, 32)])
def test_all_but_the_last_stage_are_torchs(stages: int, microbatches: int) -> None:
    # torch's own order is wrong on its last rank, so the closed form above is the oracle there.
    theirs = get_schedule_ops("1F1B", stages, microbatches)
    expected = [[str(a) for a in rank if a is not None and a.is_compute_op] for rank in theirs]
    ours = [[str(a) for a in program] for program in one_f_one_b(stages, microbatches)]
    assert ours[:-1] == expected[:-1]
