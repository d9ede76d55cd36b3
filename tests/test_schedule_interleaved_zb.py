from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_schedules import extra, texts, torchs_order

from raypipe.schedule import build, interleaved_zb, zb_h1
from raypipe.schedule.interleaved import largest_round

stages_, microbatches_, chunks_ = st.integers(1, 8), st.integers(1, 24), st.integers(1, 4)


def test_the_picture() -> None:
    assert str(build("interleaved_zb", 2, 2)) == (
        "interleaved_zb: 2 stages, 4 chunks, 2 microbatches\n"
        "stage 0 |0F0 0F1 2F0 2F1 .   2I0 2W0 2I1 2W1 0I0 0W0 0I1 0W1\n"
        "stage 1 |.   1F0 1F1 3F0 3I0 3F1 3I1 3W0 1I0 3W1 1I1 1W0 1W1"
    )


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(
    ("stages", "microbatches"), [(1, 5), (2, 4), (2, 3), (3, 9), (4, 2), (4, 8), (4, 10), (5, 3), (8, 32)]
)
def test_the_order_is_torchs(stages: int, microbatches: int, chunks: int) -> None:
    expected = torchs_order("InterleavedZeroBubble", stages, microbatches, chunks)
    assert texts(interleaved_zb(stages, microbatches, chunks)) == expected


@given(stages=stages_, microbatches=microbatches_)
def test_of_one_chunk_it_is_zb_h1(stages: int, microbatches: int) -> None:
    assert interleaved_zb(stages, microbatches, 1) == zb_h1(stages, microbatches)


@given(stages=stages_, microbatches=microbatches_, chunks=chunks_)
def test_memory_is_the_closed_form_on_every_stage(stages: int, microbatches: int, chunks: int) -> None:
    found = build("interleaved_zb", stages, microbatches, chunks).simulate()
    lap = (chunks - 1) * largest_round(stages, microbatches)
    assert found.peak_in_flight == (min(chunks * microbatches, lap + stages),) * stages


@pytest.mark.parametrize(("stages", "microbatches", "makespan"), [(4, 8, 25.5), (8, 32, 99.5)])
def test_known_makespans(stages: int, microbatches: int, makespan: float) -> None:
    assert extra(build("interleaved_zb", stages, microbatches)) + 3 * microbatches == makespan


@given(
    stages=stages_,
    microbatches=microbatches_,
    chunks=chunks_,
    weight=st.integers(0, 8),
    forward=st.integers(0, 8),
    input=st.integers(0, 8),
)
def test_the_bubble_is_that_of_zb_h1_over_the_chunks(
    stages: int, microbatches: int, chunks: int, weight: int, forward: int, input: int
) -> None:
    forward, input = forward + weight, input + weight  # the weight gradient is the smallest
    found = extra(build("interleaved_zb", stages, microbatches + stages, chunks), forward, input, weight)
    assert found == pytest.approx((stages - 1) * (forward + input - weight) / chunks)
