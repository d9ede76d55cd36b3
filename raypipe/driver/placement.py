"""Where ranks stand: a tensor group on one node, a pipeline's stages next to their neighbours, replicas apart.

What crosses between the ranks of a tensor group is the most and waits the least, what crosses between stages comes
next, and replicas meet once a step: so nodes are filled in that order (as in Narayanan et al., "Efficient Large-Scale
Language Model Training on GPU Clusters Using Megatron-LM", 2021, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from raypipe.driver.rooms import Room, slots
from raypipe.topology import Topology

__all__ = ["arrange", "group_bundle"]


def group_bundle(bundle: Mapping[str, float], tensor: int) -> dict[str, float]:
    """The resources of a tensor group of so many ranks, which one node gives; Ray takes whole GPUs only above 1."""
    amounts = {name: amount * tensor for name, amount in bundle.items()}
    if amounts.get("GPU", 0.0) > 1:
        amounts["GPU"] = float(math.ceil(amounts["GPU"] - 1e-3))
    return amounts


def arrange(topology: Topology, group: Mapping[str, float], nodes: Sequence[Room]) -> tuple[int, ...] | None:
    """The node of each tensor group, in order of ranks, by what is free now.

    A replica goes whole to the node with the most room left, if it fits on one; else its stages fill the nodes one
    after the other, those with the most room first, so that few neighbours are parted.

    Args:
        topology: the grid of ranks.
        group: the resources of one tensor group.
        nodes: that are alive.

    Returns:
        For each replica and stage (``replica * stages + stage``) an index of ``nodes``; None where the groups do not
        all have room at the moment.
    """
    left = [slots(group, node.free) for node in nodes]
    if sum(left) < topology.replicas * topology.stages:
        return None
    places: list[int] = []
    for _ in range(topology.replicas):
        waiting = topology.stages
        while waiting:
            node = max(range(len(nodes)), key=lambda number: (left[number], -number))
            taken = min(waiting, left[node])
            places += [node] * taken
            left[node] -= taken
            waiting -= taken
    return tuple(places)
