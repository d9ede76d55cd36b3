"""The peer: ``torch.distributed.pipelining`` on gloo, used as its documentation says.

One process a stage, one thread each; the model is cut by hand, a ``PipelineStage`` for each chunk and a schedule run
it. Each step ends with the optimizer.

Where its schedules ask for input and weight gradients apart, torch 2.13 computes nothing in the first chunk's input
gradient and all of the backward in its weight gradient (stage.py, ``backward_one_chunk``). So the gradients are right,
which the benchmarks and their tests see by the losses; what it costs is the peer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from benchmarks.task import Task
from benchmarks.team import Maker, Step, Team

__all__ = ["SCHEDULES", "Peer", "held"]

_ONE: Mapping[str, Callable[..., Any]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
_SEVERAL: Mapping[str, Callable[..., Any]] = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
SCHEDULES = (*_ONE, *_SEVERAL)
"""The names of its schedules, which are raypipe's."""


class Peer(Team):
    """The peer's processes; a context manager.

    Args:
        tasks: by the name of a schedule, one of ``SCHEDULES``; all of as many stages.
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__(_join, tasks)


def held(name: str, rank: int, stages: int, chunks: int) -> tuple[int, ...]:
    """The chunks that a rank holds: in loops over the ranks, or in a V."""
    if name == "zbv":
        return rank, 2 * stages - 1 - rank
    return tuple(rank + loop * stages for loop in range(chunks))


def _join(rank: int, stages: int, port: int) -> Maker:
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=stages)
    return lambda name, task: _stepper(name, task, rank)


def _stepper(name: str, task: Task, rank: int) -> Step:
    """What runs one step on this rank and gives the loss, where the last chunk is."""
    chunks, last = held(name, rank, task.stages, task.chunks), len(task.counts) - 1
    modules = [task.chunk(chunk).train() for chunk in chunks]
    optimizer = task.optimizer([parameter for module in modules for parameter in module.parameters()])
    schedule = _schedule(name, task, chunks, modules)
    inputs, targets = task.batch()
    arguments = (inputs,) if 0 in chunks else ()

    def step() -> float | None:
        losses: list[Tensor] = []
        if last in chunks:
            # Joining the logits of all microbatches would only cost the peer time.
            schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
        else:
            schedule.step(*arguments)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(torch.stack([loss.detach() for loss in losses]).mean()) if losses else None

    return step


def _schedule(name: str, task: Task, chunks: Sequence[int], modules: Sequence[torch.nn.Module]) -> Any:
    stages = [
        PipelineStage(module, chunk, len(task.counts), torch.device("cpu"))
        for chunk, module in zip(chunks, modules, strict=True)
    ]
    if name in _ONE:
        return _ONE[name](stages[0], task.microbatches, loss_fn=task.loss)
    return _SEVERAL[name](stages, task.microbatches, loss_fn=task.loss)
