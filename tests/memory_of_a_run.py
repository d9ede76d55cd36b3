"""A driver as a process of its own: ``python memory_of_a_run.py KIND WIDTH FOLDER`` prints its memory as JSON.

``KIND`` is how the model is given. Peaks are Linux's VmHWM, in bytes: all pages of a process that were resident at
once, those of the object store that it has touched included. Each rank's are noted by its optimizer, which is made when
the rank has its weights, and steps with their gradients beside them.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raypipe import PipelineTrainer

BLOCKS, STAGES = 12, 4


def peak() -> int:
    """Of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def build(width: int) -> nn.Sequential:
    """Equal blocks of ``width * width`` float32 numbers."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(BLOCKS)))


class Noting(torch.optim.SGD):
    """SGD without state, which notes its process's peak when it is made and after its first step."""

    def __init__(self, parameters: Any, folder: str) -> None:
        named = list(parameters)
        super().__init__([parameter for _, parameter in named], lr=0.01)
        self._built, self._file = peak(), Path(folder) / named[0][0]

    def step(self, closure: Any = None) -> None:
        """Steps, and notes."""
        super().step(closure)
        self._file.write_text(json.dumps({"built": self._built, "stepped": peak()}))


def models(kind: str, width: int) -> Callable[[], Any]:
    """What is given as ``model``, by how it is given."""
    given: dict[str, Callable[[], Any]] = {
        "callable": lambda: functools.partial(build, width),
        "instance": lambda: build(width),
    }
    return given[kind]


def main(kind: str, width: int, folder: str) -> None:
    """One step on Ray."""
    generator = torch.Generator().manual_seed(0)
    batch = tuple(torch.randn(2, width, generator=generator) for _ in range(2))
    model = models(kind, width)()
    optimizer = functools.partial(Noting, folder=folder)
    began = time.monotonic()
    with PipelineTrainer(
        model,
        stages=STAGES,
        loss=nn.functional.mse_loss,
        optimizer=optimizer,
        microbatches=2,
        balance=[BLOCKS // STAGES] * STAGES,
        datasets={"train": [batch]},
        quiet=True,
    ) as trainer:
        trainer.plan()
        planned, planning = peak(), time.monotonic() - began
        trainer.train_step(batch)
        ranks = {int(path.name.partition(".")[0]): json.loads(path.read_text()) for path in Path(folder).iterdir()}
        told = {
            "seconds": [planning, time.monotonic() - began],
            "planned": planned,
            "driver": peak(),
            "ranks": [ranks[key] for key in sorted(ranks)],
        }
        print("\n" + json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
