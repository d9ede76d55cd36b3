"""What zero-bubble schedules pay: a backward in halves, the clipping norm's collective, more and shorter actions."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.emulated import batch
from benchmarks.models import HEADS, LENGTH, WIDTH, Block, Sleeps, first_mean, sgd, sleepers
from benchmarks.ours import chunks_held, steps_of, trainer_of
from benchmarks.table import Row, Subject, measured
from benchmarks.task import Task
from raypipe.model.split_backward import SplitBackward
from raypipe.model.weight_queue import WeightQueue
from raypipe.schedule import build, names

__all__ = ["Halves", "run", "timed"]

SAMPLES, REPEATS, HALVES_BAR = 2, 10, 1.10
CLIPPED = ("1f1b", "zbv")
CLIP_STAGES, CLIP_MICROBATCHES, CLIP_SLEEPS, STEPS = 4, 8, Sleeps(0.005, 0.005, 0.005), 8
HOT = ("1f1b", "interleaved_1f1b", "zb_h1", "zbv")
HOT_STAGES, HOT_MICROBATCHES, HOT_WIDTH, ACTION_S, HOT_BAR = 2, 16, 64, 0.020, 0.05


class Halves(NamedTuple):
    """Seconds of a forward and of its backward: whole (``second`` is then 0), or input half and weight half."""

    forward: float
    first: float
    second: float

    @property
    def backward(self) -> float:
        """Of both halves."""
        return self.first + self.second


def run(rounds: int, say: Callable[[str], None]) -> Subject:
    """Three parts, each with its sides in turn."""
    return Subject("Halves of a backward", [*_halves(rounds, say), *_clipping(rounds, say), *_hot_path(rounds, say)])


def timed(module: nn.Module, x: Tensor, *, split: bool) -> Halves:
    """One forward and one backward of a module on ``x``, whose gradient is asked for as that of a boundary is."""
    queue = WeightQueue() if split else None
    x = x.detach().requires_grad_()
    marks = [time.perf_counter()]
    with nullcontext() if queue is None else SplitBackward(queue):
        y = module(x)
    gradient = torch.ones_like(y)
    marks.append(time.perf_counter())
    with nullcontext() if queue is None else SplitBackward(queue):
        torch.autograd.backward([y], [gradient])
    marks.append(time.perf_counter())
    if queue is not None:
        queue.drain()
    marks.append(time.perf_counter())
    for parameter in module.parameters():
        parameter.grad = None
    return Halves(*(after - before for before, after in pairwise(marks)))


def _halves(rounds: int, say: Callable[[str], None]) -> list[Row]:
    """A round is the medians of ten backwards of either kind, in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        block, x = Block(WIDTH, HEADS), torch.randn(SAMPLES, LENGTH, WIDTH)
        found: dict[bool, list[Halves]] = {False: [], True: []}
        for number in range(rounds + 1):
            taken: dict[bool, list[Halves]] = {False: [], True: []}
            for repeat in range(REPEATS):
                for split in (False, True) if repeat % 2 == 0 else (True, False):
                    taken[split].append(timed(block, x, split=split))
            if number:  # the first is to warm up
                for split, all_of_it in taken.items():
                    found[split].append(Halves(*map(median, zip(*all_of_it, strict=True))))
    finally:
        torch.set_num_threads(threads)
    whole, halves = found[False], found[True]
    say(f"a whole backward {1e3 * whole[-1].backward:.1f} ms, halves {1e3 * halves[-1].backward:.1f} ms")
    what = f"a GPT's block of width {WIDTH}, {SAMPLES} x {LENGTH} tokens: "
    pairs = list(zip(halves, whole, strict=True))
    return [
        measured(f"{what}I + W over a whole backward", [h.backward / w.backward for h, w in pairs], HALVES_BAR),
        measured(f"{what}its forward with the backward to be in halves, over a plain one", _over_forward(pairs)),
        measured(f"{what}a whole backward", [1e3 * w.backward for w in whole], unit="ms"),
        measured(f"{what}I", [1e3 * h.first for h in halves], unit="ms"),
        measured(f"{what}W", [1e3 * h.second for h in halves], unit="ms"),
    ]


def _over_forward(pairs: Iterable[tuple[Halves, Halves]]) -> list[float]:
    return [h.forward / w.forward for h, w in pairs]


def _task(schedule: str, stages: int, microbatches: int, sleeps: Sleeps, width: int) -> Task:
    chunks = chunks_held(schedule)
    count = stages * chunks
    model = functools.partial(sleepers, count, sleeps.shared(chunks), width)
    made = functools.partial(batch, microbatches)
    return Task(model, made, first_mean, sgd, microbatches, (1,) * count, chunks)


def _clipping(rounds: int, say: Callable[[str], None]) -> list[Row]:
    """With ``max_grad_norm`` every rank waits for all norms before its optimizer steps; without, it goes on."""
    rows = []
    for name in CLIPPED:
        if name not in names():
            continue
        task = _task(name, CLIP_STAGES, CLIP_MICROBATCHES, CLIP_SLEEPS, 1024)
        periods: dict[float | None, list[float]] = {None: [], 1.0: []}
        with ExitStack() as stack:
            trainers = {}
            for norm in periods:
                made = trainer_of(task, name, microbatch_weight="samples", max_grad_norm=norm)
                trainers[norm] = stack.enter_context(made)
                trainers[norm].train_step(task.batch())
            for number in range(rounds):
                for norm in periods if number % 2 == 0 else reversed(periods):
                    periods[norm].append(median(steps_of(trainers[norm], STEPS).periods))
        plain, clipped = periods[None], periods[1.0]
        say(f"{name}: a step {1e3 * plain[-1]:.1f} ms, clipped {1e3 * clipped[-1]:.1f} ms")
        what = f"{name}, p={CLIP_STAGES}, m={CLIP_MICROBATCHES}, F=I=W=5 ms: a step"
        rows += [
            measured(f"{what} with max_grad_norm over one without", _ratios(clipped, plain)),
            measured(f"{what} with it, more", [1e3 * (c - p) for c, p in zip(clipped, plain, strict=True)], unit="ms"),
        ]
    return rows


def _ratios(ones: list[float], others: list[float]) -> list[float]:
    return [one / other for one, other in zip(ones, others, strict=True)]


def _hot_path(rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Everything of an action but its work: layers that do nothing, all ranks in this process, no sockets."""
    rows = []
    for name in HOT:
        if name not in names():
            continue
        task = _task(name, HOT_STAGES, HOT_MICROBATCHES, Sleeps(0.0, 0.0, 0.0), HOT_WIDTH)
        actions = sum(map(len, build(name, HOT_STAGES, HOT_MICROBATCHES).programs))
        seconds = []
        with trainer_of(task, name, microbatch_weight="samples", backend="local") as trainer:
            trainer.train_step(task.batch())
            for _ in range(rounds):
                began = time.perf_counter()
                for _ in range(REPEATS):
                    trainer.train_step(task.batch())
                seconds.append((time.perf_counter() - began) / (REPEATS * actions))
        say(f"{name}: {1e3 * seconds[-1]:.3f} ms an action")
        what = f"{name}, {task.chunks} chunk{'s'[: task.chunks > 1]} a stage: an action without its work"
        rows += [
            measured(what, [1e3 * s for s in seconds], unit="ms"),
            measured(f"{what}, as a share of {1e3 * ACTION_S:g} ms", [s / ACTION_S for s in seconds], HOT_BAR, "%"),
        ]
    return rows
