"""However a run ends, it ends soon, says why, and leaves nothing behind: real processes, real signals."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training import batches_of_tokens, gpt, trainer_of

from raypipe import StageLost
from raypipe.driver.cluster import Session

TESTS = Path(__file__).parent


class Killing(torch.optim.SGD):
    """Ends its own process in the third step, where it holds the second block."""

    def __init__(self, parameters: Any, note: Path) -> None:
        named = list(parameters)
        super().__init__([p for _, p in named], lr=0.1)
        self.note, self.left = note, 3 if any(name.startswith("blocks.1.") for name, _ in named) else -1

    def step(self, closure: Any = None) -> None:
        self.left -= 1
        if self.left == 0:
            self.note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        super().step()


@pytest.mark.ray
def test_a_killed_stage_is_named_within_ten_seconds(
    ray_session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("HOME", str(tmp_path))
    trainer = trainer_of(
        gpt(),
        3,
        datasets={"train": batches_of_tokens(9)},
        balance=[3, 1, 3],
        optimizer=functools.partial(Killing, note=tmp_path / "note"),
        backend="ray",
    )
    with pytest.raises(StageLost, match="stage 1") as caught:
        trainer.fit()
    assert time.time() - float((tmp_path / "note").read_text()) < 10
    assert (caught.value.stage, caught.value.step) == (1, 2)
    assert not [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
    assert not [actor for actor in ray.util.list_named_actors() if actor.startswith("raypipe")]


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[2])
from training import batches_of_tokens, gpt
from raypipe import PipelineTrainer

def data():
    for number in range(10**6):
        if number == 3:
            print("running", flush=True)
            if sys.argv[1] == "success":
                return
            if sys.argv[1] == "error":
                raise ZeroDivisionError("my own")
        yield batches_of_tokens(1)[0]

trainer = PipelineTrainer(gpt(), 2, datasets={"train": data}, quiet=True)
trainer.fit()
trainer.shutdown()
"""


class Ended:
    """A driver of its own that was started, met its end, and what is left of it.

    Attributes: ``code`` and ``stderr`` of the driver; ``seen``, processes and folders of its run.
    """

    def __init__(self, how: str, home: Path, end: Callable[[subprocess.Popen[str]], None]) -> None:
        self._mark = f"RAYPIPE_TEST={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        env = {**os.environ, name: value, "HOME": str(home)}
        env.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", SCRIPT, how, str(TESTS)]
        # RAY_ADDRESS=local: a Ray of its own, though the tests' one may be running on this machine.
        env["RAY_ADDRESS"] = "local"
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home
        ) as driver:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "running\n", driver.communicate()[1]
            self.seen = self.processes()
            lines = [_read(pid, "cmdline") for pid in self.seen]
            self.folders = {Path(found) for line in lines for found in re.findall(r"/tmp/raypipe-\w+", line)}
            end(driver)
            self.stderr = driver.communicate(timeout=60)[1]
            self.code = driver.returncode

    def processes(self) -> list[int]:
        """Those that inherited the mark (a zombie has no environment)."""
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._mark in _read(path.name, "environ")]

    def assert_gone(self, within_s: float = 20.0) -> None:
        """No process (so no actor, no placement group, no port) and no folder is left."""
        deadline = time.monotonic() + within_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left
        assert not [folder for folder in self.folders if folder.exists()]


def _read(pid: object, name: str) -> str:
    """A file of a process; empty where it is gone, or someone else's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def go_on(driver: subprocess.Popen[str]) -> None:
    """Lets it end by itself."""


def interrupt(driver: subprocess.Popen[str]) -> None:
    time.sleep(1.0)
    driver.send_signal(signal.SIGINT)


def kill(driver: subprocess.Popen[str]) -> None:
    time.sleep(1.0)
    driver.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "end", "code", "last"),
    [
        ("success", go_on, 0, None),
        ("error", go_on, 1, "ZeroDivisionError: my own"),
        ("endless", interrupt, -signal.SIGINT, "KeyboardInterrupt"),
        ("endless", kill, -signal.SIGKILL, None),
    ],
    ids=["success", "error", "ctrl-c", "driver-killed"],
)
def test_nothing_is_left(
    how: str, end: Callable[[subprocess.Popen[str]], None], code: int, last: str | None, tmp_path: Path
) -> None:
    ended = Ended(how, tmp_path, end)
    assert len(ended.seen) > 3
    assert ended.folders
    ended.assert_gone()
    assert ended.code == code, ended.stderr
    if last is not None:
        assert ended.stderr.strip().splitlines()[-1] == last, ended.stderr
