"""What was sent to one rank and has not gone yet."""

from __future__ import annotations

import threading
import time
from collections import deque

from torch.distributed.distributed_c10d import Work

from raypipe.errors import PeerLost
from raypipe.transport.gloo import wait_for

__all__ = ["Flush", "Outbox"]

_FEW = 4
_LOOK_EVERY_S, _LOOK_AT_LEAST_EVERY_S = 0.05, 1.0
_FOREVER_S = 10 * 365 * 86400.0  # a late receiver is no fault of the sender: deadlines belong to waits


class Outbox:
    """Holds each message of one channel until it has gone, then lets go of its memory.

    A send of gloo says that it is complete only to whoever waits for it, so a thread waits. Waking it for each message
    would cost the computing thread as much as the send itself (0.1 ms where its caches are cold): it looks by itself
    every 50 ms, or when four messages have come together, or when somebody waits.
    """

    def __init__(self, to: int) -> None:
        self.to = to
        self.put_count = 0
        self._gone_count = 0
        self._lost: PeerLost | None = None
        self._works: deque[Work] = deque()
        self._wake, self._closed = threading.Event(), False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._drain, name=f"raypipe-outbox-{to}", daemon=True)
        self._thread.start()

    def put(self, work: Work) -> None:
        """Takes a send that was started."""
        self._works.append(work)
        self.put_count += 1
        if len(self._works) >= _FEW:
            self._wake.set()

    def gone(self, count: int) -> bool:
        """Whether the first ``count`` sends are over."""
        return self._gone_count >= count

    def wait(self, count: int, left_s: float, timeout_s: float) -> None:
        """Blocks for up to ``left_s`` seconds until the first ``count`` sends have gone.

        Raises:
            PeerLost: one of them failed, or the time went by; ``timeout_s`` is the caller's whole limit, for the text.
        """
        self._wake.set()
        with self._change:
            if not self._change.wait_for(lambda: self._gone_count >= count, max(left_s, 0.0)):
                raise PeerLost(self.to, f"it took nothing for {timeout_s:g} s")
            if self._lost is not None:
                raise self._lost

    def close(self) -> None:
        """Ends the thread. The connection must be severed already, or the thread may wait for the peer."""
        self._closed = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _drain(self) -> None:
        pause = _LOOK_EVERY_S
        while not self._closed or self._works:
            found = bool(self._works)
            while self._works:
                self._see_off(self._works.popleft())
            pause = _LOOK_EVERY_S if found else min(2 * pause, _LOOK_AT_LEAST_EVERY_S)
            if not self._closed:
                self._wake.wait(pause)
                self._wake.clear()

    def _see_off(self, work: Work) -> None:
        lost = None
        try:
            wait_for(work, self.to, _FOREVER_S, _FOREVER_S)
        except PeerLost as error:
            lost = error
        del work  # it holds the tensor
        with self._change:
            self._lost = self._lost or lost
            self._gone_count += 1
            self._change.notify_all()


class Flush:
    """A handle on everything that was put into ``outboxes`` before it was made."""

    def __init__(self, outboxes: list[Outbox]) -> None:
        self._marks = [(outbox, outbox.put_count) for outbox in outboxes]
        self.source: int | None = self._marks[0][0].to if self._marks else None

    def ready(self) -> bool:
        return all(outbox.gone(count) for outbox, count in self._marks)

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for outbox, count in self._marks:
            self.source = outbox.to
            outbox.wait(count, deadline - time.monotonic(), timeout_s)

    def result(self) -> None:
        return None
