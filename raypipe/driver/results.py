"""What a run leaves: its logged rows, the folder where they lie, and the object that ``fit`` returns."""

from __future__ import annotations

import csv
import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["LocalResult", "Results", "check_run_config"]

READ = ("name", "storage_path")
"""The fields of a ``RunConfig`` that this version reads."""


@dataclass
class LocalResult:
    """What ``fit`` returns with ``backend="local"``: the attributes of ``ray.train.Result``, without Ray."""

    metrics: dict[str, Any]
    checkpoint: Any = None
    error: Exception | None = None
    path: str = ""
    metrics_dataframe: Any = None
    best_checkpoints: list[Any] = field(default_factory=list)


class Results:
    """The rows of one trainer, over all of its calls of ``fit``.

    Args:
        run_config: a ``ray.train.RunConfig`` or None.
        log_every: steps from one row to the next.

    Attributes:
        rows: logged so far.

    Raises:
        TypeError, ValueError: as ``check_run_config``.
    """

    def __init__(self, run_config: Any, log_every: int) -> None:
        check_run_config(run_config)
        self._run_config, self._log_every = run_config, log_every
        self._folder: Path | None = None
        self._last: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def open(self) -> Path:
        """The folder, made where it is not there yet."""
        if self._folder is None:
            self._folder = _folder(self._run_config)
        return self._folder

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Takes one step's metrics; every ``log_every``-th becomes a row."""
        self._last = dict(metrics)
        if metrics["step"] % self._log_every == 0:
            self.rows.append(dict(metrics))

    def log_evaluation(self, found: Mapping[str, Any]) -> None:
        """Adds what was evaluated to the last step's row."""
        self._last.update({f"valid_{name}": value for name, value in found.items()})
        self.log_last()

    def log_last(self) -> None:
        """The last step is always among the rows."""
        if self.rows and self.rows[-1]["step"] == self._last["step"]:
            self.rows[-1] = dict(self._last)
        elif self._last:
            self.rows.append(dict(self._last))

    def write(self, drawing: str | None) -> None:
        """Writes ``metrics.csv``, which appears whole or not at all, and the drawing as ``schedule.txt``."""
        folder = self.open()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        temporary = folder / f".metrics.csv.{os.getpid()}"
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(folder / "metrics.csv")
        if drawing is not None:
            (folder / "schedule.txt").write_text(drawing + "\n")

    def result(self, backend: str) -> Any:
        """A ``ray.train.Result``, or a ``LocalResult`` for the local backend, which imports no Ray."""
        import pandas

        frame, path = pandas.DataFrame(self.rows), str(self.open())
        if backend == "local":
            return LocalResult(dict(self._last), path=path, metrics_dataframe=frame)
        from ray.train import Result

        return Result(
            metrics=dict(self._last),
            checkpoint=None,
            error=None,
            path=path,
            metrics_dataframe=frame,
            best_checkpoints=[],
        )


def check_run_config(run_config: Any) -> None:
    """Refuses what this version would not heed.

    Raises:
        TypeError: it is no ``ray.train.RunConfig``.
        ValueError: a field other than ``name`` and ``storage_path`` is set, or results would not lie on a local path.
    """
    if run_config is None:
        return
    kind = type(run_config)
    if not dataclasses.is_dataclass(kind) or not hasattr(run_config, "storage_path"):
        raise TypeError(f"run_config is a {kind.__name__}, but must be a ray.train.RunConfig or None")
    plain: Any = kind()
    for name in (entry.name for entry in dataclasses.fields(kind) if entry.name not in READ):
        value = getattr(run_config, name)
        if value != getattr(plain, name):
            raise ValueError(
                f"run_config has {name}={value!r}, which is not built yet; this version reads {' and '.join(READ)} of "
                f"it only, so leave {name} out"
            )
    if "://" in str(run_config.storage_path):
        raise ValueError(
            f"run_config has storage_path={run_config.storage_path!r}, but results can only be written to a folder of "
            "this machine yet; give a local path"
        )


def _folder(run_config: Any) -> Path:
    """``storage_path`` / ``name``, with Ray Train's defaults; a name of our own is never one that is there already."""
    storage = Path(getattr(run_config, "storage_path", None) or Path.home() / "ray_results").expanduser()
    name: str | None = getattr(run_config, "name", None)
    if name is not None:
        (storage / name).mkdir(parents=True, exist_ok=True)
        return storage / name
    stem = time.strftime("raypipe-%Y-%m-%d-%H-%M-%S")
    for number in range(1000):
        folder = storage / (f"{stem}-{number}" if number else stem)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{storage / stem} and a thousand names like it are taken; give run_config a name")
