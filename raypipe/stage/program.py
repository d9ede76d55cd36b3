"""A schedule from one rank's side: its actions, and the messages of each of its channels in the sender's order.

Messages are not actions of the schedule: a forward of chunk c gives to the stage of chunk c + 1, a backward (or input
gradient) to the stage of chunk c - 1. Both ends know all programs, so the receiver posts in the sender's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raypipe.schedule import Action, Op, Schedule
from raypipe.schedule.dry_run import Message, given_by, needed_by

__all__ = ["Item", "Message", "Program", "compile_program"]


@dataclass(frozen=True, slots=True)
class Item:
    """One action, the message it needs and the message it gives; each with the stage at its other end, if any."""

    action: Action
    needs: Message | None
    source: int | None
    gives: Message | None
    target: int | None


@dataclass(frozen=True, slots=True)
class Program:
    """One stage's items in order.

    Attributes: ``stage``; ``items``; ``incoming``, for each other stage the messages that come from it, in its order;
    ``split``, every (chunk, microbatch) whose backward is in two halves.
    """

    stage: int
    items: tuple[Item, ...]
    incoming: Mapping[int, tuple[Message, ...]]
    split: frozenset[tuple[int, int]] = frozenset()


def compile_program(schedule: Schedule, stage: int) -> Program:
    """The program of ``stage``."""
    items = tuple(_item(schedule, action) for action in schedule.programs[stage])
    incoming = {}
    for sender, program in enumerate(schedule.programs):
        sent = (_item(schedule, action) for action in program) if sender != stage else ()
        messages = tuple(item.gives for item in sent if item.target == stage and item.gives is not None)
        if messages:
            incoming[sender] = messages
    halves = (action for action in schedule.programs[stage] if action.op is Op.INPUT)
    split = frozenset((action.chunk, action.microbatch) for action in halves)
    return Program(stage, items, incoming, split)


def _item(schedule: Schedule, action: Action) -> Item:
    needs, gives = needed_by(action, schedule.chunks), given_by(action)
    source = None if needs is None else schedule.stage_of(needs.chunk)
    taker = None if gives is None else action.chunk + (-1 if gives.gradient else 1)
    target = schedule.stage_of(taker) if taker is not None and 0 <= taker < schedule.chunks else None
    return Item(action, needs, source, gives, target)
