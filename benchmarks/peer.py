"""The peer: ``torch.distributed.pipelining`` on gloo, used as its documentation says.

One process a stage, one thread each; the model is cut by hand, a ``PipelineStage`` and a schedule run it. Each step
ends with the optimizer. The processes wait on a pipe, without using the processor, while it is not their turn.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

__all__ = ["Peer", "Task", "Turn"]

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
START_TIMEOUT_S = 120.0
TURN_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Task:
    """What both sides train; it can be pickled.

    Attributes: ``model`` and ``batch`` make the same ones each time; ``counts``, how many of the model's layers each
    stage holds.
    """

    model: Callable[[], nn.Sequential]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    microbatches: int
    counts: Sequence[int]


@dataclass(frozen=True)
class Turn:
    """Some steps in a row: ``starts`` of each on rank 0, when the last ended there, ``seconds`` of them all as
    the driver saw it, and the last step's ``loss``."""

    starts: list[float]
    ended: float
    seconds: float
    loss: float

    @property
    def periods(self) -> list[float]:
        """Seconds from each step's start on rank 0 to the next one's."""
        marks = [*self.starts, self.ended]
        return [after - before for before, after in pairwise(marks)]


class Peer:
    """The peer's processes; a context manager."""

    def __init__(self, task: Task, schedules: Sequence[str]) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(len(task.counts)):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(task, tuple(schedules), rank, self._store.port, theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(START_TIMEOUT_S)

    def run(self, schedule: str, steps: int) -> Turn:
        """Runs steps of one schedule; all ranks begin when all are told."""
        began = time.monotonic()
        for pipe in self._pipes:
            pipe.send((schedule, steps))
        answers = self._answers(TURN_TIMEOUT_S)
        seconds = time.monotonic() - began
        starts, ended, _ = answers[0]
        return Turn(starts, ended, seconds, answers[-1][2])

    def __enter__(self) -> Peer:
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
            answers.append(pipe.recv())
        return answers


def _serve(task: Task, schedules: Sequence[str], rank: int, port: int, pipe: Connection) -> None:
    """A rank's process: builds its stage for each schedule, then runs what it is told."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    stages = len(task.counts)
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=stages)
    runs = {name: _stepper(task, name, rank) for name in schedules}
    pipe.send("ready")
    while True:
        try:
            name, steps = pipe.recv()
        except EOFError:
            break
        starts, loss = [], 0.0
        for _ in range(steps):
            starts.append(time.monotonic())
            loss = runs[name]()
        pipe.send((starts, time.monotonic(), loss))
    dist.destroy_process_group()


def _stepper(task: Task, name: str, rank: int) -> Callable[[], float]:
    """What runs one step on this rank and gives the loss, on the last one."""
    stages, first = len(task.counts), sum(task.counts[:rank])
    module = task.model()[first : first + task.counts[rank]].train()
    optimizer = task.optimizer(module.parameters())
    stage = PipelineStage(module, rank, stages, torch.device("cpu"))
    schedule = SCHEDULES[name](stage, task.microbatches, loss_fn=task.loss)
    inputs, targets = task.batch()

    def step() -> float:
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(inputs)
        elif rank == stages - 1:
            # Joining the logits of all microbatches would only cost the peer time.
            schedule.step(target=targets, losses=losses, return_outputs=False)
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(torch.stack([loss.detach() for loss in losses]).mean()) if losses else 0.0

    return step
