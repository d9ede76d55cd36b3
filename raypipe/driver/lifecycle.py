"""Actors into the world, and out of it without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raypipe.driver.actors import CONTROL, StageActor
from raypipe.driver.cluster import Session
from raypipe.topology import Topology

__all__ = ["start_actors", "tear_down"]

FAREWELL_TIMEOUT_S = 1.0
KILL_TIMEOUT_S = 10.0


def start_actors(
    topology: Topology, bundle: Mapping[str, float], group: PlacementGroup, name: str, timeout_s: float
) -> list[Any]:
    """One actor a rank, in the bundle of its tensor group. They end with the driver: none is detached.

    Args:
        topology: the grid of ranks.
        bundle: the resources of one rank.
        group: the room for all of them.
        name: of this trainer alone; two trainers at once do not meet.
        timeout_s: how long a rank waits for a peer.
    """
    named = {"CPU", "GPU", "memory"}
    options: dict[str, Any] = {"memory": int(bundle["memory"])} if "memory" in bundle else {}
    remote = ray.remote(concurrency_groups={CONTROL: 2})  # type: ignore[call-overload]
    return [
        remote(StageActor)
        .options(
            name=f"{name}/rank {rank}",
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            resources={key: amount for key, amount in bundle.items() if key not in named},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=rank // topology.tensor
            ),
            max_restarts=0,
            **options,
        )
        .remote(topology, rank, timeout_s)
        for rank in range(topology.size)
    ]


def tear_down(actors: Sequence[Any], group: PlacementGroup | None, session: Session | None, untaken: set[Any]) -> None:
    """Ends actors, placement group and session; whatever is gone already is no error."""
    if ray.is_initialized():
        # First politely, so that workers can drop their files; a stopped process does not answer, so not for long.
        farewells = [actor.close.options(concurrency_group=CONTROL).remote() for actor in actors]
        if farewells:
            ray.wait(farewells, num_returns=len(farewells), timeout=FAREWELL_TIMEOUT_S)
        for actor in actors:
            ray.kill(actor)
        if group is not None:
            remove_placement_group(group)
        ends = [actor.node.remote() for actor in actors]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=KILL_TIMEOUT_S)
        # Ray prints every error that nobody took, some seconds later and below the user's own traceback.
        for call in untaken:
            with contextlib.suppress(Exception):
                ray.get(call, timeout=0)
        untaken.clear()
    if session is not None:
        session.stop()
