"""Which action waits for which, and a dry run of the programs by that rule alone.

The rule, for chunk c and one microbatch:

=========== ======================= =============================
action      waits for               gives
=========== ======================= =============================
F           activations of c-1      activations of c
B, I        gradient of c+1         gradient of c
W           nothing                 nothing
=========== ======================= =============================

Chunk 0's forward and the last chunk's backward wait for nothing. Messages are asynchronous: a stage that gives
never waits for the one that takes. What an action needs on its own stage (B after F) is a
matter of order there: see check.py.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from .action import Action, Op, Programs

__all__ = ["DryRun", "Message", "Step", "dry_run", "given_by", "needed_by"]


class Message(NamedTuple):
    """What crosses the boundary after or before a chunk: activations of its forward, or a gradient of its backward."""

    chunk: int
    microbatch: int
    gradient: bool


class Step(NamedTuple):
    """One action of a dry run: in time slot ``slot``, stage ``stage`` runs what is at ``position`` of its program."""

    slot: int
    stage: int
    position: int


class DryRun(NamedTuple):
    """What a dry run did.

    Attributes:
        steps: what ran, sorted by slot and stage; nothing in it waits for anything later.
        blocked: for each stage that did not come to its end, the position of the action at which it waits for ever.
    """

    steps: tuple[Step, ...]
    blocked: dict[int, int]


def needed_by(action: Action, chunks: int) -> Message | None:
    """What ``action`` waits for, in a pipeline of ``chunks`` chunks; None where it waits for nothing."""
    if action.op is Op.FORWARD and action.chunk > 0:
        return Message(action.chunk - 1, action.microbatch, False)
    if action.op in (Op.BACKWARD, Op.INPUT) and action.chunk < chunks - 1:
        return Message(action.chunk + 1, action.microbatch, True)
    return None


def given_by(action: Action) -> Message | None:
    """What is there once ``action`` has run, whether or not a chunk takes it; None for a weight gradient."""
    if action.op is Op.FORWARD:
        return Message(action.chunk, action.microbatch, False)
    if action.op in (Op.BACKWARD, Op.INPUT):
        return Message(action.chunk, action.microbatch, True)
    return None


def dry_run(programs: Programs) -> DryRun:
    """Runs the programs in time slots: in each slot every stage that need not wait runs one action.

    Deterministic, and linear in the number of actions. Any programs will do, wrong ones too.
    """
    chunks = 1 + max((action.chunk for program in programs for action in program), default=0)
    there: set[Message] = set()
    waiting: defaultdict[Message, list[int]] = defaultdict(list)
    position = [0] * len(programs)
    steps: list[Step] = []
    candidates = list(range(len(programs)))
    slot = 0
    while candidates:
        ready: list[int] = []
        for stage in sorted(candidates):
            if position[stage] == len(programs[stage]):
                continue
            need = needed_by(programs[stage][position[stage]], chunks)
            if need is None or need in there:
                ready.append(stage)
            else:
                waiting[need].append(stage)
        # What is given in this slot can be taken in the next one: all of it runs before anybody is woken.
        candidates = list(ready)
        for stage in ready:
            steps.append(Step(slot, stage, position[stage]))
            give = given_by(programs[stage][position[stage]])
            position[stage] += 1
            if give is not None:
                there.add(give)
                candidates += waiting.pop(give, ())
        slot += 1
    blocked = {stage: at for stage, at in enumerate(position) if at < len(programs[stage])}
    return DryRun(tuple(steps), blocked)
