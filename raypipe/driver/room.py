"""Room for all ranks at once: a placement group, or one sentence about what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raypipe.driver.placement import arrange, group_bundle
from raypipe.driver.rooms import Room, capacity, rooms
from raypipe.errors import ResourcesError
from raypipe.topology import Topology

__all__ = ["default_resources", "refusal", "reserve"]

NODE_LABEL = "ray.io/node-id"
"""Ray gives every node this label."""


def default_resources() -> dict[str, float]:
    """One CPU a rank; stages do not run on GPUs yet, so none is taken from others."""
    return {"CPU": 1.0}


def refusal(bundle: Mapping[str, float], topology: Topology, nodes: Sequence[Room], waited_s: float | None) -> str:
    """The sentence: what was wanted, what every node has, what to change."""
    names = sorted(bundle)
    have = "; ".join(
        f"node {node.ip} has "
        + ", ".join(f"{name} {node.total.get(name, 0.0):g} ({node.free.get(name, 0.0):g} free)" for name in names)
        for node in nodes
    )
    each = ", ".join(f"{name} {bundle[name]:g}" for name in names)
    together = f", {topology.tensor} together on one node" if topology.tensor > 1 else ""
    if waited_s is None:
        possible = capacity(group_bundle(bundle, topology.tensor), nodes) * topology.tensor
        why = f"but the whole cluster has room for {possible}"
    else:
        why = f"and that much did not become free within {waited_s:g} s"
    change = [
        "stages",
        *(["data_parallel"] if topology.replicas > 1 else []),
        *(["tensor_parallel"] if topology.tensor > 1 else []),
    ]
    return (
        f"{topology.size} ranks want {each} each{together}, {why}: {have}; "
        f"lower {', '.join(change)} or resources_per_stage, add nodes, or end what else is running"
    )


def reserve(
    bundle: Mapping[str, float], topology: Topology, *, timeout_s: float = 30.0, name: str = ""
) -> PlacementGroup:
    """Reserves room for all ranks, all or nothing: one bundle for each tensor group, in order of ranks.

    Where there is room now, the nodes are chosen as ``placement.arrange`` says; where it must become free first, Ray
    packs the bundles.

    Args:
        bundle: the resources of one rank.
        topology: the grid of ranks.
        timeout_s: how long to wait for room that is taken, in seconds.
        name: of the placement group.

    Raises:
        ResourcesError: at once where the cluster could never hold them, else after ``timeout_s`` seconds.
    """
    nodes, group = rooms(), group_bundle(bundle, topology.tensor)
    count = topology.replicas * topology.stages
    if capacity(group, nodes) < count:
        raise ResourcesError(refusal(bundle, topology, nodes, None))
    places = arrange(topology, group, nodes)
    labels = None if places is None else [{NODE_LABEL: nodes[place].id} for place in places]
    reserved: PlacementGroup = placement_group(
        [group] * count, strategy="PACK", name=name, bundle_label_selector=labels
    )
    try:
        if not reserved.wait(timeout_s):
            raise ResourcesError(refusal(bundle, topology, rooms(), timeout_s))
    except BaseException:
        remove_placement_group(reserved)
        raise
    return reserved
