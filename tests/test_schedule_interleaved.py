from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_schedules import extra, texts, torchs_order

from raypipe.schedule import Op, Schedule, build, interleaved_1f1b, one_f_one_b
from raypipe.schedule.interleaved import largest_round, turns

stages_, microbatches_, chunks_ = st.integers(1, 8), st.integers(1, 24), st.integers(1, 4)


def test_the_picture() -> None:
    assert str(build("interleaved_1f1b", 2, 4)) == (
        "interleaved_1f1b: 2 stages, 4 chunks, 4 microbatches\n"
        "stage 0 |0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 .   2B2 .   2B3 0B2 0B3\n"
        "stage 1 |.   1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3 ."
    )


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(
    ("stages", "microbatches"), [(1, 5), (2, 4), (2, 3), (3, 9), (4, 2), (4, 8), (4, 10), (5, 3), (8, 32)]
)
def test_the_order_is_torchs(stages: int, microbatches: int, chunks: int) -> None:
    expected = torchs_order("Interleaved1F1B", stages, microbatches, chunks)
    assert texts(interleaved_1f1b(stages, microbatches, chunks)) == expected


@given(stages=stages_, microbatches=microbatches_)
def test_of_one_chunk_it_is_1f1b(stages: int, microbatches: int) -> None:
    assert interleaved_1f1b(stages, microbatches, 1) == one_f_one_b(stages, microbatches)


@given(stages=stages_, microbatches=microbatches_, chunks=st.integers(2, 4))
def test_memory_is_the_closed_form(stages: int, microbatches: int, chunks: int) -> None:
    found = build("interleaved_1f1b", stages, microbatches, chunks).simulate()
    lap = (chunks - 1) * largest_round(stages, microbatches)
    assert found.peak_in_flight == tuple(
        min(chunks * microbatches, lap + 2 * (stages - 1 - stage) + 1) for stage in range(stages)
    )


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), [(4, 8, 2), (8, 32, 2), (4, 8, 4), (3, 6, 3)])
def test_the_first_stage_holds_a_little_more_than_1f1b(stages: int, microbatches: int, chunks: int) -> None:
    found = build("interleaved_1f1b", stages, microbatches, chunks).simulate()
    assert found.peak_in_flight[0] / chunks == pytest.approx(stages + (stages - 1) / chunks)


@pytest.mark.parametrize(("stages", "microbatches", "makespan"), [(4, 8, 28.5), (8, 32, 106.5)])
def test_known_makespans(stages: int, microbatches: int, makespan: float) -> None:
    assert extra(build("interleaved_1f1b", stages, microbatches)) + 3 * microbatches == makespan


@given(
    stages=stages_,
    microbatches=microbatches_,
    chunks=chunks_,
    forward=st.integers(1, 8),
    backward=st.integers(1, 8),
)
def test_the_bubble_is_that_of_1f1b_over_the_chunks(
    stages: int, microbatches: int, chunks: int, forward: int, backward: int
) -> None:
    microbatches += stages  # a filled pipeline, whether or not the stages divide it
    found = extra(build("interleaved_1f1b", stages, microbatches, chunks), forward, backward, 0)
    assert found == pytest.approx((stages - 1) * (forward + backward) / chunks)


def test_rounds_differ_by_one_and_are_no_smaller_than_the_stages() -> None:
    rounds = [action.microbatch for action in turns(1, 4, 11, 2, Op.INPUT)]
    assert rounds == [*range(6), *range(6), *range(6, 11), *range(6, 11)]
    assert largest_round(4, 11) == 6
    assert largest_round(4, 3) == 3


def test_turns_take_the_chunks_forwards_and_backwards() -> None:
    assert [str(action) for action in turns(1, 2, 2, 2, Op.FORWARD)] == ["1F0", "1F1", "3F0", "3F1"]
    assert [str(action) for action in turns(1, 2, 2, 2, Op.BACKWARD)] == ["3B0", "3B1", "1B0", "1B1"]


def test_any_number_of_microbatches_is_a_schedule() -> None:
    assert Schedule("uneven", interleaved_1f1b(4, 7, 3), 7).placement == (0, 1, 2, 3) * 3
