from __future__ import annotations

from raypipe.schedule import Action, Schedule
from raypipe.schedule.squeeze import squeeze


def row(*cells: str) -> dict[int, Action]:
    return {slot: Action.parse(cell) for slot, cell in enumerate(cells) if cell != "."}


def text(row_: dict[int, Action], most: int) -> str:
    return " ".join(map(str, squeeze([row_], most)[0]))


LOOSE = row("0F0", ".", ".", "0I0", "0F1", "0W0", ".", ".", "0F2", "0I1", "0W1", "0I2", "0W2")


def test_a_forward_moves_up_to_the_limit() -> None:
    assert text(LOOSE, 2) == "0F0 0I0 0F1 0W0 0I1 0F2 0W1 0I2 0W2"
    assert Schedule("squeezed", squeeze([LOOSE], 2), 3).simulate().peak_in_flight == (2,)


def test_with_more_room_it_moves_further() -> None:
    assert text(LOOSE, 3) == "0F0 0I0 0F1 0F2 0W0 0I1 0W1 0I2 0W2"


def test_nothing_moves_before_what_it_waits_for() -> None:
    first = row("0F0", ".", ".", ".", ".", ".", "0I0", "0W0")
    second = row(".", ".", "1F0", ".", "1I0", "1W0")
    programs = squeeze([first, second], 1)
    assert [" ".join(map(str, program)) for program in programs] == ["0F0 0I0 0W0", "1F0 1I0 1W0"]
    assert str(Schedule("squeezed", programs, 1)).splitlines()[1:] == [
        "stage 0 |0F0 .   .   0I0 0W0",
        "stage 1 |.   1F0 1I0 1W0 .",
    ]


def test_what_is_tight_stays() -> None:
    tight = row("0F0", "0I0", "0W0", "0F1", "0I1", "0W1")
    assert text(tight, 1) == " ".join(map(str, tight.values()))
