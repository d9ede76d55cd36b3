"""Room for all ranks at once: a placement group, or one sentence about what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raypipe.driver.ray_private import free_by_node
from raypipe.errors import ResourcesError

__all__ = ["Room", "capacity", "default_resources", "refusal", "reserve", "rooms"]


@dataclass(frozen=True, slots=True)
class Room:
    """A node's resources: all, and what is free now."""

    ip: str
    total: dict[str, float]
    free: dict[str, float]


def default_resources() -> dict[str, float]:
    """One CPU a rank; stages do not run on GPUs yet, so none is taken from others."""
    return {"CPU": 1.0}


def rooms() -> list[Room]:
    """Every node that is alive."""
    free = free_by_node()
    return [
        Room(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def capacity(bundle: Mapping[str, float], nodes: list[Room]) -> int:
    """How many ranks the nodes could hold if nothing else ran on them."""
    # A hair above, since a share such as 1/3 is stored by Ray to four decimals.
    return sum(
        min(math.floor(node.total.get(name, 0.0) / amount + 1e-3) for name, amount in bundle.items()) for node in nodes
    )


def refusal(bundle: Mapping[str, float], ranks: int, nodes: list[Room], waited_s: float | None) -> str:
    """The sentence: what was wanted, what every node has, what to change."""
    names = sorted(bundle)
    have = "; ".join(
        f"node {node.ip} has "
        + ", ".join(f"{name} {node.total.get(name, 0.0):g} ({node.free.get(name, 0.0):g} free)" for name in names)
        for node in nodes
    )
    each = ", ".join(f"{name} {bundle[name]:g}" for name in names)
    if waited_s is None:
        why = f"but the whole cluster has room for {capacity(bundle, nodes)}"
    else:
        why = f"and that much did not become free within {waited_s:g} s"
    return (
        f"{ranks} ranks want {each} each, {why}: {have}; "
        "lower stages or resources_per_stage, add nodes, or end what else is running"
    )


def reserve(bundle: Mapping[str, float], ranks: int, *, timeout_s: float = 30.0, name: str = "") -> PlacementGroup:
    """Reserves ``bundle`` once for each rank, all or nothing.

    Raises:
        ResourcesError: at once where the cluster could never hold them, else after ``timeout_s`` seconds.
    """
    nodes = rooms()
    if capacity(bundle, nodes) < ranks:
        raise ResourcesError(refusal(bundle, ranks, nodes, None))
    group: PlacementGroup = placement_group([dict(bundle)] * ranks, strategy="PACK", name=name)
    try:
        if not group.wait(timeout_s):
            raise ResourcesError(refusal(bundle, ranks, rooms(), timeout_s))
    except BaseException:
        remove_placement_group(group)
        raise
    return group
