from __future__ import annotations

import pytest

from raypipe.schedule import Action, Op, Schedule
from raypipe.schedule.squeeze import squeeze

NONE = range(0)
OPS = (Op.FORWARD, Op.INPUT, Op.WEIGHT)


def row(*cells: str) -> dict[int, Action]:
    return {slot: Action.parse(cell) for slot, cell in enumerate(cells) if cell != "."}


def three(chunk: int, *slots: int) -> dict[int, Action]:
    """F, I and W of three microbatches: those of the first in ``slots``, of each next one ten slots later."""
    return {slot + 10 * k: Action(chunk, op, k) for slot, op in zip(slots, OPS, strict=True) for k in range(3)}


LOOSE = [three(0, 0, 7, 8), three(1, 3, 5, 6)]


@pytest.mark.parametrize(
    ("most", "first"),
    [
        (1, "0F0 0I0 0W0 0F1 0I1 0W1 0F2 0I2 0W2"),
        (2, "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2"),
        (3, "0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2"),
    ],
)
def test_forwards_move_up_to_the_limit(most: int, first: str) -> None:
    programs = squeeze(LOOSE, most, NONE)
    assert " ".join(map(str, programs[0])) == first
    assert max(Schedule("squeezed", programs, 3).simulate().peak_in_flight) == most


def test_nothing_moves_before_what_it_waits_for() -> None:
    first = row("0F0", ".", ".", ".", ".", ".", "0I0", "0W0")
    second = row(".", ".", "1F0", ".", "1I0", "1W0")
    programs = squeeze([first, second], 1, NONE)
    assert [" ".join(map(str, program)) for program in programs] == ["0F0 0I0 0W0", "1F0 1I0 1W0"]
    assert str(Schedule("squeezed", programs, 1)).splitlines()[1:] == [
        "stage 0 |0F0 .   .   0I0 0W0",
        "stage 1 |.   1F0 1I0 1W0 .",
    ]


def test_what_is_tight_stays() -> None:
    tight = row("0F0", "0I0", "0W0", "0F1", "0I1", "0W1")
    assert squeeze([tight], 1, NONE) == (tuple(tight.values()),)


def test_the_steady_state_stays() -> None:
    loose = [three(0, 0, 7, 8), three(1, 3, 5, 6)]
    programs = squeeze(loose, 3, range(10, 20))
    assert " ".join(map(str, programs[0])) == "0F0 0I0 0W0 0F1 0F2 0I1 0W1 0I2 0W2"
