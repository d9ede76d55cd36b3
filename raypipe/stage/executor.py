"""Walks a rank's program: receives, computes, sends, and writes down when.

It knows neither Ray nor threads: where it must wait it yields the handle, and its host decides what that means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Protocol

from torch import Tensor

from raypipe.errors import RaypipeError, StageError
from raypipe.observe.events import Recorder
from raypipe.parallel.group import named
from raypipe.schedule import Action, Op
from raypipe.stage.inbox import Inbox
from raypipe.stage.program import Item, Message, Program
from raypipe.stage.protocol import Progress, RankWork
from raypipe.tensors import TensorSpec
from raypipe.transport.base import Transport

__all__ = ["Activity", "Computer", "execute"]


class Computer(Protocol):
    """What computes a step's actions and knows the shapes of its messages."""

    in_flight: int

    def specs(self, message: Message) -> Sequence[TensorSpec]:
        """The tensors of a message, in order."""

    def forward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """Takes the tensors of the boundary before the chunk, returns those of the boundary after it."""

    def backward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """Takes the gradients of the boundary after the chunk, returns those of the boundary before it."""

    def input_gradient(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same, but leaves what it can of the weights' gradients for ``weight_gradient``."""

    def weight_gradient(self, chunk: int, microbatch: int) -> None:
        """What ``input_gradient`` left."""


class Activity:
    """What a rank is doing now; written by the rank's thread, read by the one that answers questions."""

    def __init__(self) -> None:
        self._now: tuple[int, object, float, int | None] = (-1, "starting", monotonic(), None)

    def set(self, step: int, action: object, waits_for: int | None = None) -> None:
        """One assignment, so that a reader never sees half of it."""
        self._now = (step, action, monotonic(), waits_for)

    def progress(self) -> Progress:
        """The rank's present state."""
        step, action, since, waits_for = self._now
        return Progress(step, str(action), monotonic() - since, waits_for)


def execute(
    program: Program,
    computer: Computer,
    transport: Transport,
    ranks: Mapping[int, int],
    recorder: Recorder,
    activity: Activity,
    step: int,
    replica: int | None = None,
) -> RankWork[None]:
    """Runs one step's actions.

    Args:
        program: of this rank's stage.
        computer: of this step.
        transport: of this rank.
        ranks: the rank of each stage of this rank's replica.
        recorder: of this program.
        activity: told at each action.
        step: number of the step.
        replica: of this rank, to be named in an error, or None where there is only one.

    Raises:
        StageError: an action failed.
        PeerLost: a message did not come.
    """
    inbox = Inbox(transport, {ranks[s]: messages for s, messages in program.incoming.items()}, computer.specs)
    own: dict[Message, Sequence[Tensor]] = {}  # between neighbouring chunks of one stage
    for index, item in enumerate(program.items):
        turned = monotonic()
        received: Sequence[Tensor] = ()
        taken = None
        if item.needs is not None and item.source is not None:
            if item.source == program.stage:
                received = own.pop(item.needs)
            else:
                taken = ranks[item.source]
                handle = inbox.take(taken, item.needs)
                if handle is not None:
                    activity.set(step, item.action, waits_for=taken)
                    yield handle
                    received = handle.result()
        activity.set(step, item.action)
        start = monotonic()
        try:
            made = _compute(computer, item.action, received)
        except RaypipeError:
            raise
        except Exception as error:
            raise _stage_error(program, item, step, named(error), replica) from error
        recorder.write(index, turned, start, monotonic(), computer.in_flight)
        if item.gives is not None and item.target is not None:
            if item.target == program.stage:
                own[item.gives] = made
            elif made:
                transport.send(ranks[item.target], made)
        if taken is not None:  # after the send: the next rank waits for that, and nobody for this
            inbox.post(taken)


def _compute(computer: Computer, action: Action, received: Sequence[Tensor]) -> Sequence[Tensor]:
    if action.op is Op.FORWARD:
        return computer.forward(action.chunk, action.microbatch, received)
    if action.op is Op.BACKWARD:
        return computer.backward(action.chunk, action.microbatch, received)
    if action.op is Op.INPUT:
        return computer.input_gradient(action.chunk, action.microbatch, received)
    computer.weight_gradient(action.chunk, action.microbatch)
    return ()


def _stage_error(program: Program, item: Item, step: int, error: Exception, replica: int | None) -> StageError:
    action, word = item.action, str(item.action)
    return StageError(
        program.stage, word, step, error, chunk=action.chunk, microbatch=action.microbatch, replica=replica
    )
