from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_schedules import extra, texts, torchs_order

from raypipe.schedule import Action, build, gpipe, looped_bfs

stages_, microbatches_, chunks_ = st.integers(1, 8), st.integers(1, 24), st.integers(1, 4)


def test_the_picture() -> None:
    assert str(build("looped_bfs", 2, 3)) == (
        "looped_bfs: 2 stages, 4 chunks, 3 microbatches\n"
        "stage 0 |0F0 0F1 0F2 2F0 2F1 2F2 .   .   2B0 2B1 2B2 0B0 0B1 0B2\n"
        "stage 1 |.   1F0 1F1 1F2 3F0 3F1 3F2 3B0 3B1 3B2 1B0 1B1 1B2 ."
    )


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 4), (2, 3), (4, 2), (4, 8), (5, 7)])
def test_the_order_is_torchs_with_backwards_in_microbatch_order(stages: int, microbatches: int, chunks: int) -> None:
    for ours, theirs in zip(
        texts(looped_bfs(stages, microbatches, chunks)),
        torchs_order("LoopedBFS", stages, microbatches, chunks),
        strict=True,
    ):
        half = chunks * microbatches
        assert ours[:half] == theirs[:half]
        runs = itertools.groupby(map(Action.parse, theirs[half:]), lambda action: action.chunk)
        assert ours[half:] == [str(action) for _, run in runs for action in reversed(list(run))]


@given(stages=stages_, microbatches=microbatches_)
def test_of_one_chunk_it_is_gpipe(stages: int, microbatches: int) -> None:
    assert looped_bfs(stages, microbatches, 1) == gpipe(stages, microbatches)


@given(stages=stages_, microbatches=microbatches_, chunks=chunks_)
def test_holds_everything_at_its_peak(stages: int, microbatches: int, chunks: int) -> None:
    found = build("looped_bfs", stages, microbatches, chunks).simulate()
    assert found.peak_in_flight == (chunks * microbatches,) * stages


@given(stages=stages_, microbatches=microbatches_, chunks=chunks_)
def test_the_bubble_is_gpipes_over_the_chunks(stages: int, microbatches: int, chunks: int) -> None:
    found = extra(build("looped_bfs", stages, microbatches + stages - 1, chunks))
    assert found == pytest.approx(3 * (stages - 1) / chunks)
