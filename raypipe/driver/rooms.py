"""What the nodes of the cluster have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from raypipe.driver.ray_private import free_by_node

__all__ = ["Room", "capacity", "rooms", "slots"]


@dataclass(frozen=True, slots=True)
class Room:
    """A node's resources: all, and what is free now."""

    ip: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    id: str = ""


def rooms() -> list[Room]:
    """Every node that is alive."""
    free = free_by_node()
    return [
        Room(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}), node["NodeID"])
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def slots(bundle: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many times ``resources`` hold ``bundle``."""
    # A hair above, since a share such as 1/3 is stored by Ray to four decimals.
    return min(math.floor(resources.get(name, 0.0) / amount + 1e-3) for name, amount in bundle.items())


def capacity(bundle: Mapping[str, float], nodes: Sequence[Room]) -> int:
    """How many such bundles the nodes could hold if nothing else ran on them."""
    return sum(slots(bundle, node.total) for node in nodes)
