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

__all__ = ["DryRun", "Message", "Numbered", "Step", "dry_run", "given_by", "needed_by", "number_messages"]


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


class Numbered(NamedTuple):
    """The messages of all programs as numbers, which are faster to look up; -1 stands for none.

    Attributes:
        needs: for each stage and position what the action there waits for.
        gives: what is there once it has run.
        microbatches: how many numbers a chunk's activations, or its gradients, take.
    """

    needs: list[list[int]]
    gives: list[list[int]]
    microbatches: int

    def message(self, number: int) -> Message:
        """The message of a number that is not -1."""
        chunk, gradient = self.made_by(number)
        return Message(chunk, number // 2 % self.microbatches, gradient)

    def made_by(self, number: int) -> tuple[int, bool]:
        """The chunk that makes it, and whether it is a gradient."""
        return number // (2 * self.microbatches), number % 2 == 1


def number_messages(programs: Programs) -> Numbered:
    """What each action needs and gives, by the rule above."""
    chunks = 1 + max((action.chunk for program in programs for action in program), default=0)
    microbatches = 1 + max((action.microbatch for program in programs for action in program), default=0)
    forward, backward, inputs = Op.FORWARD, Op.BACKWARD, Op.INPUT  # an enum's members are slow to look up
    last, row = chunks - 1, 2 * microbatches
    needs: list[list[int]] = []
    gives: list[list[int]] = []
    for program in programs:
        need, give = [-1] * len(program), [-1] * len(program)
        for position, action in enumerate(program):
            op, chunk = action.op, action.chunk
            number = chunk * row + 2 * action.microbatch
            if op is forward:
                give[position] = number
                if chunk > 0:
                    need[position] = number - row
            elif op is backward or op is inputs:
                give[position] = number + 1
                if chunk < last:
                    need[position] = number + row + 1
        needs.append(need)
        gives.append(give)
    return Numbered(needs, gives, microbatches)


def dry_run(programs: Programs) -> DryRun:
    """Runs the programs in time slots: in each slot every stage that need not wait runs one action.

    Deterministic, and linear in the number of actions. Any programs will do, wrong ones too.
    """
    numbered = number_messages(programs)
    there = {-1}  # what waits for nothing
    waiting: defaultdict[int, list[int]] = defaultdict(list)
    position = [0] * len(programs)
    steps: list[Step] = []
    candidates = list(range(len(programs)))
    slot = 0
    while candidates:
        ready: list[int] = []
        for stage in sorted(candidates):
            at, needs = position[stage], numbered.needs[stage]
            if at == len(needs):
                continue
            if needs[at] in there:
                ready.append(stage)
            else:
                waiting[needs[at]].append(stage)
        # What is given in this slot can be taken in the next one: all of it runs before anybody is woken.
        candidates = ready.copy()
        for stage in ready:
            at = position[stage]
            position[stage] = at + 1
            steps.append(Step(slot, stage, at))
            give = numbered.gives[stage][at]
            if give >= 0:
                there.add(give)
                if give in waiting:
                    candidates += waiting.pop(give)
        slot += 1
    blocked = {stage: at for stage, at in enumerate(position) if at < len(programs[stage])}
    return DryRun(tuple(steps), blocked)
