"""A schedule from one rank's side: its actions, and the messages of each of its channels in the sender's order.

Messages are not actions of the schedule: a forward of chunk c sends to the stage of chunk c + 1, a backward (or input
gradient) to the stage of chunk c - 1. Both ends know all programs, so the receiver posts in the sender's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raypipe.schedule import Action, Op, Schedule

__all__ = ["Item", "Message", "Program", "compile_program"]


@dataclass(frozen=True, slots=True)
class Message:
    """What crosses into ``chunk``: activations from the chunk before it, or gradients from the one after it.

    Attributes: ``gradient``, which of the two; ``chunk`` that takes it; ``microbatch``.
    """

    gradient: bool
    chunk: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Item:
    """One action, the message it needs and the message it makes; a stage is None at the model's ends."""

    action: Action
    needs: Message | None
    source: int | None
    makes: Message | None
    target: int | None


@dataclass(frozen=True, slots=True)
class Program:
    """One stage's items in order, and for each other stage the messages that come from it, in its order."""

    stage: int
    items: tuple[Item, ...]
    incoming: Mapping[int, tuple[Message, ...]]


def compile_program(schedule: Schedule, stage: int) -> Program:
    """The program of ``stage``, once per schedule."""
    items = tuple(_item(schedule, action) for action in schedule.programs[stage])
    incoming = {}
    for sender, program in enumerate(schedule.programs):
        sent = (_item(schedule, action) for action in program) if sender != stage else ()
        messages = tuple(item.makes for item in sent if item.target == stage and item.makes is not None)
        if messages:
            incoming[sender] = messages
    return Program(stage, items, incoming)


def _item(schedule: Schedule, action: Action) -> Item:
    chunk, microbatch = action.chunk, action.microbatch
    before = schedule.stage_of(chunk - 1) if chunk > 0 else None
    after = schedule.stage_of(chunk + 1) if chunk + 1 < schedule.chunks else None
    if action.op is Op.WEIGHT:
        return Item(action, None, None, None, None)
    if action.op is Op.FORWARD:
        needs = None if before is None else Message(False, chunk, microbatch)
        makes = None if after is None else Message(False, chunk + 1, microbatch)
        return Item(action, needs, before, makes, after)
    needs = None if after is None else Message(True, chunk, microbatch)
    makes = None if before is None else Message(True, chunk - 1, microbatch)
    return Item(action, needs, after, makes, before)
