"""Ray itself: found, or started on this machine and ended again."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from raypipe.driver import reaper
from raypipe.driver.ray_private import TOKEN_NOTICE, current_cluster
from raypipe.errors import ResourcesError

__all__ = ["Session", "start_ray"]

STOP_TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 5.0


@dataclass
class Session:
    """A connection to Ray.

    Attributes:
        started: whether this session started Ray; then it also ends it.
    """

    started: bool
    _reaper: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """Ends Ray and removes its files, where this session started it. May be called twice.

        Another trainer of this process may use the same Ray by now; then Ray ends with the process.
        """
        if not self.started:
            return
        if ray.is_initialized() and _others_at_work():
            return
        self.started = False
        ray.shutdown()
        if self._reaper is not None and self._reaper.stdin is not None:
            self._reaper.stdin.close()
            self._reaper.wait(STOP_TIMEOUT_S)


def start_ray(ranks: int, resources: Mapping[str, float] | None = None) -> Session:
    """Joins the Ray that is there, else starts one on this machine.

    In this order: Ray as this process has initialised it; the cluster of ``RAY_ADDRESS``; the cluster that
    ``ray start`` left on this machine; a new Ray with CPUs for all ranks, real or not, and this machine's GPUs.

    Args:
        ranks: how many ranks will run.
        resources: what each of them needs, or None for the default.

    Raises:
        ResourcesError: ``RAY_ADDRESS`` is set, but nothing answers there, or it is the address of Ray Client.
    """
    if ray.is_initialized():
        return Session(started=False)
    asked = os.environ.get("RAY_ADDRESS")
    if asked and asked != "local":
        if not _answers(asked):
            raise ResourcesError(
                f"no Ray answers at RAY_ADDRESS={asked}; give the host:port of a cluster that this machine can reach, "
                "or unset RAY_ADDRESS so that Ray is started on this machine"
            )
        return _join(asked)
    found = current_cluster()
    # The file of a cluster that has crashed since is still there.
    if asked != "local" and found is not None and _answers(found):
        return _join(found)
    cpus = ranks * (resources or {}).get("CPU", 1)
    return _start_here(max(math.ceil(cpus), os.cpu_count() or 1))


def _answers(address: str) -> bool:
    """Whether something listens there: Ray itself would go on trying for minutes."""
    if address == "auto":
        return True
    if address.startswith("ray://"):
        raise ResourcesError(
            f"RAY_ADDRESS={address} is the address of Ray Client, whose driver is outside the cluster; "
            "run the driver on the cluster, for example with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _join(address: str) -> Session:
    ray.init(address=address, logging_level=logging.WARNING)
    return Session(started=False)


def _start_here(cpus: int) -> Session:
    """A Ray of our own, in a folder of its own that goes with it."""
    # Ray's sockets live under this folder and a socket's path has 107 bytes at most: no long TMPDIR.
    folder = tempfile.mkdtemp(prefix="raypipe-", dir="/tmp" if os.name == "posix" else None)
    watcher = _start_reaper(folder)
    session = Session(started=True, _reaper=watcher)
    try:
        # A Ray that ray.init starts sends no usage statistics.
        with _own_token():
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING, _temp_dir=folder
            )
    except BaseException:
        session.stop()
        raise
    return session


def _start_reaper(folder: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(reaper.__file__)), folder, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@contextmanager
def _own_token() -> Iterator[None]:
    """A secret of this process for the Ray that it starts, unless the user has made a choice.

    Ray would write one to the home folder instead, and that file changes how every later ``ray start`` behaves.
    """
    if any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        yield
        return
    # It stays in the environment: Ray reads it once a process, so a second start must find the same.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    notice = logging.getLogger(TOKEN_NOTICE)
    before = notice.level
    notice.setLevel(logging.ERROR)
    try:
        yield
    finally:
        notice.setLevel(before)


def _others_at_work() -> bool:
    """Whether some placement group is still there: the caller has removed its own."""
    groups = ray.util.placement_group_table().values()
    return any(group["state"] != "REMOVED" for group in groups)
