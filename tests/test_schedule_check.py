from __future__ import annotations

from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.errors import ScheduleError
from raypipe.schedule import Action, Schedule, build, names


def make(*rows: str, microbatches: int = 2, forward_only: bool = False) -> Schedule:
    programs = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    return Schedule("mine", programs, microbatches, forward_only)


def refusal(*rows: str, microbatches: int = 2, forward_only: bool = False) -> str:
    with pytest.raises(ScheduleError) as caught:
        make(*rows, microbatches=microbatches, forward_only=forward_only)
    text = str(caught.value)
    assert text.startswith("schedule 'mine': ")
    return text


def test_a_deadlock_is_refused_with_its_grid() -> None:
    assert refusal("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1") == (
        "schedule 'mine': it deadlocks: stage 0 waits at 0B0 for the gradient of chunk 1, stage 1 waits at 1F1 for the "
        "activations of chunk 0; move what is waited for forward in its program\n"
        "\n"
        "stage 0 |0F0   .     >0B0< 0F1   0B1\n"
        "stage 1 |.     1F0   >1F1< 1B0   1B1"
    )


def test_a_missing_action_is_refused_with_its_place() -> None:
    assert refusal("0F0 0F1 0B0 0B1", "1F0 1F1 1B0") == (
        "schedule 'mine': stage 1 never computes 1B1; add it (marked at the end here)\n"
        "\n"
        "stage 0 |0F0   0F1   .     .     0B0   0B1\n"
        "stage 1 |.     1F0   1F1   1B0   >1B1< ."
    )


@pytest.mark.parametrize(
    ("rows", "sentence", "mark"),
    [
        (("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1 1B1"), "stage 1 computes 1B1 twice", ">1B1<"),
        (("0F0 0F1 0B0 0B1", "1F0 1F1 1I0 1B0 1B1"), "computes 1I0 and 1B0, but one backward is either B", ">1B0<"),
        (("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1W0 1B1"), "computes 1B0 and 1W0, but one backward is either B", ">1W0<"),
        (("0F0 0F1 0B0 0B1", "1F0 1F1 1I0 1W0 1I1"), "stage 1 never computes 1W1", ">1W1<"),
        (("0F0 0B0 0B1", "1F0 1F1 1B0 1B1"), "stage 0 never computes 0F1", ">0F1<"),
        (("0F0 0F1 0B0 0B1", "1F0 1B1 1F1 1B0"), "stage 1 computes 1B1 before 1F1", ">1B1<"),
        (("0F0 0F1 0B0 0B1", "1F0 1F1 1W0 1I0 1B1"), "stage 1 computes 1W0 before 1I0", ">1W0<"),
        (("0F0 0F1 0B0 0B1", "1F0 1F1 1B1 1B0"), "stage 1 computes 1B1 before 1B0, but the backwards", ">1B0<"),
        (("0F0 0F1 0B0 0B1", "1F0 1F1 1I0 1I1 1W1 1W0"), "stage 1 computes 1W1 before 1W0", ">1W0<"),
        (("0F0 0F1 0B0 0B1", "1F0 1F1 1I1 1I0 1W0 1W1"), "stage 1 computes 1I1 before 1I0", ">1I0<"),
        (("0F0 0F1 0B0 0B1", "1F0 1F1 1I0 1B1 1W0"), "stage 1 computes 1B1 before 1W0", ">1W0<"),
        (("0F0 0F1 0F2 0B0 0B1", "1F0 1F1 1B0 1B1"), "computes 0F2, but microbatches are numbered 0 to 1", ">0F2<"),
        (("0F0 0F1 0B0 0B1 1F0", "1F1 1B0 1B1"), "chunk 1 is on stage 0 and, with 1F1, on stage 1", ">1F1<"),
        (("0F0 0F1 0B0 0B1", "2F0 2F1 2B0 2B1"), "there is a chunk 2 but no chunk 1", ">2F0<"),
        (("0F0 0SEND_F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"), "holds 0SEND_F0, but messages follow", ">0SEND_F0<"),
        (("1F0 0F0 0F1 1F1 1B0 0B0 1B1 0B1",), "stage 0 waits at 1F0 for the activations of chunk 0", ">1F0<"),
    ],
)
def test_each_broken_rule_is_refused_at_its_spot(rows: tuple[str, ...], sentence: str, mark: str) -> None:
    text = refusal(*rows)
    assert sentence in text.splitlines()[0]
    assert text.count(mark) == 1
    assert text.count(">") == 1


