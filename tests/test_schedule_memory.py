from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_by_hand import EVERY_KIND, mine

from raypipe.schedule import Op, Schedule, build
from raypipe.schedule.memory import peak_bytes, peak_bytes_again, peak_in_flight

quarters = st.integers(0, 400).map(lambda n: n / 4)


def test_known_peaks() -> None:
    assert peak_in_flight(build("gpipe", 3, 5).programs) == (5, 5, 5)
    assert peak_in_flight(build("1f1b", 3, 5).programs) == (3, 2, 1)
    assert peak_bytes(build("1f1b", 3, 5).programs, (10.0, 20.0, 40.0)) == (30.0, 40.0, 40.0)


def test_chunks_of_one_stage_add_up() -> None:
    schedule = mine("0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1", microbatches=2)
    assert peak_in_flight(schedule.programs) == (4,)
    assert peak_bytes(schedule.programs, (1.0, 10.0)) == (22.0,)


@pytest.mark.parametrize(("share", "peak"), [(0.0, 30.0), (0.5, 20.0), (1.0, 10.0)])
def test_the_input_gradient_gives_its_share_back(share: float, peak: float) -> None:
    schedule = mine("0F0 0I0 0F1 0I1 0F2 0I2 0W0 0W1 0W2", microbatches=3)
    assert peak_bytes(schedule.programs, (10.0,), share) == (peak,)


def test_what_runs_again_comes_on_top_while_it_does() -> None:
    """A whole backward needs one unit's at a time; one in halves keeps all of them for W."""
    whole = mine("0F0 0F1 0B0 0F2 0B1 0B2", microbatches=3).programs
    assert peak_bytes_again(whole, (10.0,), (4.0,), (9.0,)) == (24.0,)
    halves = mine("0F0 0F1 0I0 0I1 0F2 0W0 0W1 0I2 0W2", microbatches=3).programs
    assert peak_bytes_again(halves, (10.0,), (4.0,), (9.0,)) == (48.0,)
    chunks = mine("0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1", microbatches=2).programs
    assert peak_bytes_again(chunks, (1.0, 10.0), (30.0, 4.0), (0.0, 0.0)) == (42.0,)
    assert peak_bytes_again(
        mine("0F0 1F0 1B0 0B0", microbatches=1).forwards(4).programs, (3.0, 5.0), (9.0,) * 2, (9.0,) * 2
    ) == (5.0,)


@given(st.sampled_from(EVERY_KIND), st.data())
def test_nothing_that_runs_again_changes_nothing(schedule: Schedule, data: st.DataObject) -> None:
    kept = data.draw(st.lists(quarters, min_size=schedule.chunks, max_size=schedule.chunks))
    nothing = [0.0] * schedule.chunks
    assert peak_bytes_again(schedule.programs, kept, nothing, nothing) == peak_bytes(schedule.programs, kept)


def test_forward_only_keeps_one_at_a_time() -> None:
    forwards = mine("0F0 1F0 1B0 0B0", microbatches=1).forwards(4)
    assert peak_bytes(forwards.programs, (3.0, 5.0)) == (5.0,)
    assert peak_in_flight(forwards.programs) == (1,)


@given(st.sampled_from(EVERY_KIND), st.data(), st.sampled_from([0.0, 0.25, 1.0]))
def test_the_peak_is_that_of_every_moment(schedule: Schedule, data: st.DataObject, share: float) -> None:
    kept = data.draw(st.lists(quarters, min_size=schedule.chunks, max_size=schedule.chunks))
    expected, counts = [], []
    for program in schedule.programs:
        moments, numbers = [], []
        for now, action in enumerate(program):
            done = set(program[: now + (schedule.forward_only)])
            held = {} if not schedule.forward_only else {(action.chunk, action.microbatch): 1.0}
            for other in program[: now + 1] if not schedule.forward_only else ():
                if other.op is Op.FORWARD:
                    held[other.chunk, other.microbatch] = 1.0
            for other in done if not schedule.forward_only else ():
                place = other.chunk, other.microbatch
                if other.op is Op.INPUT and place in held:
                    held[place] -= share
            for other in done if not schedule.forward_only else ():
                if other.op in (Op.BACKWARD, Op.WEIGHT):
                    del held[other.chunk, other.microbatch]
            moments.append(sum(part * kept[chunk] for (chunk, _), part in held.items()))
            numbers.append(len(held))
        expected.append(max(moments))
        counts.append(max(numbers))
    assert peak_bytes(schedule.programs, kept, share) == pytest.approx(tuple(expected))
    assert peak_in_flight(schedule.programs) == tuple(counts)
