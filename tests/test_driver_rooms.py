from __future__ import annotations

import pytest
import ray

from raypipe.driver.cluster import Session
from raypipe.driver.rooms import Room, capacity, rooms, slots

NODES = [
    Room("10.0.0.1", {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.5}),
    Room("10.0.0.2", {"CPU": 3.0}, {"CPU": 0.0}),
]


@pytest.mark.parametrize(
    ("bundle", "ranks"),
    [
        ({"CPU": 1}, 11),
        ({"CPU": 2}, 5),
        ({"GPU": 1}, 2),
        ({"GPU": 1 / 3}, 6),
        ({"GPU": 1, "CPU": 6}, 1),
        ({"TPU": 1}, 0),
    ],
)
def test_capacity_is_counted_node_by_node(bundle: dict[str, float], ranks: int) -> None:
    assert capacity(bundle, NODES) == ranks


def test_slots_are_those_of_the_scarcest_resource() -> None:
    assert slots({"CPU": 2, "GPU": 0.5}, NODES[0].free) == 3
    assert slots({"CPU": 4, "GPU": 0.5}, NODES[0].free) == 2
    assert slots({"CPU": 1}, {}) == 0


@pytest.mark.ray
def test_every_node_is_seen_with_its_id_and_what_is_free(ray_session: Session) -> None:
    (room,) = rooms()
    assert room.id == ray.get_runtime_context().get_node_id()
    assert 0 <= room.free.get("CPU", 0.0) <= room.total["CPU"]  # what is taken whole is left out
