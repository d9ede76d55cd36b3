from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raypipe.schedule import Action, Schedule, Span, build, draw_programs, draw_spans, names


def test_a_grid_breaks_into_bands_that_fit() -> None:
    assert draw_programs(build("gpipe", 2, 3).programs, width=28) == (
        "slots 0 to 4 of 8\n"
        "stage 0 |0F0 0F1 0F2 .   .\n"
        "stage 1 |.   1F0 1F1 1F2 1B0\n"
        "\n"
        "slots 5 to 7 of 8\n"
        "stage 0 |0B0 0B1 0B2\n"
        "stage 1 |1B1 1B2 ."
    )


@given(st.sampled_from(names()), st.integers(1, 12), st.integers(1, 12), st.integers(30, 120))
def test_bands_fit_and_lose_nothing(name: str, stages: int, microbatches: int, width: int) -> None:
    programs = build(name, stages, microbatches).programs
    lines = draw_programs(programs, width=width).splitlines()
    assert max(map(len, lines)) <= width
    for stage, program in enumerate(programs):
        cells = " ".join(line.partition("|")[2] for line in lines if re.match(rf"stage +{stage} \|", line)).split()
        assert [cell for cell in cells if cell != "."] == [str(action) for action in program]


def test_marks_are_drawn_around_the_action() -> None:
    assert draw_programs(build("gpipe", 2, 1).programs, marks=[(1, 1)]) == (
        "stage 0 |0F0   .     .     0B0\nstage 1 |.     1F0   >1B0< ."
    )


def test_a_timeline_to_scale() -> None:
    found = build("1f1b", 2, 3).simulate()
    assert draw_spans(found.spans, 2, width=69, title="planned", unit="ms") == (
        "planned\n"
        "stage 0 |0>>>>1>>>>..........0<<<<<<<<<2>>>>1<<<<<<<<<.....2<<<<<<<<<\n"
        "stage 1 |.....0>>>>0<<<<<<<<<1>>>>1<<<<<<<<<2>>>>2<<<<<<<<<..........\n"
        "        +---------+---------+---------+---------+---------+---------+\n"
        "        0         2         4         6         8         10       12\n"
        "         > forward   < backward   . idle   time in ms"
    )


def test_two_timelines_share_one_axis() -> None:
    short, long = build("gpipe", 1, 1).simulate(), build("gpipe", 1, 2).simulate()
    texts = [draw_spans(found.spans, 1, width=69, until=long.makespan) for found in (short, long)]
    assert [text.splitlines()[0] for text in texts] == [
        "stage 0 |0>>>>>>>>>0<<<<<<<<<<<<<<<<<<<",
        "stage 0 |0>>>>>>>>>1>>>>>>>>>0<<<<<<<<<<<<<<<<<<<1<<<<<<<<<<<<<<<<<<<",
    ]
    assert texts[0].splitlines()[1:] == texts[1].splitlines()[1:]
    with pytest.raises(ValueError, match="until is 5, but the last action ends at 6; give that or later"):
        draw_spans(long.spans, 1, until=5)


def test_measured_times_count_from_the_first_start_in_any_order() -> None:
    spans = build("1f1b", 2, 200).simulate().spans  # more than columns, so that the order of drawing shows
    later = [Span(span.stage, span.action, span.start + 1e9, span.end + 1e9) for span in reversed(spans)]
    assert draw_spans(later, 2) == draw_spans(spans, 2)


def test_halves_of_a_backward_have_letters_of_their_own() -> None:
    text = draw_spans(Schedule.from_csv("0F0,0I0,0W0").simulate().spans, 1, width=40)
    row, legend = text.splitlines()[0], text.splitlines()[-1]
    assert re.fullmatch(r"stage 0 \|0>+0i+0w+", row)
    assert "i input gradient   w weight gradient" in legend
    assert "< backward" not in legend


def test_a_number_is_drawn_only_where_its_kind_fits_too() -> None:
    row = draw_spans(build("gpipe", 1, 100).simulate().spans, 1, width=59).splitlines()[0]
    assert set(row.partition("|")[2]) == {">", "<"}


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.floats(0, 1e4), st.floats(0, 1e4)),
        min_size=1,
        max_size=30,
    ),
    st.integers(40, 150),
)
@example([(0, 0.0, 6.026888406239796e-279)], 40)
def test_any_times_fit_the_width(pieces: list[tuple[int, float, float]], width: int) -> None:
    spans = [Span(stage, Action.parse(f"{stage}F0"), start, start + length) for stage, start, length in pieces]
    lines = draw_spans(spans, 4, width=width).splitlines()
    assert [len(line) for line in lines[:4]] == [width] * 4
    assert max(map(len, lines[:6])) <= width


def test_colour_changes_no_character() -> None:
    schedule = build("1f1b", 3, 4)
    spans = schedule.simulate().spans
    for plain, colored in [
        (draw_programs(schedule.programs), draw_programs(schedule.programs, color=True)),
        (draw_spans(spans, 3), draw_spans(spans, 3, color=True)),
    ]:
        assert colored != plain
        assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain


@pytest.mark.parametrize(
    ("stages", "width", "count", "sentence"),
    [
        (2, 39, 4, "width is 39, but a timeline needs at least 40 columns"),
        (1, 100, 4, "ran on stage 1, but the stages are 0 to 0"),
        (2, 100, 0, "there are no spans to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused(stages: int, width: int, count: int, sentence: str) -> None:
    spans = build("gpipe", 2, 1).simulate().spans[:count]
    with pytest.raises(ValueError, match=sentence):
        draw_spans(spans, stages, width=width)
