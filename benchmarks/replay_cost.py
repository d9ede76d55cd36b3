"""What replay itself costs an action: a stage's forward with units that do nothing, beside the same with real ones."""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import BLOCKS, LENGTH, gpt, gpt_batch, llama, token_loss
from benchmarks.table import Row, Subject, measured
from raypipe.model.replay import Seeds
from raypipe.options import Options
from raypipe.plan import Plan
from raypipe.planning import make_plan
from raypipe.stage.slice import Slice

__all__ = ["run"]

ACTION_S = 0.020
SHARE_BAR = 0.05
STAGES, MICROBATCHES, IDLE_RUNS, PROFILED_RUNS, LINES = 4, 8, 20, 50, 14


def run(rounds: int, say: Callable[[str], None]) -> Subject:
    """For each model the second of four stages, whose husks stand before and after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    texts: list[tuple[str, str]] = []
    try:
        for name, model, options, batch in _models(say):
            stage = _Stage(make_plan(model, options, batch), batch)
            real = [stage.seconds() for _ in range(rounds + 1)][1:]
            stage.stub()
            idle = [sum(stage.seconds() for _ in range(IDLE_RUNS)) / IDLE_RUNS for _ in range(rounds + 1)][1:]
            say(f"{name}: replay {1e3 * idle[-1]:.2f} ms beside a forward of {1e3 * real[-1]:.1f} ms")
            rows += [
                measured(f"{name}: all but the units' work in a forward", [1e3 * s for s in idle], unit="ms"),
                measured(f"{name}: as a share of an action of 20 ms", [s / ACTION_S for s in idle], SHARE_BAR, "%"),
                measured(
                    f"{name}: as a share of its real forward here",
                    [s / r for s, r in zip(idle, real, strict=True)],
                    unit="%",
                ),
            ]
            texts.append((f"Where it goes in {name} ({PROFILED_RUNS} forwards)", stage.profile()))
    finally:
        torch.set_num_threads(threads)
    return Subject("Replay", rows, texts)


def _models(say: Callable[[str], None]) -> Sequence[tuple[str, nn.Module, Options, Any]]:
    tokens, targets = gpt_batch()
    models: list[tuple[str, nn.Module, Options, Any]] = [
        (f"GPT, {BLOCKS} blocks", gpt(), Options(STAGES, loss=token_loss, microbatches=MICROBATCHES), (tokens, targets))
    ]
    try:
        hugging_face = llama()
    except ImportError:
        say("no transformers here, so no Llama")
        return models
    options = Options(STAGES, microbatches=MICROBATCHES, microbatch_weight="targets")
    return [
        *models,
        (
            f"Hugging Face Llama, 12 layers, length {LENGTH}",
            hugging_face,
            options,
            {"input_ids": tokens, "labels": targets},
        ),
    ]


class _Stage:
    """The second stage of a plan, and its forward of the first microbatch."""

    def __init__(self, plan: Plan, batch: Any) -> None:
        self._chunk = 1
        options, tensors = plan.options, plan.origin.share(plan.tensors_of(1))()
        self._slice = Slice(
            plan.skeleton,
            tensors,
            options.units,
            plan.partition.cuts,
            plan.calls,
            plan.caller,
        )
        self._units = [self._slice.model.get_submodule(unit) for unit in plan.partition.chunks[1].units]
        self._batch = plan.layout.split(batch, options.most_microbatches)[0].batch
        self._planned = self._slice.planned(self._batch)
        self._message = [spec.empty().zero_() for spec in self._planned.boundaries[self._chunk].specs]

    def forward(self) -> None:
        """As an action does it, without what comes before and after: seeds and all."""
        boundary = self._planned.boundaries[self._chunk]
        _, received = boundary.unpack([tensor.detach() for tensor in self._message], training=True)
        self._slice.run(self._batch, self._planned, self._chunk, received, Seeds(0, 0, 0))

    def seconds(self) -> float:
        """Of one forward."""
        began = time.perf_counter()
        self.forward()
        return time.perf_counter() - began

    def stub(self) -> None:
        """From now on each unit returns what it returned once."""
        for unit in self._units:
            unit.forward = _once(unit.forward)
        self.forward()

    def profile(self) -> str:
        """The functions that most time is spent in, callees not counted."""
        profile = cProfile.Profile()
        with profile:
            for _ in range(PROFILED_RUNS):
                self.forward()
        out = io.StringIO()
        pstats.Stats(profile, stream=out).strip_dirs().sort_stats("tottime").print_stats(LINES)
        lines = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
        return "\n".join(line for line in lines if "Ordered by" not in line and "List reduced" not in line)


def _once(forward: Callable[..., Any]) -> Callable[..., Any]:
    made: list[Any] = []

    def stub(*args: Any, **kwargs: Any) -> Any:
        if not made:
            result = forward(*args, **kwargs)
            made.append(result.detach().requires_grad_() if isinstance(result, Tensor) else result)
        return made[0]

    return stub
