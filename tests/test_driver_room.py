from __future__ import annotations

import ast
import os
import subprocess
import sys
import time

import pytest
import ray

from raypipe.driver.cluster import Session
from raypipe.driver.room import default_resources, refusal, reserve
from raypipe.driver.rooms import Room, rooms
from raypipe.errors import ResourcesError
from raypipe.topology import Topology

NODES = [
    Room("10.0.0.1", {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.5}),
    Room("10.0.0.2", {"CPU": 3.0}, {"CPU": 0.0}),
]


def states() -> list[str]:
    return [group["state"] for group in ray.util.placement_group_table().values()]


def test_the_sentence_says_what_was_wanted_and_what_each_node_has() -> None:
    assert refusal({"GPU": 1}, Topology(4), NODES, None) == (
        "4 ranks want GPU 1 each, but the whole cluster has room for 2: "
        "node 10.0.0.1 has GPU 2 (1.5 free); node 10.0.0.2 has GPU 0 (0 free); "
        "lower stages or resources_per_stage, add nodes, or end what else is running"
    )
    assert "and that much did not become free within 30 s: node" in refusal({"CPU": 1}, Topology(4), NODES, 30.0)


def test_a_tensor_group_wants_one_node() -> None:
    sentence = refusal({"CPU": 2}, Topology(2, replicas=2, tensor=2), NODES, None)
    assert sentence.startswith(
        "8 ranks want CPU 2 each, 2 together on one node, but the whole cluster has room for 4: "
    )
    assert "; lower stages, data_parallel, tensor_parallel or resources_per_stage" in sentence


@pytest.mark.ray
def test_what_can_never_fit_is_refused_at_once(ray_session: Session) -> None:
    began = time.monotonic()
    with pytest.raises(ResourcesError, match=r"3 ranks want CPU 9, GPU 1 each, but the whole cluster has room for 0"):
        reserve({"GPU": 1, "CPU": 9}, Topology(3), timeout_s=30)
    assert time.monotonic() - began < 2


@pytest.mark.ray
def test_what_is_taken_is_refused_in_time_and_leaves_no_group(ray_session: Session) -> None:
    total = int(rooms()[0].total["CPU"])
    group = reserve({"CPU": 1}, Topology(total))
    began = time.monotonic()
    with pytest.raises(ResourcesError, match=r"did not become free within 1 s: node .* \(0 free\)"):
        reserve({"CPU": 1}, Topology(2), timeout_s=1)
    assert time.monotonic() - began < 5
    assert states().count("CREATED") == 1
    ray.util.remove_placement_group(group)
    assert "CREATED" not in states()


@pytest.mark.ray
def test_without_gpus_a_rank_takes_one_cpu(ray_session: Session) -> None:
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    assert default_resources() == {"CPU": 1.0}


THREE_NODES = """
import sys
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from raypipe.driver.room import reserve
from raypipe.topology import Topology

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
for cpus in (4, 4):
    cluster.add_node(num_cpus=cpus)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
for topology in (Topology(2, replicas=2), Topology(2, replicas=2, tensor=2), Topology(4)):
    group = reserve({"CPU": 1}, topology, timeout_s=20)
    nodes = placement_group_table(group)["bundles_to_node_id"]
    print(topology.size, [nodes[bundle] for bundle in sorted(nodes)])
    ray.util.remove_placement_group(group)
    while ray.available_resources().get("CPU", 0) < 9:
        pass
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_on_several_nodes_replicas_stand_apart_and_their_stages_together() -> None:
    told = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", THREE_NODES], env=told, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [ast.literal_eval(line[line.index("[") :]) for line in done.stdout.splitlines() if "[" in line]
    assert [len(line) for line in lines] == [4, 4, 4]
    for places in lines[:2]:  # the second with two ranks in each bundle
        assert places[0] == places[1] != places[2] == places[3]
    assert len(set(lines[2])) == 1
