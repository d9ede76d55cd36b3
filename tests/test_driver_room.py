from __future__ import annotations

import time

import pytest
import ray

from raypipe.driver.cluster import Session
from raypipe.driver.room import Room, capacity, default_resources, refusal, reserve, rooms
from raypipe.errors import ResourcesError

NODES = [
    Room("10.0.0.1", {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.5}),
    Room("10.0.0.2", {"CPU": 3.0}, {"CPU": 0.0}),
]


def states() -> list[str]:
    return [group["state"] for group in ray.util.placement_group_table().values()]


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


def test_the_sentence_says_what_was_wanted_and_what_each_node_has() -> None:
    assert refusal({"GPU": 1}, 4, NODES, None) == (
        "4 ranks want GPU 1 each, but the whole cluster has room for 2: "
        "node 10.0.0.1 has GPU 2 (1.5 free); node 10.0.0.2 has GPU 0 (0 free); "
        "lower stages or resources_per_stage, add nodes, or end what else is running"
    )
    assert "and that much did not become free within 30 s: node" in refusal({"CPU": 1}, 4, NODES, 30.0)


@pytest.mark.ray
def test_what_can_never_fit_is_refused_at_once(ray_session: Session) -> None:
    began = time.monotonic()
    with pytest.raises(ResourcesError, match=r"3 ranks want CPU 9, GPU 1 each, but the whole cluster has room for 0"):
        reserve({"GPU": 1, "CPU": 9}, 3, timeout_s=30)
    assert time.monotonic() - began < 2


@pytest.mark.ray
def test_what_is_taken_is_refused_in_time_and_leaves_no_group(ray_session: Session) -> None:
    total = int(rooms()[0].total["CPU"])
    group = reserve({"CPU": 1}, total)
    began = time.monotonic()
    with pytest.raises(ResourcesError, match=r"did not become free within 1 s: node .* \(0 free\)"):
        reserve({"CPU": 1}, 2, timeout_s=1)
    assert time.monotonic() - began < 5
    assert states().count("CREATED") == 1
    ray.util.remove_placement_group(group)
    assert "CREATED" not in states()


@pytest.mark.ray
def test_without_gpus_a_rank_takes_one_cpu(ray_session: Session) -> None:
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    assert default_resources() == {"CPU": 1.0}
