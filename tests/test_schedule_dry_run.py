from __future__ import annotations

from raypipe.schedule import Action, Programs
from raypipe.schedule.dry_run import Message, Step, dry_run, given_by, needed_by


def programs(*rows: str) -> Programs:
    return tuple(tuple(map(Action.parse, row.split())) for row in rows)


def test_who_waits_for_what() -> None:
    def need(text: str) -> Message | None:
        return needed_by(Action.parse(text), chunks=3)

    assert need("0F5") is None
    assert need("2B5") is None
    assert need("1W5") is None
    assert need("1F5") == Message(0, 5, False)
    assert need("1B5") == need("1I5") == Message(2, 5, True)


def test_what_is_waited_for_is_what_is_given() -> None:
    assert given_by(Action.parse("0F5")) == needed_by(Action.parse("1F5"), 3)
    assert given_by(Action.parse("2B5")) == given_by(Action.parse("2I5")) == needed_by(Action.parse("1B5"), 3)
    assert given_by(Action.parse("2W5")) is None


def test_what_is_given_in_a_slot_is_taken_in_the_next() -> None:
    run = dry_run(programs("0F0 0B0", "1F0 1B0"))
    assert run.steps == (Step(0, 0, 0), Step(1, 1, 0), Step(2, 1, 1), Step(3, 0, 1))
    assert run.blocked == {}


def test_the_last_stage_may_come_first() -> None:
    # The placement is that of the programs: chunk 0 on stage 1 here.
    assert dry_run(programs("1F0 1B0", "0F0 0B0")).steps[0] == Step(0, 1, 0)


def test_a_deadlock_names_where_each_stage_stands() -> None:
    run = dry_run(programs("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"))
    assert run.blocked == {0: 1, 1: 1}
    assert len(run.steps) == 2


def test_a_stage_that_waits_for_itself_is_blocked() -> None:
    assert dry_run(programs("1F0 0F0 1B0 0B0")).blocked == {0: 0}
