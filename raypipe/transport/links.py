"""What one rank holds open, and the handles that wait on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch.distributed.distributed_c10d import Work

from raypipe.errors import PeerLost
from raypipe.transport.gloo import Group, wait_for
from raypipe.transport.outbox import Outbox

__all__ = ["Arrival", "Links", "trade"]

T = TypeVar("T")

_Works = Sequence[tuple[int, Work]]


class Links:
    """The groups and outboxes of one rank, closed together and for ever."""

    def __init__(self) -> None:
        self.closed = False
        self.outboxes: list[Outbox] = []
        self._groups: list[Group] = []
        self._lock = threading.Lock()

    def add(self, group: Group) -> Group:
        """Takes a group into its keeping."""
        self._groups.append(group)
        return group

    def outbox(self, to: int) -> Outbox:
        """A new outbox for the channel to rank ``to``."""
        self.outboxes.append(Outbox(to))
        return self.outboxes[-1]

    def check_open(self, peer: int | None) -> None:
        """Raises PeerLost where ``close`` was called."""
        if self.closed:
            raise PeerLost(peer, "this rank closed its connections")

    def close(self) -> None:
        """Severs every group, from any thread; a second call returns at once."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        for group in self._groups:
            group.sever()
        for outbox in self.outboxes:
            outbox.close()


class Arrival(Generic[T]):
    """A handle on sends and receives that were started, each with the peer at its other end.

    ``source`` is the peer of the first one that is not known to be over. Only waiting tells: gloo cannot be asked.
    """

    __slots__ = ("_error", "_finish", "_links", "_place", "_value", "_works", "source")

    def __init__(self, links: Links, works: _Works, finish: Callable[[], T]) -> None:
        self.source: int | None = works[0][0] if works else None
        self._links = links
        self._works = works
        self._place = 0
        self._finish: Callable[[], T] | None = finish
        self._value: T | None = None
        self._error: PeerLost | None = None
        if not works:
            self._settle()

    def ready(self) -> bool:
        return self._finish is None or self._error is not None

    def wait(self, timeout_s: float) -> None:
        if self._error is not None:
            raise self._error
        deadline = time.monotonic() + timeout_s
        while self._place < len(self._works):
            self.source, work = self._works[self._place]
            try:
                wait_for(work, self.source, deadline - time.monotonic(), timeout_s)
            except PeerLost as error:
                closed = PeerLost(self.source, "this rank closed its connections")
                self._error = closed if self._links.closed else error
                raise self._error from error.__cause__
            self._place += 1
        self._settle()

    def result(self) -> T:
        self.wait(0.0)
        return self._value  # type: ignore[return-value]

    def _settle(self) -> None:
        if self._finish is not None:
            self._value, self._finish = self._finish(), None
            self._works, self._place = (), 0


def trade(
    group: Group, given: Mapping[int, Iterable[torch.Tensor]], buffers: Mapping[int, Iterable[torch.Tensor]]
) -> _Works:
    """Sends to each peer of ``buffers`` what is ``given`` for it, and receives its tensors into them.

    Empty tensors do not travel.
    """
    works = [(peer, group.receive(each, peer)) for peer, theirs in buffers.items() for each in theirs if each.numel()]
    works += [(peer, group.send(each, peer)) for peer in buffers for each in given[peer] if each.numel()]
    return works
