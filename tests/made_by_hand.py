"""Schedules written by hand, with several chunks a stage and backwards in halves, for tests that play schedules."""

from __future__ import annotations

from raypipe.schedule import Action, Op, Schedule, build

__all__ = ["EVERY_KIND", "halves_apart", "looped", "mine"]


def mine(*rows: str, microbatches: int) -> Schedule:
    """The schedule of programs as text."""
    return Schedule("mine", tuple(tuple(map(Action.parse, row.split())) for row in rows), microbatches)


def looped(stages: int, loops: int, microbatches: int, folded: bool = False) -> Schedule:
    """All forwards, then all backwards, of ``loops`` chunks a stage, which go around the stages or back and forth."""
    placement = [
        chunk % stages if not folded or chunk // stages % 2 == 0 else stages - 1 - chunk % stages
        for chunk in range(stages * loops)
    ]
    programs: list[list[Action]] = [[] for _ in range(stages)]
    for chunk, stage in enumerate(placement):
        programs[stage] += [Action(chunk, Op.FORWARD, number) for number in range(microbatches)]
    for chunk, stage in reversed(list(enumerate(placement))):
        programs[stage] += [Action(chunk, Op.BACKWARD, number) for number in range(microbatches)]
    return Schedule("mine", tuple(map(tuple, programs)), microbatches)


def halves_apart(schedule: Schedule, late: bool) -> Schedule:
    """The schedule with I and W in the place of each B; ``late``: all W at the end."""
    programs = []
    for program in schedule.programs:
        made: list[Action] = []
        rest: list[Action] = []
        for action in program:
            if action.op is Op.BACKWARD:
                made.append(Action(action.chunk, Op.INPUT, action.microbatch))
                (rest if late else made).append(Action(action.chunk, Op.WEIGHT, action.microbatch))
            else:
                made.append(action)
        programs.append((*made, *rest))
    return Schedule("mine", tuple(programs), schedule.microbatches)


EVERY_KIND = (
    build("gpipe", 1, 3),
    build("gpipe", 3, 4),
    build("1f1b", 4, 6),
    halves_apart(build("1f1b", 3, 5), late=False),
    halves_apart(build("1f1b", 3, 5), late=True),
    looped(2, 2, 3),
    looped(3, 2, 4, folded=True),
    halves_apart(looped(2, 3, 2, folded=True), late=True),
    build("1f1b", 3, 3).forwards(5),
)
