from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import pytest

from raypipe.observe import progress as module
from raypipe.observe.progress import Progress

STEP: dict[str, Any] = {
    "loss": 2.34567,
    "grad_norm": 1.2345,
    "lr": 3e-4,
    "samples": 8,
    "tokens": 4096,
    "seconds": 0.25,
    "bubble": 0.2727,
}


@pytest.fixture(autouse=True)
def _xterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def on_terminal(use: Callable[[TextIO], object]) -> str:
    """What ``use`` writes to a stream that is a terminal."""
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how a terminal's end is read
            while True:
                seen.append(os.read(ours, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as stream:
        use(stream)
    reader.join()
    os.close(ours)
    return b"".join(seen).decode()


def test_a_plain_line_says_it_all(clock: Callable[[float], None]) -> None:
    stream = io.StringIO()
    with Progress(100, 10, stream) as progress:
        clock(3725)
        progress.update({"step": 0, **STEP})
    assert stream.getvalue() == (
        "step 1/100  loss 2.3457  grad norm 1.23  lr 0.0003  bubble 27.3%  16.4k tokens/s  1:02:05\n"
    )


def test_plain_lines_come_first_every_tenth_and_last() -> None:
    stream = io.StringIO()
    with Progress(23, 10, stream) as progress:
        for step in range(23):
            progress.update({"step": step, "loss": 1.0})
    assert re.findall(r"step (\S+)", stream.getvalue()) == ["1/23", "10/23", "20/23", "23/23"]


def test_a_last_line_is_not_written_twice() -> None:
    stream = io.StringIO()
    with Progress(20, 10, stream) as progress:
        for step in range(20):
            progress.update({"step": step})
    assert re.findall(r"step (\S+)", stream.getvalue()) == ["1/20", "10/20", "20/20"]


def test_a_run_that_goes_on_ends_at_its_own_last_step() -> None:
    stream = io.StringIO()
    with Progress(5, 5, stream) as progress:
        for step in range(10, 15):
            progress.update({"step": step})
    assert re.findall(r"step (\S+)", stream.getvalue()) == ["11/15", "15/15"]


def test_what_is_unknown_is_left_out(clock: Callable[[float], None]) -> None:
    stream = io.StringIO()
    with Progress(None, 1, stream) as progress:
        progress.update({"step": 0, "loss": None})
        progress.update({"step": 1, "samples": 3, "seconds": 2.0, "loss": float("nan")})
    assert stream.getvalue() == "step 1  0:00:00\nstep 2  loss nan  1.5 samples/s  0:00:00\n"


def test_the_speed_is_that_of_all_steps_since_the_last_line() -> None:
    stream = io.StringIO()
    with Progress(None, 3, stream) as progress:
        for step, seconds in enumerate([9.0, 1.0, 3.0]):
            progress.update({"step": step, "samples": 100, "seconds": seconds})
    assert re.findall(r"\S+ samples/s", stream.getvalue()) == ["11.1 samples/s", "50 samples/s"]


def test_quiet_writes_nothing() -> None:
    def use(stream: TextIO) -> None:
        with Progress(2, 1, stream, quiet=True) as progress:
            progress.update({"step": 0, **STEP})

    stream = io.StringIO()
    use(stream)
    assert stream.getvalue() == ""
    assert on_terminal(use) == ""


def test_a_terminal_has_one_line_that_is_redrawn(clock: Callable[[float], None]) -> None:
    def use(stream: TextIO) -> None:
        with Progress(100, 10, stream) as progress:
            for step in range(100):
                clock(0.01)
                progress.update({"step": step, "loss": 1.0})

    text = on_terminal(use)
    drawn = re.findall(r"step (\d+)/100", text)
    assert 10 <= len(drawn) <= 13  # ten times a second, for one second
    assert drawn[0] == "1"
    assert drawn[-1] == "100"
    assert text.count("\r\x1b[2K") >= len(drawn) - 1
    assert text.count("\n") == 1


def test_a_line_too_long_for_the_terminal_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")

    def use(stream: TextIO) -> None:
        with Progress(100, 10, stream) as progress:
            progress.update({"step": 0, **STEP})

    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", on_terminal(use)).splitlines()
    assert max(map(len, lines)) == 30


def test_a_dumb_terminal_has_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")

    def use(stream: TextIO) -> None:
        with Progress(3, 2, stream) as progress:
            for step in range(3):
                progress.update({"step": step})

    assert re.fullmatch(r"(step \d/3  0:00:00\r\n){3}", on_terminal(use))


_PRINTS = """
import sys
from raypipe.observe.progress import Progress
with Progress(2, 1) as progress:
    progress.update({"step": 0, "loss": 1.0})
    print("from the program")
    progress.update({"step": 1, "loss": 1.0})
print("after", file=sys.stderr)
"""


def test_what_a_program_prints_stands_above_the_line() -> None:
    command = [sys.executable, "-c", _PRINTS]
    text = on_terminal(lambda stream: subprocess.run(command, stdout=stream, stderr=stream, check=True))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text)
    assert re.search(r"^step 1/2.*from the program\n.*step 2/2.*\nafter\n$", plain, re.DOTALL)
    assert re.search(r"\r\x1b\[2Kfrom the program", text)


def test_a_piped_stdout_stays_a_pipe() -> None:
    command = [sys.executable, "-c", _PRINTS]
    printed: list[bytes] = []
    text = on_terminal(
        lambda stream: printed.append(
            subprocess.run(command, stdout=subprocess.PIPE, stderr=stream, check=True).stdout,
        )
    )
    assert printed == [b"from the program\n"]
    assert "from the program" not in text
    assert "step 2/2" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_an_update_costs_little(terminal: bool) -> None:
    def use(stream: TextIO) -> None:
        with Progress(2000, 10, stream) as progress:
            start = time.process_time()
            for step in range(2000):
                progress.update({"step": step, **STEP})
            assert time.process_time() - start < 2000 * 0.2e-3

    if terminal:
        on_terminal(use)
    else:
        use(io.StringIO())


def test_a_wrong_log_every_is_refused() -> None:
    with pytest.raises(ValueError, match="log_every is 0, but must be at least 1"):
        Progress(10, 0)
