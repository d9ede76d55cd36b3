"""How far a training is: one live line on a terminal, a plain line every few steps elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from time import monotonic
from types import TracebackType
from typing import Any, TextIO

__all__ = ["Progress"]

_REDRAW_S = 0.1  # a drawing costs about a millisecond, and nobody reads faster

_FIELDS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("loss", lambda value: f"loss {value:.4f}"),
    ("grad_norm", lambda value: f"grad norm {value:.3g}"),
    ("lr", lambda value: f"lr {value:.3g}"),
    ("bubble", lambda value: f"bubble {value:.1%}"),
)


class Progress:
    """Shows step, loss, speed, bubble and time; a context manager.

    On a terminal one line is redrawn at most ten times a second, and what the program prints meanwhile appears above
    it. Elsewhere (a file, a pipe) there is a plain line for the first step, every ``log_every``-th, and the last.

    Args:
        total_steps: how many steps this run has, where that is known.
        log_every: steps from one plain line to the next, at least 1.
        stream: where to write; ``sys.stderr`` where none is given.
        quiet: write nothing at all.

    Raises:
        ValueError: ``log_every`` below 1.
    """

    def __init__(
        self, total_steps: int | None, log_every: int, stream: TextIO | None = None, quiet: bool = False
    ) -> None:
        if log_every < 1:
            raise ValueError(f"log_every is {log_every}, but must be at least 1; give quiet=True to see nothing")
        self._total, self._log_every, self._quiet = total_steps, log_every, quiet
        self._stream = sys.stderr if stream is None else stream
        self._live: _LiveLine | None = None
        self._began = monotonic()
        self._shown_at = float("-inf")
        self._end: int | None = None
        self._pending: Mapping[str, Any] | None = None
        self._seconds = 0.0
        self._counts = {"tokens": 0, "samples": 0}

    def __enter__(self) -> Progress:
        self._began = monotonic()
        if not self._quiet and self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._live = _LiveLine(self._stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pending is not None:
            self._show(self._pending)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Takes one step's metrics.

        Args:
            metrics: ``step`` (its number, from 0; a run may begin at a later one), and where they are known ``loss``,
                ``tokens`` or ``samples`` and the ``seconds`` they took, ``bubble`` (a share, 0 to 1), ``grad_norm``,
                ``lr``. Others are left out.
        """
        if self._quiet:
            return
        done = metrics["step"] + 1
        first = self._end is None
        if self._end is None:
            self._end = done - 1 + (self._total or 0)
        self._pending = metrics
        self._seconds += metrics.get("seconds") or 0.0
        for name in self._counts:
            self._counts[name] += metrics.get(name) or 0
        if self._live is not None:
            due = monotonic() - self._shown_at >= _REDRAW_S
        else:
            due = first or done % self._log_every == 0
        if due:
            self._show(metrics)

    def _show(self, metrics: Mapping[str, Any]) -> None:
        line = self._line(metrics)
        if self._live is not None:
            self._live.show(line)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()
        self._shown_at = monotonic()
        self._pending = None
        self._seconds = 0.0
        self._counts = dict.fromkeys(self._counts, 0)

    def _line(self, metrics: Mapping[str, Any]) -> str:
        of_total = "" if self._total is None else f"/{self._end}"
        shown = [f"step {metrics['step'] + 1}{of_total}"]
        shown += [write(metrics[name]) for name, write in _FIELDS if metrics.get(name) is not None]
        # Over all steps since the last line: one step's speed jumps about.
        noun = next((noun for noun, count in self._counts.items() if count), None)
        if noun is not None and self._seconds > 0:
            shown.append(f"{_short(self._counts[noun] / self._seconds)} {noun}/s")
        shown.append(_clock(monotonic() - self._began))
        return "  ".join(shown)


class _LiveLine:
    """A line at the bottom of a terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        # The stream was asked whether it is a terminal; rich would look at the environment too.
        console = Console(file=stream, force_terminal=True)
        # What the program prints is written above the line, but where it goes to a file or a pipe it must go there.
        self._live = Live(
            console=console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()

    def show(self, line: str) -> None:
        from rich.text import Text

        self._live.update(Text(line, no_wrap=True, overflow="crop"), refresh=True)

    def stop(self) -> None:
        """Leaves the last line where it is."""
        self._live.stop()


def _short(number: float) -> str:
    """Three digits and a letter: ``12.3k``."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
