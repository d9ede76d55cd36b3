"""Why a step takes as long as it does: the chain of actions and messages of which each waited for the one before.

Source: the critical path method (Kelley and Walker, "Critical-Path Planning and Scheduling", 1959), on the actions of
the programs and, where a channel is busy, the message that holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from .dry_run import Message
from .span import Span, Transfer

__all__ = ["Link", "Sent", "critical_path"]

Link: TypeAlias = Span | Transfer


class Sent(NamedTuple):
    """A message between two stages as it was played.

    Attributes:
        giver: place of the action that made it among the spans.
        target: the stage that takes it.
        start: when its channel begins to take it in.
        taken: when the channel has it, and is free for the next.
        end: when it is there.
        before: number of the message before it on its channel, -1 for the first.
    """

    giver: int
    target: int
    start: float
    taken: float
    end: float
    before: int


def critical_path(
    spans: Sequence[Span],
    previous: Sequence[int],
    needs: Sequence[int],
    sent: Mapping[int, Sent],
    message_of: Callable[[int], Message],
) -> tuple[Link, ...]:
    """The links from time 0 to the last action's end, each starting when the one before it ends.

    Where an action could start earlier neither for its stage nor for its message, its stage is taken. A message that
    only held the channel for the next one ends where the channel has taken it in.

    Args:
        spans: all actions, those of one stage in its order.
        previous: for each the place of the action before it on its stage, -1 for the first.
        needs: for each the number of the message that it waits for, -1 where there is none.
        sent: by its number, each message between two stages.
        message_of: the message of a number.
    """
    at = max(range(len(spans)), key=lambda place: spans[place].end)
    path: list[Link] = [spans[at]]
    while spans[at].start > 0:
        before = previous[at]
        if before >= 0 and spans[before].end == spans[at].start:
            at = before
        else:
            number, end = needs[at], spans[at].start
            while number >= 0:
                giver, target, start, _, _, held_by = sent[number]
                path.append(Transfer(spans[giver].stage, target, message_of(number), start, end))
                at, end = giver, start
                number = held_by if start != spans[giver].end else -1
        path.append(spans[at])
    return tuple(reversed(path))
