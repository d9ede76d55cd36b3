from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raypipe.driver import reaper

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

HOLD = "import sys, time; file = open(sys.argv[1], sys.argv[2]); print('open', flush=True); time.sleep(60)"


def hold(path: Path, mode: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), mode], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def test_what_writes_into_the_folder_is_ended_and_what_reads_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    (folder / "log").write_text("x")
    writer, reader = hold(folder / "log", "a"), hold(folder / "log", "r")
    try:
        assert reaper.writers(str(folder)) == [writer.pid]
        reaper.clear(str(folder), os.getpid(), grace_s=0.2)
        assert writer.wait(5) == -9
        assert reader.poll() is None
        assert not folder.exists()
    finally:
        for process in (writer, reader):
            process.kill()
            process.wait()


def test_a_folder_of_a_similar_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "session2").mkdir()
    writer = hold(tmp_path / "session2" / "log", "w")
    try:
        assert reaper.writers(str(tmp_path / "session")) == []
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("closes", [True, False])
def test_it_runs_when_the_driver_closes_it_or_dies(tmp_path: Path, closes: bool) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    script = (
        "import os, subprocess, sys, time\n"
        "process = subprocess.Popen([sys.executable, '-I', '-S', sys.argv[1], sys.argv[2], str(os.getpid())],"
        " stdin=subprocess.PIPE)\n"
        "time.sleep(0.3)\n"
        "process.stdin.close() if sys.argv[3] == 'True' else os.kill(os.getpid(), 9)\n"
        "process.wait()\n"
    )
    subprocess.run([sys.executable, "-c", script, str(Path(reaper.__file__)), str(folder), str(closes)], check=False)
    deadline = time.monotonic() + 5
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()
