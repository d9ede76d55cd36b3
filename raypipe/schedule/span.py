"""When something ran: an action on its stage, a message on its channel."""

from __future__ import annotations

from dataclasses import dataclass

from .action import Action, Op
from .dry_run import Message

__all__ = ["Span", "Transfer"]


@dataclass(frozen=True, slots=True)
class Span:
    """An action on a stage from ``start`` to ``end``, planned or measured."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """A message on the channel from stage ``source`` to stage ``target``, from ``start`` to ``end``.

    It prints in torch's form of a send: ``0SEND_F1``, chunk 0 sends the activations of microbatch 1.
    """

    source: int
    target: int
    message: Message
    start: float
    end: float

    def __str__(self) -> str:
        op = Op.SEND_B if self.message.gradient else Op.SEND_F
        return str(Action(self.message.chunk, op, self.message.microbatch))
