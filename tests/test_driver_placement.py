from __future__ import annotations

import pytest

from raypipe.driver.placement import arrange, group_bundle
from raypipe.driver.rooms import Room
from raypipe.topology import Topology


def nodes(*cpus: float) -> list[Room]:
    return [Room(f"10.0.0.{n}", {"CPU": 16.0}, {"CPU": free}, str(n)) for n, free in enumerate(cpus)]


CPU = {"CPU": 1.0}


@pytest.mark.parametrize(
    ("topology", "free", "expected"),
    [
        (Topology(4), (4,), (0, 0, 0, 0)),
        (Topology(4), (2, 8), (1, 1, 1, 1)),  # together where they fit
        (Topology(4), (2, 3), (1, 1, 1, 0)),  # one cut
        (Topology(2, replicas=2), (4, 4), (0, 0, 1, 1)),  # replicas apart
        (Topology(2, replicas=2), (4, 1), (0, 0, 0, 0)),  # unless that would part neighbours
        (Topology(3, replicas=2), (3, 3, 1), (0, 0, 0, 1, 1, 1)),
        (Topology(4, replicas=2), (5, 5), (0, 0, 0, 0, 1, 1, 1, 1)),
        (Topology(1, replicas=3), (2, 2, 2), (0, 1, 2)),
    ],
)
def test_stages_stand_together_and_replicas_apart(
    topology: Topology, free: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    assert arrange(topology, CPU, nodes(*free)) == expected


def test_a_tensor_group_is_never_parted() -> None:
    topology = Topology(2, tensor=2)
    group = group_bundle(CPU, topology.tensor)
    assert arrange(topology, group, nodes(3, 3)) == (0, 1)  # a third CPU of a node is no use
    assert arrange(topology, group, nodes(1, 1, 1, 1)) is None


def test_without_room_now_nothing_is_arranged() -> None:
    assert arrange(Topology(4), CPU, nodes(2, 1)) is None
    assert arrange(Topology(4), {"GPU": 1.0}, nodes(8)) is None


@pytest.mark.parametrize(
    ("bundle", "tensor", "together"),
    [
        ({"CPU": 1.0, "GPU": 0.25}, 4, {"CPU": 4.0, "GPU": 1.0}),
        ({"GPU": 0.25}, 2, {"GPU": 0.5}),
        ({"GPU": 0.4}, 3, {"GPU": 2.0}),  # Ray refuses 1.2
        ({"GPU": 1.0}, 2, {"GPU": 2.0}),
    ],
)
def test_a_groups_bundle(bundle: dict[str, float], tensor: int, together: dict[str, float]) -> None:
    assert group_bundle(bundle, tensor) == together
