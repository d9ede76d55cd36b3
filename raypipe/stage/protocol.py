"""What a rank at work looks like to whoever hosts it: a Ray actor, or the local backend.

The methods that take part in a step are generators: they yield each handle that they must wait for and return their
result. So one host blocks on the handles (``run_blocking``), and another runs several ranks in one thread.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch.distributed.distributed_c10d import Store

from raypipe.transport.base import Handle, Transport

__all__ = ["Progress", "RankWork", "Worker", "run_blocking"]

T = TypeVar("T")
RankWork = Generator[Handle[Any], None, T]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a rank is doing.

    Attributes:
        step: the step it is in, or the last one.
        action: text of the action, such as ``2F0``, or a word (``idle``, ``optimizer``, ``starting``).
        seconds: how long it has been at it.
        waits_for: the rank that it waits for, or None while it works by itself. A waiting rank is never the stuck one.
    """

    step: int
    action: str
    seconds: float
    waits_for: int | None = None


class Worker(Protocol):
    """One rank at work."""

    def join(self, store: Store, timeout_s: float) -> None:
        """Joins its tensor group; called before ``connect``, and only where a stage has several ranks."""

    def connect(self, transport: Transport) -> None:
        """Takes its channels. Called once, before any step."""

    def train_step(self, step: int, batch: Any) -> RankWork[Any]:
        """One step on a batch (as data.wire packed it); returns a small report."""

    def forward_step(self, step: int, batch: Any, kind: str) -> RankWork[Any]:
        """Forwards only, in eval mode; ``kind`` is ``"evaluate"`` or ``"predict"``. None: another replica's batch."""

    def state(self) -> Any:
        """This rank's weights, as numpy by name."""

    def progress(self) -> Progress:
        """May be called from another thread while a step runs."""

    def close(self) -> None:
        """Closes its transport, from any thread; a later step fails with PeerLost at once."""


def run_blocking(work: RankWork[T], timeout_s: float) -> T:
    """Runs a rank's work to its end, blocking on each handle for up to ``timeout_s`` seconds."""
    failure: BaseException | None = None
    while True:
        try:
            # Thrown into the work, so that it is reported with the action that waited.
            handle = next(work) if failure is None else work.throw(failure)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        failure = None
        try:
            handle.wait(timeout_s)
        except BaseException as error:
            failure = error
