"""Clears up after a driver that was killed: run as a script, beside every Ray that the trainer started itself.

The kernel ends the processes that Ray's driver started, and Ray's workers end with them. But its agents on the node
live on for about a minute, and nobody removes the session's folder. So this process waits until its standard input
closes or its parent is gone, ends whatever still writes into the folder, and removes it. It imports nothing but the
standard library, and it is no child of the terminal, so Ctrl-C does not reach it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

__all__ = ["clear", "wait_for_driver", "writers"]

GRACE_S = 5.0
POLL_S = 0.5


def wait_for_driver(driver: int) -> None:
    """Returns when standard input closes, or when the driver is gone though a fork of it keeps that open."""
    while os.getppid() == driver:
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            return


def writers(folder: str) -> list[int]:
    """The processes with a file in ``folder`` open for writing (readers, such as a ``tail -f``, are not ours)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(_writes(process, fd, folder) for fd in os.listdir(process / "fd")):
                found.append(int(process.name))
        except OSError:  # it ended meanwhile, or belongs to someone else
            continue
    return found


def _writes(process: Path, fd: str, folder: str) -> bool:
    if not os.readlink(process / "fd" / fd).startswith(folder + "/"):
        return False
    fields = dict(line.split(":", 1) for line in (process / "fdinfo" / fd).read_text().splitlines() if ":" in line)
    return int(fields["flags"], 8) & os.O_ACCMODE != os.O_RDONLY


def clear(folder: str, driver: int, grace_s: float = GRACE_S) -> None:
    """Removes the folder once nothing writes into it; after ``grace_s`` seconds what still does is killed."""
    deadline = time.monotonic() + grace_s
    while (left := [pid for pid in writers(folder) if pid != driver]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    wait_for_driver(int(sys.argv[2]))
    clear(sys.argv[1], int(sys.argv[2]))
