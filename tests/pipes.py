"""A pipeline without transport, for tests of the cut: the slices of all stages run one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raypipe.model.build import make_skeleton
from raypipe.model.call import Caller
from raypipe.model.husk import names_of
from raypipe.model.partition import partition
from raypipe.model.record import record
from raypipe.model.recording import Recording
from raypipe.model.seeds import Seeds
from raypipe.model.twin import Twin
from raypipe.stage.slice import Planned, Slice

SEEDS = Seeds(1, 2, 3)
WIDTH = 8


class Stack(nn.Module):
    """Blocks of a test, run as the test says: ``run(model, x)``; its loss is a mean squared error."""

    def __init__(
        self,
        run: Callable[[Any, Tensor], Tensor],
        make: Callable[[], nn.Module] = lambda: nn.Linear(WIDTH, WIDTH),
        setup: Callable[[Any], None] = lambda model: None,
        blocks: int = 4,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make() for _ in range(blocks))
        self.run = run
        setup(self)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.run(self, x), y)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(4, WIDTH, generator=generator) for name in ("x", "y")}


def recorded(
    model: nn.Module, batch: Any, units: Sequence[str] | None = None, caller: Caller | None = None
) -> Recording:
    """The recording of a model's forward."""
    twin = Twin(make_skeleton(model, units).model, units)
    return record(twin, lambda fake: (caller or Caller()).outputs(fake, copy.deepcopy(batch)))


class Pipe:
    """All stages of a model.

    Args:
        balance: unit calls of each chunk, or None for an even cut.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        chunks: int,
        *,
        units: Sequence[str] | None = None,
        caller: Caller | None = None,
        balance: Sequence[int] | None = None,
    ) -> None:
        self.caller = caller or Caller()
        skeleton = make_skeleton(model, units)
        twin = Twin(skeleton.model, units)
        recording = record(twin, lambda fake: self.caller.outputs(fake, copy.deepcopy(batch)))
        parameters, buffers = names_of(model)
        sizes = {name: p.numel() for name, p in parameters.items()}
        self.cut = partition(recording, twin.unit_parameters, sizes, chunks, balance or "flops")
        self.slices = []
        for chunk in self.cut.chunks:
            held = {name: parameters[name].detach().clone() for name in chunk.parameters}
            held |= {n: buffers[n].detach().clone() for unit in chunk.units for n in skeleton.unit_buffers[unit]}
            made = Slice(skeleton, held, units, self.cut.cuts, len(recording.calls), self.caller)
            self.slices.append(made)

    def train(self, batch: Any, seeds: Seeds = SEEDS) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and all gradients of one microbatch."""
        kept: list[tuple[Planned, list[Tensor], list[Tensor]]] = []
        message: list[Tensor] = []
        for chunk, piece in enumerate(self.slices):
            own = copy.deepcopy(batch)
            planned = piece.planned(own)
            leaves, inputs = planned.boundaries[chunk].unpack(message, training=True)
            made, outputs = piece.run(own, planned, chunk, inputs, seeds)
            message = [t.clone() for t in planned.boundaries[chunk + 1].pack(made)]
            roots = planned.boundaries[chunk + 1].roots(made)
            if chunk == len(self.slices) - 1:
                roots = [loss := self.caller.loss_of(outputs, own)]
            kept.append((planned, leaves, roots))
        gradients: list[Tensor | None] = [torch.ones_like(loss)]
        for chunk, (planned, leaves, roots) in reversed(list(enumerate(kept))):
            reached = [(r, g) for r, g in zip(roots, gradients, strict=True) if g is not None]
            if reached:
                torch.autograd.backward(*zip(*reached, strict=True))
            message = [t.clone() for t in planned.boundaries[chunk].pack_gradients(leaves)]
            gradients = planned.boundaries[chunk].unpack_gradients(message)
        return loss.detach(), self._gradients()

    @torch.no_grad()
    def predict(self, batch: Any) -> Any:
        """The outputs in eval mode."""
        message: list[Tensor] = []
        for chunk, piece in enumerate(self.slices):
            own = copy.deepcopy(batch)
            piece.set_training(False)
            planned = piece.planned(own)
            _, inputs = planned.boundaries[chunk].unpack(message, training=False)
            made, outputs = piece.run(own, planned, chunk, inputs, SEEDS)
            message = [t.clone() for t in planned.boundaries[chunk + 1].pack(made)]
        return outputs

    def _gradients(self) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for piece in self.slices:
            for name, parameter in piece.parameters.items():
                if parameter.grad is not None:
                    sums[name] = sums[name] + parameter.grad if name in sums else parameter.grad
                    parameter.grad = None
        return sums


def unsplit(model: nn.Module, batch: Any, caller: Caller | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and gradients of the model as it is."""
    caller, model, batch = caller or Caller(), copy.deepcopy(model), copy.deepcopy(batch)
    loss = caller.loss_of(caller.outputs(model, batch), batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_exact(model: nn.Module, batch: Any, *, chunks: Sequence[int] = (1, 2, 3, 4), **options: Any) -> None:
    """Every cut gives the unsplit model's loss and gradients."""
    loss, gradients = unsplit(model, batch, options.get("caller"))
    for count in chunks:
        own_loss, own = Pipe(model, batch, count, **options).train(batch)
        torch.testing.assert_close(own_loss, loss, rtol=1e-6, atol=1e-7)
        assert own.keys() == gradients.keys(), count
        for name, gradient in gradients.items():
            torch.testing.assert_close(own[name], gradient, rtol=1e-5, atol=1e-6, msg=f"{name} in {count} chunks")


def assert_equal_cuts(model: nn.Module, batch: Any, *, chunks: Sequence[int] = (1, 2, 3, 4), **options: Any) -> None:
    """Every cut gives the same bits, dropout and all."""
    loss, gradients = Pipe(model, batch, chunks[0], **options).train(batch)
    for count in chunks[1:]:
        own_loss, own = Pipe(model, batch, count, **options).train(batch)
        assert torch.equal(own_loss, loss), count
        assert own.keys() == gradients.keys(), count
        assert all(torch.equal(own[name], gradients[name]) for name in own), count
