"""The processes of a peer: one a stage, with one thread each, told over pipes whose turn it is.

They wait on their pipe, without using the processor, while it is not their turn.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from benchmarks.task import Task, Turn

__all__ = ["Join", "Maker", "Step", "Team"]

START_TIMEOUT_S = 120.0
TURN_TIMEOUT_S = 600.0

Step: TypeAlias = Callable[[], float | None]
"""Runs one training step on a rank; gives the loss where the rank knows it."""
Maker: TypeAlias = Callable[[str, Task], Step]
"""Makes a rank's step of the schedule of this name."""
Join: TypeAlias = Callable[[int, int, int], Maker]
"""Joins the others, given a rank, how many there are, and the port of their store on this machine."""


class Team:
    """A peer's processes; a context manager.

    Args:
        join: a function of a module, since it is sent to the processes.
        tasks: by the name of a schedule; all of as many stages.
    """

    def __init__(self, join: Join, tasks: Mapping[str, Task]) -> None:
        (stages,) = {task.stages for task in tasks.values()}
        self._store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(stages):
            ours, theirs = context.Pipe()
            arguments = (join, dict(tasks), rank, stages, self._store.port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(START_TIMEOUT_S)

    def run(self, schedule: str, steps: int) -> Turn:
        """Runs steps of one schedule, whose stages are built the first time; all ranks begin when all are told."""
        began = time.monotonic()
        for pipe in self._pipes:
            pipe.send((schedule, steps))
        answers = self._answers(TURN_TIMEOUT_S)
        seconds = time.monotonic() - began
        ends = [max(each) for each in zip(*(ends for _, ends, _ in answers), strict=True)]
        return Turn(answers[0][0], ends, seconds, next(loss for _, _, loss in answers if loss is not None))

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()  # their recv ends, and they with it
        for process in self._processes:
            process.join(10.0)
            if process.is_alive():
                process.kill()

    def _answers(self, timeout_s: float) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout_s):
                raise TimeoutError(f"rank {rank} of the peer did not answer within {timeout_s:g} s")
            try:
                answers.append(pipe.recv())
            except EOFError as error:
                raise RuntimeError(f"rank {rank} of the peer has ended; its error stands above") from error
        return answers


def _serve(join: Join, tasks: Mapping[str, Task], rank: int, stages: int, port: int, pipe: Connection) -> None:
    """A rank's process: builds its stage of a schedule when that is first told, and runs what it is told."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    make = join(rank, stages, port)
    runs: dict[str, Step] = {}
    pipe.send("ready")
    while True:
        try:
            name, steps = pipe.recv()
        except EOFError:
            break
        if name not in runs:
            runs[name] = make(name, tasks[name])
        began, ends, loss = time.monotonic(), [], None
        for _ in range(steps):
            loss = runs[name]()
            ends.append(time.monotonic())
        pipe.send((began, ends, loss))
    dist.destroy_process_group()
