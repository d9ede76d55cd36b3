"""Another peer: DeepSpeed's ``PipelineEngine`` on gloo, whose only training schedule is 1F1B.

One process a stage, one thread each, no ZeRO, float32; the engine's own data path, one microbatch after the other out
of an iterator. It is an optional extra (``bench``); without it ``missing`` says why nothing runs.

What it takes on a machine without a GPU: the accelerator is named in ``DS_ACCELERATOR`` before the first import, the
ranks are given in the variables that its launcher would set (else it looks for MPI), and the optimizer is PyTorch's
own, since DeepSpeed's would be compiled first. Its operator for all-reduces in shared memory, which is compiled for two
minutes at first use and which no message between stages goes through, is left out. Its ways to cut a model cannot be
told a cut, so each stage's layers are joined to one and it cuts uniformly.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.task import Task
from benchmarks.team import Maker, Step, Team

__all__ = ["SCHEDULE", "DeepSpeedPeer", "missing"]

SCHEDULE = "1f1b"


class DeepSpeedPeer(Team):
    """DeepSpeed's processes; a context manager whose ``run`` knows the schedule ``1f1b``."""

    def __init__(self, task: Task) -> None:
        if task.chunks != 1:
            raise ValueError(
                f"chunks is {task.chunks}, but DeepSpeed's stages hold one; give a task of one chunk a stage"
            )
        super().__init__(_join, {SCHEDULE: task})


def missing() -> str | None:
    """Why there is no DeepSpeed to compare with, or None where there is one."""
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed (pip install -e '.[bench]')"
    return None


def _join(rank: int, stages: int, port: int) -> Maker:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(stages),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with _quiet():
        import deepspeed
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=stages)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return lambda name, task: _stepper(task, rank)


def _stepper(task: Task, rank: int) -> Step:
    """What runs one step on this rank and gives the loss, which every rank is told."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    batch = task.batch()
    samples = len(batch[0]) // task.microbatches
    layers = [task.chunk(stage) for stage in range(task.stages)]
    with _quiet():
        module = PipelineModule(layers, task.stages, loss_fn=task.loss, partition_method="uniform")
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=task.optimizer([p for p in module.parameters() if p.requires_grad]),
            config={
                "train_micro_batch_size_per_gpu": samples,
                "gradient_accumulation_steps": task.microbatches,
                "steps_per_print": sys.maxsize,
                "gradient_clipping": 0.0,
            },
        )
    microbatches = _microbatches(batch, samples)
    return lambda: float(engine.train_batch(microbatches))


def _microbatches(batch: tuple[Tensor, Tensor], samples: int) -> Iterator[tuple[Tensor, ...]]:
    """The batch's microbatches, again and again."""
    return itertools.cycle(list(zip(*(torch.split(tensor, samples) for tensor in batch), strict=True)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed writes each layer to the standard output."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
