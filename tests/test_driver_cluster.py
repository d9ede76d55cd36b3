"""Ray as the trainer finds, starts and ends it: each test that starts one does so in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from raypipe.driver.cluster import Session, start_ray
from raypipe.errors import ResourcesError

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from driver_toys import builds, everywhere, nap, pids, topology, wiring
from raypipe.driver.ray_gang import launch

class Mine(Exception):
    def __init__(self, text, number):
        super().__init__(text, number)
        self.number = number

def mine(toy, step):
    raise Mine("of the script", 7)

def started(cpu):
    gang = launch(topology(2), builds(2), wiring(2), resources={{"CPU": cpu}})
    gang.wait(gang.train_step(0, gang.put({{}})))
    return gang

def ready():
    print("ready", flush=True)
    sys.stdin.readline()

{gang}
{body}
"""


@contextmanager
def script(body: str, gang: str = "gang = started(0.4)", **env: str) -> Iterator[subprocess.Popen[str]]:
    """A driver of its own, in a process group of its own as under a shell."""
    text = SCRIPT.format(tests=str(Path(__file__).parent), gang=gang, body=body)
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=quiet | env,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until_ready(process: subprocess.Popen[str]) -> tuple[list[Any], list[Path]]:
    """The script's processes and its Ray's folders, once it is at ``ready()``."""
    psutil = pytest.importorskip("psutil")
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            break
    else:
        assert process.stderr is not None
        pytest.fail(process.stderr.read())
    children = psutil.Process(process.pid).children(recursive=True)
    commands = " ".join(" ".join(child.cmdline()) for child in children)
    folders = [Path(name) for name in set(re.findall(r"/tmp/raypipe-\w+", commands))]
    assert len(children) >= 5
    assert len(folders) == 1
    return children, folders


def gone(children: list[Any], folders: list[Path]) -> bool:
    return not any(child.is_running() and child.status() != "zombie" for child in children) and not any(
        folder.exists() for folder in folders
    )


def seconds_until_gone(children: list[Any], folders: list[Path], limit_s: float) -> float:
    began = time.monotonic()
    while not gone(children, folders):
        if time.monotonic() - began > limit_s:
            pytest.fail(f"left after {limit_s} s: {[child for child in children if child.is_running()]}, {folders}")
        time.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.ray
def test_a_ray_that_runs_in_this_process_is_used_and_left(ray_session: Session) -> None:
    session = start_ray(4)
    assert not session.started
    session.stop()
    assert ray.is_initialized()


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_elsewhere_is_joined_and_left(ray_session: Session) -> None:
    address = ray.get_runtime_context().gcs_address
    env = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
    body = "import ray; print('nodes', ray.nodes()[0]['Resources']['CPU']); gang.close(); print(ray.is_initialized())"
    with script(body, RAY_ADDRESS=address, **env) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.split() == ["nodes", str(ray.cluster_resources()["CPU"]), "True"]
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "no Ray answers at RAY_ADDRESS=127.0.0.1:1; give the host:port of a cluster"),
        ("nonsense", "no Ray answers at RAY_ADDRESS=nonsense"),
        ("ray://127.0.0.1:10001", "is the address of Ray Client, whose driver is outside the cluster"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_at_once(
    address: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourcesError, match=sentence):
        start_ray(2)


@pytest.mark.slow
def test_a_failure_ends_with_the_users_traceback_and_leaves_nothing() -> None:
    body = "ready()\ntry:\n    gang.wait(gang.train_step(1, gang.put({1: mine})))\nfinally:\n    gang.close()"
    with script(body) as process:
        left = until_ready(process)
        _, err = process.communicate("go\n", timeout=60)
        assert process.returncode == 1
        # All was gone when the driver ended, but for the process that removes the folder.
        assert seconds_until_gone(*left, limit_s=3) < 3
    lines = err.rstrip().splitlines()
    assert lines[-1].endswith("Mine: ('of the script', 7)")
    assert "stage 1, action 0F0, microbatch 0, step 1 failed" in err
    assert "after the failure below, rank 0: raypipe.errors.PeerLost" in err
    assert "usage" not in err.lower()
    assert "token" not in err.lower()


@pytest.mark.slow
def test_the_users_own_exception_class_is_the_same_on_both_sides() -> None:
    body = """
try:
    gang.wait(gang.train_step(1, gang.put({1: mine})))
except Exception as error:
    print(type(error.cause) is Mine, error.cause.number)
"""
    with script(body) as process:
        out, err = process.communicate(timeout=60)
    assert out.split() == ["True", "7"], err


@pytest.mark.slow
def test_the_last_gang_ends_ray_and_a_later_one_starts_it_again() -> None:
    body = """
import ray
other = started(0.1)
gang.close()
print(ray.is_initialized(), len(other.wait(other.train_step(1, other.put({})))))
other.close()
third = started(1)
print(third._finalizer.alive)
third.close()
"""
    with script(body) as process:
        out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert out.split() == ["True", "2", "True"]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing() -> None:
    body = "pending = gang.train_step(1, gang.put({1: nap}))\nready()\nprint(gang.wait(pending))"
    with script(body) as process:
        left = until_ready(process)
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert err.rstrip().endswith("KeyboardInterrupt")
        assert seconds_until_gone(*left, limit_s=5) < 5


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_nothing() -> None:
    body = "pending = gang.train_step(1, gang.put({1: nap}))\nready()"
    with script(body) as process:
        left = until_ready(process)
        os.kill(process.pid, signal.SIGKILL)
        assert seconds_until_gone(*left, limit_s=30) < 30
