"""Actions as numbers: an enum's members are slow to look up, and a schedule may have hundreds of thousands of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .action import Action, Op, Programs

__all__ = ["BACKWARD", "FORWARD", "INPUT", "KINDS", "OPS", "WEIGHT", "Plan", "number_of"]

OPS = (Op.FORWARD, Op.BACKWARD, Op.INPUT, Op.WEIGHT)
KINDS = len(OPS)
FORWARD, BACKWARD, INPUT, WEIGHT = range(KINDS)


def number_of(place: int, kind: int) -> int:
    """The number of the action of a kind, the place of its op in ``OPS``.

    ``place`` is that of its chunk and microbatch: chunk times microbatches of a step, plus microbatch.
    """
    return place * KINDS + kind


@dataclass(frozen=True)
class Plan:
    """Programs that are being checked, and each action's number."""

    programs: Programs
    microbatches: int
    forward_only: bool

    @cached_property
    def numbers(self) -> list[list[int]]:
        """For each stage its actions' numbers; only of computing actions of microbatches that a step has."""
        kinds = tuple(enumerate(OPS))

        def number(action: Action) -> int:
            kind = next(kind for kind, op in kinds if op is action.op)
            return number_of(action.chunk * self.microbatches + action.microbatch, kind)

        return [[number(action) for action in program] for program in self.programs]

    def numbered(self) -> Iterator[tuple[int, int, int]]:
        """(stage, index, number) of all actions, stage by stage."""
        for stage, numbers in enumerate(self.numbers):
            for index, number in enumerate(numbers):
                yield stage, index, number

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        """(stage, index, action) of all actions, stage by stage."""
        for stage, program in enumerate(self.programs):
            for index, action in enumerate(program):
                yield stage, index, action

    def action(self, number: int) -> Action:
        """The action of a number."""
        place, kind = divmod(number, KINDS)
        return Action(place // self.microbatches, OPS[kind], place % self.microbatches)
