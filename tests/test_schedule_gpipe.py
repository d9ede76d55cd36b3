from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from raypipe.schedule import Op, Schedule, build, gpipe

sizes = st.integers(1, 12)


def test_the_picture() -> None:
    assert str(build("gpipe", 3, 4)) == (
        "gpipe: 3 stages, 4 microbatches\n"
        "stage 0 |0F0 0F1 0F2 0F3 .   .   .   .   0B0 0B1 0B2 0B3\n"
        "stage 1 |.   1F0 1F1 1F2 1F3 .   .   1B0 1B1 1B2 1B3 .\n"
        "stage 2 |.   .   2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3 .   ."
    )


@given(stages=sizes, microbatches=sizes)
def test_the_order_is_torchs(stages: int, microbatches: int) -> None:
    theirs = get_schedule_ops("GPipe", stages, microbatches)
    expected = [[str(a) for a in rank if a is not None and a.is_compute_op] for rank in theirs]
    assert [[str(a) for a in program] for program in gpipe(stages, microbatches)] == expected


@given(stages=sizes, microbatches=sizes)
def test_holds_every_microbatch_at_its_peak(stages: int, microbatches: int) -> None:
    found = Schedule("gpipe", gpipe(stages, microbatches), microbatches).simulate()
    assert found.peak_in_flight == (microbatches,) * stages


def test_all_forwards_come_first() -> None:
    for program in gpipe(3, 5):
        assert [action.op for action in program] == [Op.FORWARD] * 5 + [Op.BACKWARD] * 5
