"""The forward and the backward of one microbatch through one chunk.

What a backward needs is kept by (chunk, microbatch) and dropped there, so the number of microbatches in flight is the
number of entries kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raypipe.errors import CutError
from raypipe.model.microbatch import Microbatch
from raypipe.model.recording import Recording, Value, Window
from raypipe.model.replay import Seeds
from raypipe.stage.layout import pack, packed_spec, unpack
from raypipe.stage.losses import Losses
from raypipe.stage.program import Message
from raypipe.stage.slice import Slice
from raypipe.tensors import TensorSpec

__all__ = ["ForwardComputer", "TrainComputer"]


@dataclass(slots=True)
class _Kept:
    """What a backward needs: the received tensors, the roots that gradients start from."""

    leaves: list[Tensor]
    roots: list[Tensor]


@dataclass(slots=True)
class _Piece:
    """A microbatch with its recording."""

    microbatch: Microbatch
    seeds: Seeds
    recording: Recording
    windows: tuple[Window, ...] = field(default=())


class _Computer:
    """What training and evaluation share: the microbatches of one step and the shapes of their messages."""

    def __init__(self, piece_of: Slice, microbatches: Sequence[Microbatch], seed: int, step: int, first: int) -> None:
        self.slice = piece_of
        self.pieces: list[_Piece] = []
        for microbatch in microbatches:
            recording = piece_of.recording(microbatch.batch)
            seeds = Seeds(seed, step, first + microbatch.first_sample)
            self.pieces.append(_Piece(microbatch, seeds, recording, piece_of.windows(recording)))
        self.in_flight = 0

    def specs(self, message: Message) -> Sequence[TensorSpec]:
        """The tensors of a message: the boundary's values, or the gradients of those that require one."""
        piece = self.pieces[message.microbatch]
        if message.gradient:
            values = _with_gradient(piece.windows[message.chunk].outputs)
        else:
            values = piece.windows[message.chunk].inputs
        return [packed_spec(value) for value in values]

    def _received(self, window: Window, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [unpack(tensor, value) for value, tensor in zip(window.inputs, tensors, strict=True)]


class ForwardComputer(_Computer):
    """Forwards for evaluation and prediction; ``outputs`` has what the model returned for each microbatch."""

    def __init__(self, piece_of: Slice, microbatches: Sequence[Microbatch], seed: int, step: int) -> None:
        super().__init__(piece_of, microbatches, seed, step, 0)
        self.outputs: dict[int, Any] = {}

    def forward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """See ``executor.Computer``."""
        piece = self.pieces[microbatch]
        window = piece.windows[chunk]
        outs, outputs = self.slice.run(
            piece.microbatch.batch, piece.recording, window, self._received(window, received), piece.seeds
        )
        if chunk == len(piece.windows) - 1:
            self.outputs[microbatch] = outputs
        return [pack(tensor, value) for value, tensor in zip(window.outputs, outs, strict=True)]

    def backward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """Never called: a schedule of forwards has no backward."""
        raise AssertionError("evaluation has no backward")


class TrainComputer(_Computer):
    """Forwards and backwards of one step.

    Args:
        piece_of: this stage's slice.
        microbatches: of this step.
        seed: of the run.
        step: number of the step.
        first: number of the first sample of these microbatches in the whole batch.
        losses: weighs and collects the microbatches' losses on the last stage.
    """

    def __init__(
        self,
        piece_of: Slice,
        microbatches: Sequence[Microbatch],
        seed: int,
        step: int,
        first: int,
        losses: Losses,
    ) -> None:
        super().__init__(piece_of, microbatches, seed, step, first)
        self.losses = losses
        self._kept: dict[tuple[int, int], _Kept] = {}

    def forward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """See ``executor.Computer``."""
        piece = self.pieces[microbatch]
        window = piece.windows[chunk]
        tensors = self._received(window, received)
        leaves = [
            tensor.requires_grad_() for value, tensor in zip(window.inputs, tensors, strict=True) if value.requires_grad
        ]
        inputs = _free_to_change(piece.recording, window, tensors)
        if chunk == len(piece.windows) - 1:
            loss = self.losses.forward(microbatch, piece.microbatch, lambda: self._run(piece, window, inputs)[1])
            roots = [] if loss is None else [loss]
            made: list[Tensor] = []
        else:
            made, _ = self._run(piece, window, inputs)
            roots = _roots(piece.recording, window.outputs, made)
        self._kept[chunk, microbatch] = _Kept(leaves, roots)
        self.in_flight += 1
        return [pack(tensor.detach(), value) for value, tensor in zip(window.outputs, made, strict=True)]

    def backward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """See ``executor.Computer``."""
        piece = self.pieces[microbatch]
        window = piece.windows[chunk]
        kept = self._kept.pop((chunk, microbatch))
        if chunk == len(piece.windows) - 1:
            gradients = [self.losses.scale(microbatch, root) for root in kept.roots]
        else:
            values = _with_gradient(window.outputs)
            gradients = [unpack(tensor, value) for value, tensor in zip(values, received, strict=True)]
        if kept.roots:
            torch.autograd.backward(kept.roots, gradients)
        self.in_flight -= 1
        values = _with_gradient(window.inputs)
        # A value that no gradient reached still has its place in the message.
        return [
            pack(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf), value)
            for value, leaf in zip(values, kept.leaves, strict=True)
        ]

    def _run(self, piece: _Piece, window: Window, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        return self.slice.run(piece.microbatch.batch, piece.recording, window, inputs, piece.seeds)


def _with_gradient(values: Sequence[Value]) -> list[Value]:
    return [value for value in values if value.requires_grad]


def _free_to_change(recording: Recording, window: Window, tensors: list[Tensor]) -> list[Tensor]:
    """A received leaf that is changed in place later is replaced by a copy: autograd forbids it on a leaf."""
    changed = recording.mutated_after(window.start)
    if not changed:
        return tensors
    return [
        tensor.clone() if value.requires_grad and value.storage in changed else tensor
        for value, tensor in zip(window.inputs, tensors, strict=True)
    ]


def _roots(recording: Recording, values: Sequence[Value], made: Sequence[Tensor]) -> list[Tensor]:
    """The boundary's tensors that gradients come back for."""
    for value, tensor in zip(values, made, strict=True):
        if tensor.requires_grad != value.requires_grad:
            raise CutError(
                f"{recording.describe(value)} {'requires' if tensor.requires_grad else 'does not require'} a gradient, unlike "
                "when it was planned; put its maker into one unit with its users (units=[...])"
            )
    return [tensor for tensor in made if tensor.requires_grad]
