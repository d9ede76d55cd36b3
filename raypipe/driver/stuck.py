"""Which rank is stuck: the one whose OWN action lasts too long, never one that waits for it. Pure: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypipe.errors import StageStuck
from raypipe.stage.protocol import Progress
from raypipe.topology import Topology

__all__ = ["View", "find_stuck"]


@dataclass(frozen=True, slots=True)
class View:
    """What the driver knows of one rank.

    Attributes:
        rank: the rank.
        finished: its call has come back.
        progress: its last answer, or None before the first.
        silent_s: seconds since it was asked, where it has not answered; else 0.
        waited_s: seconds since the driver waits for this call; an older clock says nothing about it.
    """

    rank: int
    finished: bool
    progress: Progress | None
    silent_s: float
    waited_s: float

    @property
    def idle(self) -> bool:
        """Whether it waits for a call or for another rank, as far as is known."""
        return self.progress is not None and (self.progress.waits_for is not None or self.progress.action == "idle")

    @property
    def seconds(self) -> float:
        """How long it has been at what it does, as far as the present call is concerned."""
        known = self.progress.seconds if self.progress is not None else 0.0
        return min(max(known, self.silent_s), self.waited_s)

    def line(self, topology: Topology) -> str:
        """What a person reads."""
        name = topology.label(self.rank)
        if self.finished:
            return f"{name}: finished"
        if self.progress is None:
            return f"{name}: has not answered for {self.silent_s:.0f} s"
        waits = "" if self.progress.waits_for is None else f", waits for rank {self.progress.waits_for}"
        silent = f", has not answered for {self.silent_s:.0f} s" if self.silent_s >= 1 else ""
        return f"{name}: at {self.progress.action} for {self.seconds:.0f} s{waits}{silent}"


def find_stuck(views: Sequence[View], limit_s: float, topology: Topology) -> tuple[int, StageStuck] | None:
    """The stuck rank and its error, or None.

    A rank that works by itself, or that does not answer, is stuck after ``limit_s`` seconds. Where every rank waits
    for another for so long, a message is missing or they wait in a circle: then the one that waits longest is named.
    """
    open_views = [view for view in views if not view.finished]
    working = [view for view in open_views if not view.idle or view.silent_s >= limit_s]
    candidates = [view for view in working or open_views if view.seconds >= limit_s]
    if not candidates or (not working and len(candidates) < len(open_views)):
        return None
    worst = max(candidates, key=lambda view: view.seconds)
    action = worst.progress.action if worst.progress is not None else "starting"
    lines = tuple(view.line(topology) for view in views)
    stage, replica = topology.place(worst.rank).stage, topology.replica_named(worst.rank)
    return worst.rank, StageStuck(stage, action, worst.seconds, lines, replica)