def test_a_schedule_without_stages_or_actions_is_refused() -> None:
    assert "it has no stages" in refusal()
    assert "stage 1 has no actions" in refusal("0F0 0F1 0B0 0B1", "")


def test_what_is_no_action_is_refused() -> None:
    with pytest.raises(ScheduleError, match="stage 0 holds '0F0', which is no Action"):
        Schedule("mine", (("0F0", "0B0"),), 1)  # type: ignore[arg-type]


def test_forward_only_is_said_and_held() -> None:
    assert make("0F0 0F1", "1F0 1F1", forward_only=True).forward_only
    assert "stage 0 never computes 0B0" in refusal("0F0 0F1", "1F0 1F1")
    assert "1B0, but the schedule is forward-only" in refusal("0F0 0F1", "1F0 1F1 1B0", forward_only=True)
    assert "stage 1 never computes 1F1" in refusal("0F0 0F1", "1F0", forward_only=True)


def test_the_halves_of_a_backward_may_be_mixed_with_whole_ones() -> None:
    assert make("0F0 0F1 0B0 0I1 0W1", "1F0 1F1 1I0 1I1 1W0 1W1").chunks == 2


def test_several_chunks_a_stage_in_a_v() -> None:
    schedule = make("0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0", microbatches=1)
    assert schedule.placement == (0, 1, 1, 0)


def test_a_large_grid_is_cropped_around_the_spot() -> None:
    programs = list(build("1f1b", 40, 200).programs)
    programs[20] = programs[20][:150] + programs[20][151:]
    with pytest.raises(ScheduleError) as caught:
        Schedule("mine", tuple(programs), 200)
    sentence, _, *grid = str(caught.value).splitlines()
    assert "stage 20 never computes" in sentence
    assert len(grid) <= 14
    assert max(map(len, grid)) < 250
    assert sum(line.count(">") for line in grid) == 1


@pytest.mark.parametrize("microbatches", [True, 2.0, "2"])
def test_microbatches_are_an_int(microbatches: object) -> None:
    with pytest.raises(TypeError, match=r"microbatches is .*, but it must be an int"):
        Schedule("mine", (), microbatches)  # type: ignore[arg-type]


@given(st.sampled_from(names()), st.integers(1, 6), st.integers(1, 6), st.data())
def test_no_action_can_be_left_out_or_doubled(name: str, stages: int, microbatches: int, data: st.DataObject) -> None:
    programs = build(name, stages, microbatches).programs
    stage = data.draw(st.integers(0, stages - 1))
    at = data.draw(st.integers(0, 2 * microbatches - 1))
    program = programs[stage]
    without = program[:at] + program[at + 1 :]
    for spoiled in (without, (*without, program[at], program[at])):
        with pytest.raises(ScheduleError):
            Schedule("mine", (*programs[:stage], spoiled, *programs[stage + 1 :]), microbatches)


def test_every_order_of_two_microbatches_on_three_stages() -> None:
    # Against a search that shares no code with the check: it refuses what never ends, and nothing else.
    orders = [order for order in permutations(("F0", "F1", "B0", "B1")) if order.index("B0") < order.index("B1")]
    accepted = 0
    for rows in product(orders, repeat=3):
        texts = [[f"{chunk}{text}" for text in order] for chunk, order in enumerate(rows)]
        try:
            make(*map(" ".join, texts))
        except ScheduleError:
            assert not comes_to_its_end(texts)
        else:
            assert comes_to_its_end(texts)
            accepted += 1
    assert 0 < accepted < len(orders) ** 3


def comes_to_its_end(texts: list[list[str]]) -> bool:
    """Whether passes over three stages go on until everything is done."""
    left = [list(program) for program in texts]
    done: set[str] = set()
    moved = True
    while moved:
        moved = False
        for chunk, program in enumerate(left):
            while program:
                op, microbatch = program[0][1], program[0][2]
                needs = (
                    {f"{chunk - 1}F{microbatch}"}
                    if op == "F"
                    else {f"{chunk}F{microbatch}", f"{chunk + 1}B{microbatch}"}
                )
                if not needs - {f"-1F{microbatch}", f"3B{microbatch}"} <= done:
                    break
                done.add(program.pop(0))
                moved = True
    return not any(left)
