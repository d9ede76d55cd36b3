"""What a stage does next: one small frozen value with one text form.

An action prints and parses in the form of ``torch.distributed.pipelining``: chunk, letter, microbatch. So a log, a CSV,
a test and a timeline speak one language::

    2F0       chunk 2, forward of microbatch 0
    0B2       chunk 0, whole backward of microbatch 2
    1I3       chunk 1, gradient of the input only (zero-bubble schedules)
    1W3       chunk 1, gradient of the weights only, after 1I3
    0SEND_F1  chunk 0 sends the activations of microbatch 1 (torch's CSV with communication)
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Action", "Op", "Programs"]


class Op(enum.Enum):
    """The kind of an action; its value is torch's word for it."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    @property
    def computes(self) -> bool:
        """Whether it is computation; else it is communication."""
        return self in _COMPUTE


_COMPUTE = (Op.FORWARD, Op.BACKWARD, Op.INPUT, Op.WEIGHT)
_TEXT = re.compile(rf"([0-9]+)({'|'.join(op.value for op in Op)})([0-9]+)")


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work: what ``op`` names, of chunk ``chunk``, for microbatch ``microbatch`` (both from 0).

    Raises:
        TypeError: a number that is no int, or an ``op`` that is no ``Op``.
        ValueError: a negative number.
    """

    chunk: int
    op: Op
    microbatch: int

    def __post_init__(self) -> None:
        if not isinstance(self.op, Op):
            raise TypeError(f"op is {self.op!r}, but an action's op is an Op, such as Op.FORWARD")
        for name, value in (("chunk", self.chunk), ("microbatch", self.microbatch)):
            if type(value) is not int:
                raise TypeError(f"{name} is {value!r}, but an action's {name} is an int")
            if value < 0:
                raise ValueError(f"{name} is {value}, but an action's {name} is counted from 0")

    def __str__(self) -> str:
        return f"{self.chunk}{self.op.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as ``text``; white space around it is allowed.

        Raises:
            ValueError: any other text.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            words = ", ".join(op.value for op in Op)
            raise ValueError(
                f"{text!r} is not an action; write chunk, operation and microbatch, such as 2F0, with one of {words}"
            )
        chunk, op, microbatch = match.groups()
        return cls(int(chunk), Op(op), int(microbatch))


Programs: TypeAlias = tuple[tuple[Action, ...], ...]
"""The actions of every stage, in the stage's order."""
