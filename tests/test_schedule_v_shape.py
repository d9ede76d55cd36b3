from __future__ import annotations

from raypipe.schedule.v_shape import chunk_of, program_of


def test_the_placement_is_a_v() -> None:
    assert [(chunk_of(0, stage, 3), chunk_of(1, stage, 3)) for stage in range(3)] == [(0, 5), (1, 4), (2, 3)]


def test_steps_count_their_microbatches_half_by_half() -> None:
    found = program_of(["F0", "F1", "F1", "I1", "F0", "B0", "W1", "B1", "I0", "W0"], 1, 2, 9)
    assert " ".join(map(str, found)) == "1F0 2F0 2F1 2I0 1F1 1B0 2W0 2B1 1I1 1W1"


def test_steps_of_microbatches_that_there_are_not_are_left_out() -> None:
    found = program_of(["F0", "F0", "F1", "F1", "B1", "I0", "B1", "I0", "W0", "W0"], 0, 1, 1)
    assert " ".join(map(str, found)) == "0F0 1F0 1B0 0I0 0W0"
