"""One ``fit``: progress, logged rows, evaluation in between, and the result with its files."""

from __future__ import annotations

import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypipe.data import Cursor, Draw, Feed
from raypipe.driver.controller import Controller
from raypipe.observe.progress import Progress
from raypipe.observe.timeline import draw_planned_and_measured
from raypipe.plan import Plan

__all__ = ["LocalResult", "Run"]


@dataclass
class LocalResult:
    """What ``fit`` returns with ``backend="local"``: the attributes of ``ray.train.Result``, without Ray."""

    metrics: dict[str, Any] | None
    checkpoint: Any = None
    error: Exception | None = None
    path: str = ""
    metrics_dataframe: Any = None
    best_checkpoints: list[Any] = field(default_factory=list)


class Run:
    """Runs one ``fit``.

    Args:
        controller: of the started ranks.
        plan: that they run.
        run_config: a ``ray.train.RunConfig`` or None.
        evaluate: called every ``evaluate_every`` steps, or None.
        steps: how many there will be, where that is known.

    Attributes:
        cursor: where the data goes on after the last step that was done.
    """

    def __init__(
        self,
        controller: Controller,
        plan: Plan,
        run_config: Any,
        evaluate: Callable[[], dict[str, Any]] | None,
        steps: int | None,
    ) -> None:
        self._controller, self._plan, self._evaluate = controller, plan, evaluate
        self._folder = _folder(run_config)
        self._run_config, self._steps = run_config, steps
        self._rows: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}
        self._drawn: dict[int, Draw] = {}
        self.cursor: Cursor | None = None

    def fit(self, feed: Feed) -> Any:
        """Trains on the feed's batches and returns the result."""
        options = self._plan.options
        with Progress(self._steps, options.log_every, quiet=options.quiet) as progress:

            def on_step(metrics: dict[str, Any]) -> None:
                self._last = metrics
                self.cursor = self._drawn.pop(metrics["step"]).cursor_after
                progress.update(metrics)
                if metrics["step"] % options.log_every == 0:
                    self._rows.append(dict(metrics))

            def on_pause(draw: Draw) -> None:
                if self._due(draw):
                    assert self._evaluate is not None
                    found = {f"valid_{name}": value for name, value in self._evaluate().items()}
                    self._last.update(found)
                    self._log_last()

            self._controller.train(_remembered(feed, self._drawn), on_step, pause_after=self._due, on_pause=on_pause)
        self._log_last()
        return self._result()

    def _due(self, draw: Draw) -> bool:
        every = self._plan.options.evaluate_every
        return self._evaluate is not None and every is not None and (draw.step + 1) % every == 0

    def _log_last(self) -> None:
        """The last step is always among the rows, with what was evaluated after it."""
        if self._rows and self._rows[-1]["step"] == self._last["step"]:
            self._rows[-1] = dict(self._last)
        elif self._last:
            self._rows.append(dict(self._last))

    def _result(self) -> Any:
        import pandas

        frame = pandas.DataFrame(self._rows)
        self._write()
        if self._plan.options.backend == "local" and "ray" not in sys.modules:
            return LocalResult(dict(self._last), path=str(self._folder), metrics_dataframe=frame)
        from ray.train import Result

        return Result(
            metrics=dict(self._last),
            checkpoint=None,
            error=None,
            path=str(self._folder),
            metrics_dataframe=frame,
            best_checkpoints=[],
        )

    def _write(self) -> None:
        """The rows and the timelines as files; the rows appear whole or not at all."""
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
        with os.fdopen(handle, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self._rows)
        os.replace(temporary, self._folder / "metrics.csv")
        if self._controller.reports:
            (self._folder / "schedule.txt").write_text(self.drawn() + "\n")

    def drawn(self, width: int = 100) -> str:
        """The last step's schedule as it was planned and as it was measured."""
        reports = self._controller.reports
        schedule = self._plan.options.make_schedule(reports[0].microbatches)
        return draw_planned_and_measured(schedule, [report.trace for report in reports], width)


def _remembered(feed: Feed, drawn: dict[int, Draw]) -> Any:
    for draw in feed:
        drawn[draw.step] = draw
        yield draw


def _folder(run_config: Any) -> Path:
    """Where the results lie: ``storage_path`` / ``name``, with Ray Train's defaults."""
    name = getattr(run_config, "name", None) or time.strftime("raypipe-%Y-%m-%d-%H-%M-%S")
    storage = getattr(run_config, "storage_path", None) or Path.home() / "ray_results"
    folder = Path(storage).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


