"""The ranks as Ray actors in one placement group."""

from __future__ import annotations

import logging
import secrets
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from raypipe.driver.actors import Build, bytes_of, outcome_of
from raypipe.driver.cluster import Session, start_ray
from raypipe.driver.failure import explains, first_cause
from raypipe.driver.gang import Pending
from raypipe.driver.interrupts import hold_interrupts
from raypipe.driver.lifecycle import start_actors, tear_down
from raypipe.driver.resources import check_resources
from raypipe.driver.room import default_resources, reserve
from raypipe.driver.status import Failed, GroupStatus, Outcome, Running
from raypipe.driver.stuck import find_stuck
from raypipe.driver.versions import NodeInfo, check_versions
from raypipe.driver.watch import Watch
from raypipe.topology import Topology
from raypipe.transport.base import Wiring

__all__ = ["RayGang", "launch"]

logger = logging.getLogger("raypipe.driver")

TICK_S = 0.25
"""How long one look at the calls lasts at most."""
QUIET_S = 5.0
"""A step shorter than this is never asked about."""
ASK_EVERY_S = 2.0
SETTLE_S = 0.3
"""How long the others' errors are collected once the cause is known."""
GRACE_S = 2.0
"""How long the cause may come after the news of it: neighbours hear of a death before Ray does."""
LONG_GRACE_S = 20.0
"""The same where a rank does not even answer: its whole node may be gone, which Ray knows after some 12 s."""
TOGETHER_BYTES = 16 * 2**20
"""Ranks whose builds are no larger together are built at the same time."""


def launch(
    topology: Topology,
    builds: Iterable[Build],
    wiring: Wiring,
    *,
    resources: Mapping[str, float] | None = None,
    session: Session | None = None,
    step_timeout_s: float = 300.0,
    first_step_timeout_s: float = 1800.0,
    room_timeout_s: float = 30.0,
) -> RayGang:
    """Finds or starts Ray, reserves room, starts the ranks and connects them.

    Args:
        topology: the grid of ranks.
        builds: one a rank: a cloudpickled callable without arguments that returns the rank's ``Worker``. They are
            taken and stored one by one, so that a generator never holds all weights at once.
        wiring: which ranks talk to which.
        resources: ``resources_per_stage``, or None for the default.
        session: Ray, which the caller ends; where it is None the gang finds or starts Ray, and ends what it started.
        step_timeout_s: a rank whose own action lasts longer is stuck.
        first_step_timeout_s: the same for the start and for the first step of each kind, which compile and warm up.
        room_timeout_s: how long to wait for room that is taken at the moment.

    Raises:
        ResourcesError: no room, or nodes that differ in versions.
        RaypipeError: a rank could not be built, as ``RayGang.wait``.
        TypeError, ValueError: ``resources`` is no dict of positive numbers.
    """
    asked = check_resources(resources)
    own = start_ray(topology.size, asked) if session is None else None
    group = None
    try:
        bundle = asked or default_resources()
        name = f"raypipe-{secrets.token_hex(4)}"
        group = reserve(bundle, topology, timeout_s=room_timeout_s, name=name)
        gang = RayGang(topology, group, bundle, name, own, step_timeout_s, first_step_timeout_s)
    except BaseException:
        tear_down((), group, own, set())
        raise
    try:
        gang.start(builds, wiring)
    except BaseException:
        gang.close()
        raise
    return gang


