"""Squeezing: actions with time slots move to earlier free slots, without more in flight than before.

Source: the step of this name in Qi et al., "Pipeline Parallelism with Controllable Memory", 2024: a building block that
repeats leaves slots free in the warm-up and the cool-down that its steady state fills.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from .action import Action, Op, Programs
from .dry_run import Message, given_by, needed_by

__all__ = ["squeeze"]


def squeeze(rows: Sequence[Mapping[int, Action]], most: int, steady: range) -> Programs:
    """The programs of ``rows``, with what is outside of ``steady`` in the earliest slot that is free and allowed.

    An action stays behind what it waits for and behind the one before it of its chunk and kind, and a forward moves
    only as far as no more than ``most`` chunks' activations are in flight. Its own slot is always free and allowed.

    Args:
        rows: for each stage its actions by time slot, each in a later slot than what it waits for.
        most: chunks' activations in flight on a stage; as many as ``rows`` hold, or more.
        steady: slots whose actions stay. Elsewhere idle time has no cost, but another order in the steady state can: it
            may have no gaps only while all actions take the same time.
    """
    chunks = 1 + max(action.chunk for row in rows for action in row.values())
    new_rows = [_Row(row, most) for row in rows]
    there: dict[Message, int] = {}
    last: dict[tuple[int, Op], int] = {}
    for slot, stage in sorted((slot, stage) for stage, row in enumerate(rows) for slot in row):
        action = rows[stage][slot]
        after = [there[message] for message in _waits_for(action, chunks)]
        kind = action.chunk, action.op
        first = slot if slot in steady else 1 + max([*after, last.get(kind, -1)])
        last[kind] = new_rows[stage].place(action, first, slot)
        given = given_by(action)
        if given is not None:
            there[given] = last[kind]
    return tuple(tuple(action for _, action in sorted(row.placed.items(), key=_slot)) for row in new_rows)


class _Row:
    """The new slots of a stage's actions, ``placed``, and how many chunks are in flight in each slot."""

    def __init__(self, row: Mapping[int, Action], most: int) -> None:
        self.placed: dict[int, Action] = {}
        self._most = most
        changes = [0] * (max(row) + 2)
        for slot, action in row.items():
            changes[slot] += action.op is Op.FORWARD
            changes[slot + 1] -= action.op is Op.WEIGHT
        self._in_flight = list(accumulate(changes))

    def place(self, action: Action, first: int, slot: int) -> int:
        """Moves ``action`` from ``slot`` to the earliest slot from ``first`` on, and tells which it is."""
        if action.op is Op.FORWARD:
            reach = slot
            while reach > first and self._in_flight[reach - 1] < self._most:
                reach -= 1
            first = reach
        new = next(free for free in range(first, slot + 1) if free not in self.placed)
        if action.op is Op.FORWARD:
            self._in_flight[new:slot] = [number + 1 for number in self._in_flight[new:slot]]
        elif action.op is Op.WEIGHT:
            self._in_flight[new + 1 : slot + 1] = [number - 1 for number in self._in_flight[new + 1 : slot + 1]]
        self.placed[new] = action
        return new


def _waits_for(action: Action, chunks: int) -> Iterator[Message]:
    """What must be there: from another chunk, and of its own chunk F for an I and I for a W."""
    need = needed_by(action, chunks)
    if need is not None:
        yield need
    if action.op is not Op.FORWARD:
        yield Message(action.chunk, action.microbatch, action.op is Op.WEIGHT)


def _slot(placed: tuple[int, Action]) -> int:
    return placed[0]
