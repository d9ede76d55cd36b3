"""Which ranks hold a parameter, which of them answers for it, and whose gradients are summed.

A stage of R replicas has R copies of its parameters, so each is a shared weight, as a tied one is: its gradient is the
sum over all holders. One holder owns it: it counts it in the global norm and, where the optimizer is sharded, steps it.

Whole parameters are dealt out, as PyTorch's ``ZeroRedundancyOptimizer`` does; ZeRO (Rajbhandari et al., 2020) cuts one
flat buffer into equal pieces instead. Pieces would be more even, but are exact only for an optimizer that looks at each
number alone; a whole parameter is exact for every optimizer, and its state keeps its name and shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raypipe.stage.spec import Gradients
from raypipe.topology import Topology

__all__ = ["deal", "gradients_of", "largest_part"]


def gradients_of(
    topology: Topology, held: Sequence[Sequence[str]], sizes: Mapping[str, int], *, sharded: bool = False
) -> Gradients:
    """Whose gradients are whose.

    Args:
        topology: the grid of ranks.
        held: for each stage the names of its parameters.
        sizes: the number of elements of every trainable parameter, in model order.
        sharded: whether owners are spread over the replicas; else all are in replica 0.
    """
    stages = {name: [stage for stage, names in enumerate(held) if name in names] for name in sizes}
    holders = {name: _ranks(topology, where, 0) for name, where in stages.items() if where}
    owners = deal(holders, sizes) if sharded else {name: ranks[0] for name, ranks in holders.items()}
    owned = tuple(tuple(name for name in holders if owners[name] == rank) for rank in range(topology.size))
    stepped = tuple(owned[topology.leader(rank)] for rank in range(topology.size)) if topology.tensor > 1 else ()
    shared: dict[tuple[int, ...], list[str]] = {}
    for name in holders:  # a rank of a tensor group shares its piece with those that hold the same
        for tensor in range(topology.tensor if len(holders[name]) > 1 else 0):
            shared.setdefault(_ranks(topology, stages[name], tensor), []).append(name)
    return Gradients(owned, tuple(holders), {ranks: tuple(names) for ranks, names in shared.items()}, stepped)


def _ranks(topology: Topology, stages: Sequence[int], tensor: int) -> tuple[int, ...]:
    return tuple(topology.rank(stage, replica, tensor) for replica in range(topology.replicas) for stage in stages)


def deal(holders: Mapping[str, Sequence[int]], sizes: Mapping[str, int]) -> dict[str, int]:
    """An owner for each parameter among its holders: the largest first, each to the holder that has least so far.

    Source: the rule "longest processing time first" (Graham, 1969), at most a third above the best deal.

    Args:
        holders: the ranks that hold each parameter.
        sizes: what each counts.
    """
    loads: dict[int, int] = {}
    owners: dict[str, int] = {}
    for name in sorted(holders, key=lambda name: -sizes[name]):  # stable: equal ones stay in model order
        owners[name] = min(holders[name], key=lambda rank: (loads.get(rank, 0), rank))
        loads[owners[name]] = loads.get(owners[name], 0) + sizes[name]
    return owners


def largest_part(sizes: Mapping[str, int], values: Mapping[str, int], replicas: int) -> int:
    """The most that a replica's part of one stage comes to.

    Args:
        sizes: the number of elements of each of the stage's trainable parameters, in model order; they decide the deal.
        values: what is added up of each, such as bytes of state.
        replicas: how many share.
    """
    owners = deal(dict.fromkeys(sizes, tuple(range(replicas))), sizes)
    return max(sum(values[name] for name in owners if owners[name] == rank) for rank in range(replicas))
