"""A rank as a Ray actor, and what Ray says of it when a call fails: the only reader of Ray's exceptions."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from raypipe.driver.status import Failed, Finished, Outcome
from raypipe.driver.versions import NodeInfo
from raypipe.errors import PeerLost, RaypipeError, StageError, StageLost
from raypipe.stage.allocator import keep_freed_memory
from raypipe.stage.protocol import Progress, RankWork, Worker, run_blocking
from raypipe.topology import Topology
from raypipe.transport.base import Wiring
from raypipe.transport.process_group import ProcessGroupTransport
from raypipe.transport.rendezvous import join_store, serve_store

__all__ = ["CONTROL", "Build", "StageActor", "bytes_of", "outcome_of"]

T = TypeVar("T")

Build = bytes | tuple[bytes, Sequence[Any]]

"""What makes a rank's worker: a pickle, with its buffers where they stand apart."""

CONTROL = "control"
"""The concurrency group of the calls that are answered while a step runs."""


class StageActor:
    """Hosts one rank's worker. A plain class: ``ray.remote`` is put around it where it is started."""

    def __init__(self, topology: Topology, rank: int, timeout_s: float) -> None:
        self._topology, self._rank, self._timeout_s = topology, rank, timeout_s
        self._began = time.monotonic()
        self._built: Worker | None = None  # and not yet connected
        self._worker: Worker | None = None
        self._store: TCPStore | None = None
        self._ended: str | None = None

    def __repr__(self) -> str:
        # The dashboard's name for the actor, and the prefix of what it prints.
        return self._topology.label(self._rank)

    def node(self) -> NodeInfo:
        """Where this rank runs, and the software there."""
        return NodeInfo.here()

    def serve(self, host: str) -> int:
        """Opens the store where the ranks find each other; the port. One rank does this and keeps it."""

        def work() -> int:
            self._store, port = serve_store(host)
            return port

        return self._run(0, "rendezvous", work)

    def build(self, build: Build, path: Sequence[str]) -> None:
        """Builds the worker; what it was built from is let go of when this returns.

        Args:
            build: a cloudpickled callable without arguments that returns the rank's ``Worker``, with its buffers where
                they stand apart.
            path: the driver's ``sys.path``, so that the user's modules are found where they exist here.
        """

        def work() -> None:
            keep_freed_memory()
            sys.path.extend(entry for entry in path if entry not in sys.path and Path(entry).exists())
            data, buffers = build if isinstance(build, tuple) else (build, ())
            self._built = cloudpickle.loads(data, buffers=buffers)()

        self._run(0, "start", work)

    def connect(self, host: str, port: int, own_host: str, wiring: Wiring) -> None:
        """Connects the worker to the others.

        Args:
            host: where the store is.
            port: its port.
            own_host: the address of this rank's node, for its peers.
            wiring: which ranks talk to which.
        """

        def work() -> None:
            store = join_store(host, port, self._timeout_s) if self._store is None else self._store
            transport = ProcessGroupTransport(store, self._rank, wiring, timeout_s=self._timeout_s, host=own_host)
            if self._built is None:
                raise PeerLost(None, "this rank was not built")
            if self._topology.tensor > 1:
                self._built.join(store, self._timeout_s)
            self._built.connect(transport)
            self._worker = self._built
            # What is there now stays: the collector need not look at it again in the middle of an action.
            gc.collect()
            gc.freeze()

        self._run(0, "start", work)

    def train_step(self, step: int, batch: Any) -> Any:
        """One training step; its small report."""
        return self._step(step, "train_step", lambda worker: worker.train_step(step, batch))

    def forward_step(self, step: int, batch: Any, kind: str) -> Any:
        """Forwards only."""
        return self._step(step, kind, lambda worker: worker.forward_step(step, batch, kind))

    def state(self, step: int) -> Any:
        """The worker's state."""
        return self._run(step, "state", self._started().state)

    def progress(self) -> Progress:
        """What this rank is doing. In the control group."""
        if self._worker is None:
            return Progress(step=0, action="starting", seconds=time.monotonic() - self._began)
        return self._worker.progress()

    def close(self) -> None:
        """Closes the worker, so that its peers fail at once. In the control group."""
        self._end("it was closed")

    def _step(self, step: int, action: str, begin: Callable[[Worker], RankWork[T]]) -> T:
        return self._run(step, action, lambda: run_blocking(begin(self._started()), self._timeout_s))

    def _started(self) -> Worker:
        if self._worker is None:
            raise PeerLost(None, "this rank was not started")
        return self._worker

    def _run(self, step: int, action: str, work: Callable[[], T]) -> T:
        """Runs ``work``; a rank that failed once tells its peers and answers whatever is queued at once."""
        if self._ended is not None:
            raise PeerLost(None, f"rank {self._rank} does no more work: {self._ended}")
        try:
            return work()
        except BaseException as error:  # SystemExit too: Ray would take it for the actor's own wish to end
            self._end(f"it failed in step {step}")
            if isinstance(error, RaypipeError):
                raise
            stage, replica = self._topology.place(self._rank).stage, self._topology.replica_named(self._rank)
            raise StageError(stage, action, step, error, replica=replica) from None

    def _end(self, why: str) -> None:
        self._ended = self._ended or why
        if self._worker is not None:
            # The error on its way to the user counts, not one of closing after it.
            with contextlib.suppress(Exception):
                self._worker.close()


def bytes_of(build: Build) -> int:
    """How much memory a build takes in the object store."""
    return len(build) if isinstance(build, bytes) else len(build[0]) + sum(each.nbytes for each in build[1])


def outcome_of(call: ray.ObjectRef[Any], rank: int, step: int, topology: Topology) -> Outcome:
    """Takes a call's result, which must be there, and translates what Ray raises in its place."""
    stage, replica = topology.place(rank).stage, topology.replica_named(rank)
    try:
        return Finished(ray.get(call))
    except RayTaskError as error:
        # Ray's exception is an instance of the cause's class and hides its attributes: the cause is inside.
        cause = error.cause
        if isinstance(cause, RaypipeError):
            return Failed(cause)
        return Failed(StageError(stage, "call", step, cause, trace=str(error), replica=replica))
    except (RayActorError, WorkerCrashedError) as error:
        return Failed(StageLost(stage, rank, _reason(error), step, replica))
    except Exception as error:
        # An argument that was lost, a result that this process cannot read, Ray out of memory.
        return Failed(StageError(stage, "call", step, error, replica=replica))


def _reason(error: Exception) -> str:
    """What Ray knows of a death, without its table of fields and its list of guesses."""
    text = str(error).strip()
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return text  # it ends with the traceback
    lines = [line.strip() for line in text.splitlines() if not line.startswith("\t")]
    known = " ".join(lines[1:] or lines)
    return known.split(" Some common causes include")[0]
