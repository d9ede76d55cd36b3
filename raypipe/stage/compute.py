"""The forward and the backward of one microbatch through one chunk.

What a backward needs is kept by (chunk, microbatch) and dropped there, so the number of microbatches in flight is the
number of entries kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raypipe.model.microbatch import Microbatch
from raypipe.model.replay import Seeds
from raypipe.model.split_backward import SplitBackward
from raypipe.model.weight_queue import WeightQueue, run_backward
from raypipe.stage.losses import Losses
from raypipe.stage.program import Message
from raypipe.stage.slice import Planned, Slice
from raypipe.tensors import TensorSpec

__all__ = ["ForwardComputer", "TrainComputer"]


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a backward needs: the received tensors that collect gradients, where gradients start, and where those of
    weights wait if the backward is in two halves."""

    leaves: list[Tensor]
    roots: list[Tensor]
    left: WeightQueue | None


class _Computer:
    """What training and evaluation share: the microbatches of one step and the shapes of their messages."""

    def __init__(self, piece_of: Slice, microbatches: Sequence[Microbatch], seed: int, step: int, first: int) -> None:
        self._slice, self._microbatches = piece_of, microbatches
        self._planned: list[Planned] = [piece_of.planned(microbatch.batch) for microbatch in microbatches]
        self._seeds = [Seeds(seed, step, first + microbatch.first_sample) for microbatch in microbatches]
        self.in_flight = 0

    def specs(self, message: Message) -> Sequence[TensorSpec]:
        """The tensors of a message: the boundary's values, or the gradients of those that require one."""
        boundaries = self._planned[message.microbatch].boundaries
        return boundaries[message.chunk].gradient_specs if message.gradient else boundaries[message.chunk + 1].specs

    def _run(self, chunk: int, microbatch: int, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        planned, batch = self._planned[microbatch], self._microbatches[microbatch].batch
        return self._slice.run(batch, planned, chunk, inputs, self._seeds[microbatch])


class ForwardComputer(_Computer):
    """Forwards for evaluation and prediction.

    Args:
        losses: finds and weighs the losses, or None where none is asked for.

    Attributes:
        outputs: on the last stage, what the model returned for each microbatch.
    """

    @torch.no_grad()
    def __init__(
        self, piece_of: Slice, microbatches: Sequence[Microbatch], seed: int, step: int, losses: Losses | None
    ) -> None:
        super().__init__(piece_of, microbatches, seed, step, 0)
        self._losses = losses
        self.outputs: dict[int, Any] = {}

    # Grad mode is set in each call: a rank that yields must not leave it to the others of its thread.
    @torch.no_grad()
    def forward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """See ``executor.Computer``."""
        boundaries = self._planned[microbatch].boundaries
        _, inputs = boundaries[chunk].unpack(received, training=False)
        if chunk < len(boundaries) - 2:
            return boundaries[chunk + 1].pack(self._run(chunk, microbatch, inputs)[0])
        if self._losses is None:
            self._finish(microbatch, inputs)
        else:
            self._losses.forward(microbatch, lambda: self._finish(microbatch, inputs))
        return []

    def backward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """Never called: a schedule of forwards has no backward."""
        raise AssertionError("evaluation has no backward")

    input_gradient = backward

    def weight_gradient(self, chunk: int, microbatch: int) -> None:
        """Never called either."""
        raise AssertionError("evaluation has no backward")

    def _finish(self, microbatch: int, inputs: Sequence[Tensor]) -> Any:
        _, self.outputs[microbatch] = self._run(len(self._planned[microbatch].windows) - 1, microbatch, inputs)
        return self.outputs[microbatch]


class TrainComputer(_Computer):
    """Forwards and backwards of one step.

    Args:
        piece_of: this stage's slice.
        microbatches: of this step.
        seed: of the run.
        step: number of the step.
        first: number of the first sample of these microbatches in the whole batch.
        losses: weighs and collects the microbatches' losses, where this stage holds the last chunk.
        split: each (chunk, microbatch) whose backward is in two halves.
    """

    def __init__(
        self,
        piece_of: Slice,
        microbatches: Sequence[Microbatch],
        seed: int,
        step: int,
        first: int,
        losses: Losses,
        split: Collection[tuple[int, int]] = (),
    ) -> None:
        super().__init__(piece_of, microbatches, seed, step, first)
        self._losses, self._split = losses, split
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._left: dict[tuple[int, int], WeightQueue] = {}

    def forward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """See ``executor.Computer``."""
        boundaries = self._planned[microbatch].boundaries
        leaves, inputs = boundaries[chunk].unpack(received, training=True)
        left = WeightQueue() if (chunk, microbatch) in self._split else None
        made: list[Tensor] = []
        with _leaving(left):
            if chunk == len(boundaries) - 2:
                loss = self._losses.forward(microbatch, lambda: self._run(chunk, microbatch, inputs)[1])
                roots = [] if loss is None else [loss]
            else:
                made, _ = self._run(chunk, microbatch, inputs)
                roots = boundaries[chunk + 1].roots(made)
        self._kept[chunk, microbatch] = _Kept(leaves, roots, left)
        self.in_flight += 1
        return boundaries[chunk + 1].pack(made)

    def backward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """See ``executor.Computer``."""
        gradients = self._backward(chunk, microbatch, received, self._kept.pop((chunk, microbatch)))
        self.in_flight -= 1
        return gradients

    def input_gradient(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """See ``executor.Computer``."""
        kept = self._kept.pop((chunk, microbatch))
        if kept.left is not None:
            self._left[chunk, microbatch] = kept.left
        return self._backward(chunk, microbatch, received, kept)

    def weight_gradient(self, chunk: int, microbatch: int) -> None:
        """See ``executor.Computer``."""
        self._left.pop((chunk, microbatch)).drain()
        self.in_flight -= 1

    def _backward(self, chunk: int, microbatch: int, received: Sequence[Tensor], kept: _Kept) -> Sequence[Tensor]:
        boundaries = self._planned[microbatch].boundaries
        with _leaving(kept.left):  # what a checkpoint runs again
            if chunk == len(boundaries) - 2:
                for loss in kept.roots:
                    self._losses.backward(microbatch, loss)
            else:
                came = boundaries[chunk + 1].unpack_gradients(received)
                reached = [(root, g) for root, g in zip(kept.roots, came, strict=True) if g is not None]
                if reached:
                    roots, gradients = zip(*reached, strict=True)
                    run_backward(roots, gradients, (), keep=False, accumulate=True)
        return boundaries[chunk].pack_gradients(kept.leaves)


def _leaving(left: WeightQueue | None) -> AbstractContextManager[object]:
    return nullcontext() if left is None else SplitBackward(left)
