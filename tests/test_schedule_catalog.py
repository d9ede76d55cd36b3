from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_schedules import accepted_by_torch, extra, whole

from raypipe.schedule import Op, Schedule, build, chunks_of, names

ONE_CHUNK = ("1f1b", "gpipe", "zb_h1", "zb_h2")
IN_A_V = ("dualpipev", "v_half", "v_min", "zbv")
ANY_CHUNKS = ("interleaved_1f1b", "interleaved_zb", "looped_bfs")

stages_, microbatches_, chunks_ = st.integers(1, 8), st.integers(1, 24), st.integers(1, 4)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(names()))
    return build(name, draw(stages_), draw(microbatches_), draw(chunks_) if name in ANY_CHUNKS else None)


def test_the_names() -> None:
    assert names() == tuple(sorted((*ONE_CHUNK, *IN_A_V, *ANY_CHUNKS)))


@pytest.mark.parametrize("name", names())
def test_builds_each_name(name: str) -> None:
    held = 1 if name in ONE_CHUNK else 2
    for built in (build(name, 3, 5), build(name, 3, 5, held)):
        assert (built.name, built.stages, built.chunks, built.microbatches) == (name, 3, 3 * held, 5)
    assert chunks_of(name) == chunks_of(name, held) == held


@pytest.mark.parametrize("name", ANY_CHUNKS)
@pytest.mark.parametrize("chunks", [1, 3, 4])
def test_interleaved_ones_hold_any_number_of_chunks(name: str, chunks: int) -> None:
    assert build(name, 2, 5, chunks).placement == (0, 1) * chunks
    assert chunks_of(name, chunks) == chunks


@pytest.mark.parametrize("name", IN_A_V)
def test_those_in_a_v_lead_down_the_stages_and_up(name: str) -> None:
    assert build(name, 3, 4).placement == (0, 1, 2, 2, 1, 0)


@given(schedules())
def test_all_is_computed_in_order_and_its_csv_gives_it_back(schedule: Schedule) -> None:
    """``Schedule`` has refused what computes something twice, in another order, or can deadlock."""
    by_stage = [sum(action.op is not Op.WEIGHT for action in program) for program in schedule.programs]
    assert by_stage == [2 * schedule.chunks // schedule.stages * schedule.microbatches] * schedule.stages
    assert Schedule.from_csv(schedule.to_csv(), schedule.name) == schedule


@given(schedules())
def test_torch_accepts_it(schedule: Schedule) -> None:
    assert accepted_by_torch(schedule)


@given(schedules())
def test_no_stage_holds_more_than_is_said(schedule: Schedule) -> None:
    """In chunks; the forms in words are in each schedule's docstring, where they are exact in tests of their own."""
    p, m = schedule.stages, schedule.microbatches
    v = schedule.chunks // p
    lap = (v - 1) * -(-m // max(1, m // p))
    most = {
        "1f1b": p,
        "gpipe": m,
        "looped_bfs": v * m,
        "interleaved_1f1b": lap + 2 * p - 1,
        "interleaved_zb": lap + p,
        "zb_h1": p,
        "zb_h2": 2 * p - 1,
        "zbv": 2 * p,
        "dualpipev": 2 * p + 1,
        "v_half": 2 * ((p + 2) // 2),
        "v_min": 2 * ((p + 4) // 3),
    }[schedule.name]
    assert max(schedule.simulate().peak_in_flight) <= min(v * m, most)


@given(schedules())
def test_none_beats_the_way_to_the_last_stage_and_none_is_slower_than_gpipe(schedule: Schedule) -> None:
    p, v = schedule.stages, schedule.chunks // schedule.stages
    assert (p - 1) / v - 1e-9 <= extra(schedule) <= 3 * (p - 1) + 1e-9


TABLE = {
    "1f1b": (33, 117),
    "gpipe": (33, 117),
    "interleaved_1f1b": (28.5, 106.5),
    "looped_bfs": (28.5, 106.5),
    "v_min": (29.5, 109.5),
    "v_half": (28.5, 107.5),
    "zb_h1": (27, 103),
    "zb_h2": (27, 103),
    "interleaved_zb": (25.5, 99.5),
    "zbv": (25.5, 99.5),
    "dualpipev": (25.5, 99.5),
}


@pytest.mark.parametrize("name", names())
def test_known_makespans(name: str) -> None:
    assert (whole(build(name, 4, 8)).makespan, whole(build(name, 8, 32)).makespan) == TABLE[name]


@pytest.mark.parametrize("name", names())
def test_alone_a_stage_never_idles(name: str) -> None:
    assert extra(build(name, 1, 6)) == 0


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize(("stages", "microbatches"), [(8, 1), (5, 3), (4, 7), (3, 10)])
def test_any_number_of_microbatches_will_do(name: str, stages: int, microbatches: int) -> None:
    assert build(name, stages, microbatches).microbatches == microbatches


KNOWN = (
    "choose one of 1f1b, dualpipev, gpipe, interleaved_1f1b, interleaved_zb, looped_bfs, v_half, v_min, zb_h1, zb_h2, "
    "zbv"
)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (("pipedream", 2, 2), ValueError, f"the schedule 'pipedream' is not known; {KNOWN}"),
        (("gpipe", 0, 2), ValueError, "stages is 0, but it must be at least 1"),
        (("zbv", 2, -3), ValueError, "microbatches is -3, but it must be at least 1"),
        (("gpipe", True, 2), TypeError, "stages is True, but it must be an int of at least 1"),
        (("gpipe", 2, 2.0), TypeError, "microbatches is 2.0, but it must be an int of at least 1"),
        (("v_half", "2", 2), TypeError, "stages is '2', but it must be an int of at least 1"),
        (
            ("1f1b", 2, 2, 2),
            ValueError,
            "chunks is 2, but the schedule '1f1b' holds one chunk a stage; leave chunks out",
        ),
        (
            ("zbv", 2, 2, 3),
            ValueError,
            "chunks is 3, but the schedule 'zbv' holds two chunks a stage; leave chunks out",
        ),
        (("1f1b", 2, 2, 0), ValueError, "chunks is 0, but it must be at least 1"),
        (("looped_bfs", 2, 2, 0), ValueError, "chunks is 0, but it must be at least 1"),
        (("interleaved_zb", 2, 2, 1.0), TypeError, "chunks is 1.0, but it must be an int of at least 1"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: tuple[str, int, int], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        build(*arguments)
    assert str(caught.value) == sentence
    if "chunks" in sentence or "known" in sentence:
        with pytest.raises(error) as caught:
            chunks_of(arguments[0], *arguments[3:])
        assert str(caught.value) == sentence