class RayGang:
    """A ``Gang`` of Ray actors; ``launch`` makes one."""

    def __init__(
        self,
        topology: Topology,
        group: PlacementGroup,
        bundle: Mapping[str, float],
        name: str,
        session: Session | None,
        step_timeout_s: float,
        first_step_timeout_s: float,
    ) -> None:
        self._topology = topology
        self._step_timeout_s, self._first_step_timeout_s = step_timeout_s, first_step_timeout_s
        self._known_kinds: set[str] = set()
        self._step = 0
        self._failure: GroupStatus | None = None
        # A wait for a peer ends later than the watch: the watch names the stuck rank, this only ends an orphan's wait.
        transport_timeout_s = max(step_timeout_s, first_step_timeout_s) + 60.0
        self._actors = start_actors(topology, bundle, group, name, transport_timeout_s)
        self._untaken: set[Any] = set()
        self._finalizer = weakref.finalize(self, tear_down, tuple(self._actors), group, session, self._untaken)

    @property
    def failure(self) -> GroupStatus | None:
        """What is known of every rank since ``wait`` raised."""
        return self._failure

    def start(self, builds: Iterable[Build], wiring: Wiring) -> None:
        """Compares versions, then builds and connects all ranks."""
        infos: list[NodeInfo] = self.wait(self._submit(0, "node", lambda actor, rank: actor.node.remote()))
        check_versions(NodeInfo.here(), infos)
        host = infos[0].ip
        (port,) = self.wait(self._submit(0, "rendezvous", lambda actor, rank: actor.serve.remote(host), ranks=1))
        self._build(builds)
        self.wait(
            self._submit(0, "start", lambda actor, rank: actor.connect.remote(host, port, infos[rank].ip, wiring))
        )

    def _build(self, builds: Iterable[Build]) -> None:
        """Has all workers built. The store holds one large slice at a time: the next one waits until that is taken."""
        calls: list[Any] = []
        given, stored, path = 0, 0, list(sys.path)
        for given, build in enumerate(builds, start=1):
            size = bytes_of(build)
            if stored and stored + size > TOGETHER_BYTES:
                self.wait(Pending(0, "start", tuple(calls)))
                stored = 0
            if given <= len(self._actors):
                with hold_interrupts():
                    calls.append(self._actors[given - 1].build.remote(ray.put(build), path))
                    self._untaken.add(calls[-1])
                stored += size
        if given != len(self._actors):
            raise ValueError(f"{given} builds were given for {len(self._actors)} ranks; give one for each")
        self.wait(Pending(0, "start", tuple(calls)))

    def put(self, value: Any) -> Any:
        """Stores a value once in the object store."""
        return ray.put(value)

    def train_step(self, step: int, batch: Any) -> Pending:
        """Queues a training step on all ranks, or on none."""
        name = f"train_step {step}"
        return self._submit(step, "train", lambda actor, rank: actor.train_step.options(name=name).remote(step, batch))

    def forward_step(self, step: int, batch: Any, kind: str, replica: int = 0) -> Pending:
        """Queues forwards only on all ranks, or on none."""
        name, own = f"{kind} {step}", set(self._topology.ranks_of(replica))

        def call(actor: Any, rank: int) -> Any:  # a batch of another replica's does not even travel
            return actor.forward_step.options(name=name).remote(step, batch if rank in own else None, kind)

        return self._submit(step, kind, call)

    def state(self) -> list[Any]:
        """The state of each rank of the first replica, whose ranks are the first."""
        step, ranks = self._step, len(self._topology.ranks_of(0))
        return self.wait(self._submit(step, "state", lambda actor, rank: actor.state.remote(step), ranks))

    def wait(self, pending: Pending) -> list[Any]:
        """The results in order of ranks, or the first cause; see ``Gang.wait``."""
        if self._failure is None:
            status = self._collect(pending)
            if not status.errors:
                self._known_kinds.add(pending.kind)
                return status.values
            self._failure = status
            for line in status.others(first_cause(status)):
                logger.warning("after the failure below, %s", line)
        raise first_cause(self._failure) from None

    def drop(self, pending: Pending) -> None:
        """Lets go of what a call returns, whenever it ends."""
        self._untaken.difference_update(pending.calls)

    def close(self) -> None:
        """Ends the actors, frees their room, and ends Ray where the gang started it."""
        with hold_interrupts():
            self._finalizer()

    def _submit(self, step: int, kind: str, call: Callable[[Any, int], Any], ranks: int | None = None) -> Pending:
        """One call on each rank. Ctrl-C waits meanwhile: a rank without the call would leave the others waiting."""
        self._step = step
        with hold_interrupts():
            pending = Pending(step, kind, tuple(call(actor, rank) for rank, actor in enumerate(self._actors[:ranks])))
            self._untaken.update(pending.calls)
        return pending

    def _collect(self, pending: Pending) -> GroupStatus:
        """Waits until all have finished, or one has failed and the cause is known, or one is stuck."""
        outcomes: list[Outcome] = [Running() for _ in pending.calls]
        limit_s = self._step_timeout_s if pending.kind in self._known_kinds else self._first_step_timeout_s
        watch = Watch(self._actors[: len(outcomes)])
        began = time.monotonic()
        ask_at, ask_every = began + min(QUIET_S, limit_s / 2), min(ASK_EVERY_S, limit_s / 4)
        failed_at: float | None = None
        while True:
            self._take(pending, outcomes)
            status, now = GroupStatus(tuple(outcomes)), time.monotonic()
            if not status.running:
                return status
            if status.errors:
                if failed_at is None:
                    failed_at = now
                    watch.poll(status.running)
                if now - failed_at >= _patience(status, watch):
                    return status
            elif now >= ask_at:
                ask_at = now + ask_every
                watch.poll(status.running)
                if stuck := find_stuck(watch.views(status.running), limit_s, self._topology):
                    rank, error = stuck
                    outcomes[rank] = Failed(error)
                    return GroupStatus(tuple(outcomes))

    def _take(self, pending: Pending, outcomes: list[Outcome]) -> None:
        """Takes what has come; blocks for a moment where nothing has."""
        rank_of = {call: rank for rank, call in enumerate(pending.calls) if isinstance(outcomes[rank], Running)}
        calls = list(rank_of)
        if ray.wait(calls, num_returns=1, timeout=TICK_S)[0]:
            for call in ray.wait(calls, num_returns=len(calls), timeout=0)[0]:
                outcomes[rank_of[call]] = outcome_of(call, rank_of[call], pending.step, self._topology)
                self._untaken.discard(call)


def _patience(status: GroupStatus, watch: Watch) -> float:
    """How long to wait for more after the first failure."""
    if explains(status):
        return SETTLE_S
    silent = any(view.silent_s > GRACE_S / 2 for view in watch.views(status.running))
    return LONG_GRACE_S if silent else GRACE_S
