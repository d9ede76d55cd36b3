"""All ranks in this process and one thread: no Ray, breakpoints work.

Each rank's work is a generator that yields where it would wait. A rank runs until what it yielded is not there yet,
then the next one does, always in the same order, so a run is deterministic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raypipe.driver.failure import first_cause
from raypipe.driver.gang import Pending
from raypipe.driver.status import Failed, Finished, GroupStatus, Outcome, Running
from raypipe.errors import PeerLost
from raypipe.stage.protocol import RankWork, Worker
from raypipe.topology import Topology
from raypipe.transport.memory import MemoryHub

__all__ = ["LocalGang"]


class LocalGang:
    """A ``Gang`` in this process.

    Args:
        builds: one a rank: makes its worker.
        topology: the grid of ranks; None: one pipeline.
    """

    def __init__(self, builds: Sequence[Callable[[], Worker]], topology: Topology | None = None) -> None:
        self._topology = Topology(len(builds)) if topology is None else topology
        self._threads = torch.get_num_threads()
        self._failure: GroupStatus | None = None
        self._workers: list[Worker] = []
        try:
            hub = MemoryHub(len(builds))
            for rank, build in enumerate(builds):
                self._workers.append(build())
                self._workers[rank].connect(hub.transport(rank))
        finally:
            self._rank_threads = torch.get_num_threads()
            torch.set_num_threads(self._threads)

    @property
    def failure(self) -> GroupStatus | None:
        """What is known of every rank since ``wait`` raised."""
        return self._failure

    def put(self, value: Any) -> Any:
        """The value itself."""
        return value

    def train_step(self, step: int, batch: Any) -> Pending:
        """Begins a training step on all ranks; it runs in ``wait``."""
        return Pending(step, "train", tuple(worker.train_step(step, batch) for worker in self._workers))

    def forward_step(self, step: int, batch: Any, kind: str, replica: int = 0) -> Pending:
        """Begins forwards only on all ranks; they run in ``wait``."""
        own = set(self._topology.ranks_of(replica))
        works = (w.forward_step(step, batch if rank in own else None, kind) for rank, w in enumerate(self._workers))
        return Pending(step, kind, tuple(works))

    def state(self) -> list[Any]:
        """The state of each rank of the first replica."""
        return [self._workers[rank].state() for rank in self._topology.ranks_of(0)]

    def wait(self, pending: Pending) -> list[Any]:
        """Runs the ranks to their ends; see ``Gang.wait``. The caller's random state and threads stay as they are."""
        if self._failure is None:
            random_state = torch.get_rng_state()
            torch.set_num_threads(self._rank_threads)
            try:
                status = _run(pending.calls)
            finally:
                torch.set_num_threads(self._threads)
                torch.set_rng_state(random_state)
            if not status.errors:
                return status.values
            self._failure = status
            self.close()
            for work in pending.calls:
                with contextlib.suppress(Exception):  # of a rank that was stopped half-way
                    work.close()
        raise first_cause(self._failure) from None

    def drop(self, pending: Pending) -> None:
        """Forgets the call, which no rank has begun: calls run in ``wait``."""
        for work in pending.calls:
            work.close()

    def close(self) -> None:
        """Closes every worker."""
        for worker in self._workers:
            worker.close()


def _run(works: Sequence[RankWork[Any]]) -> GroupStatus:
    """Runs the ranks in turns until all have ended or one has failed."""
    outcomes: list[Outcome] = [Running() for _ in works]
    waiting: list[Any] = [None] * len(works)
    while True:
        moved = False
        for rank, work in enumerate(works):
            while isinstance(outcomes[rank], Running) and (waiting[rank] is None or waiting[rank].ready()):
                moved = True
                try:
                    waiting[rank] = next(work)
                except StopIteration as stop:
                    outcomes[rank] = Finished(stop.value)
                except Exception as error:
                    outcomes[rank] = Failed(error)
                    return GroupStatus(tuple(outcomes))
        if all(isinstance(outcome, Finished) for outcome in outcomes):
            return GroupStatus(tuple(outcomes))
        if not moved:
            stuck = next(rank for rank, outcome in enumerate(outcomes) if isinstance(outcome, Running))
            outcomes[stuck] = Failed(PeerLost(waiting[stuck].source, "no rank can go on"))
            return GroupStatus(tuple(outcomes))
