"""Weight gradients that wait: what a backward left undone, and the one pass that does it.

Zero-bubble schedules (Qi et al., "Zero Bubble Pipeline Parallelism", 2024) run a backward in two halves: the gradient
of a chunk's input at once, since the stage before it waits for that, and the gradients of weights when there is time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

__all__ = ["WeightQueue", "run_backward"]


@dataclass(frozen=True, slots=True)
class _Left:
    """A call whose weights wait: where its backward starts, the gradient there, and whose backward it was part of."""

    edge: GradientEdge
    gradient: Tensor
    parameters: tuple[Tensor, ...]
    task: int
    keep: bool


class WeightQueue:
    """What one backward left for later, of one microbatch.

    ``drain`` hands all of it to autograd's engine at once. The engine takes calls in the order that a whole backward
    has (the latest of the forward first), runs the same kernels, sums what a parameter gets from several calls in the
    same order, and adds the sum to ``.grad`` by the same node. So the gradients have the bits of a whole backward.

    Two cases differ from it in the last bits. A parameter that is also used by a function that is not split has that
    part of its gradient added first, in the input half. And a parameter that is used both inside and outside of a
    reentrant checkpoint gets the two sums in the order in which they were complete.
    """

    def __init__(self) -> None:
        self._left: list[_Left] = []

    def __len__(self) -> int:
        return len(self._left)

    def add(self, edge: GradientEdge, gradient: Tensor, parameters: Sequence[Tensor], *, keep: bool = False) -> None:
        """Leaves a call's weights for later; to be called from inside a backward.

        Args:
            edge: of the call's result, in a graph that leads to the parameters.
            gradient: of the result.
            parameters: leaves that wait.
            keep: whether that graph is needed again afterwards.
        """
        task = torch._C._current_graph_task_id()
        self._left.append(_Left(edge, gradient, tuple(parameters), task, keep))

    def parameters(self) -> tuple[Tensor, ...]:
        """Those whose gradient waits, each once, in the order in which they were first left."""
        return _unique(self._left)

    def drain(self) -> None:
        """Adds to ``.grad`` of each parameter what it waits for; the queue is empty afterwards.

        A backward inside a backward (that of a reentrant checkpoint) adds its sums when it ends, so each is a pass of
        its own, in the order in which they ended.
        """
        passes: dict[int, list[_Left]] = {}
        for left in self._left:
            waiting = passes.pop(left.task, [])
            waiting.append(left)
            passes[left.task] = waiting  # last, as far as it is known
        self._left = []
        for waiting in passes.values():
            run_backward(
                [left.edge for left in waiting],
                [left.gradient for left in waiting],
                _unique(waiting),
                keep=any(left.keep for left in waiting),
                accumulate=True,
            )


def run_backward(
    edges: Sequence[Tensor | GradientEdge],
    gradients: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    *,
    keep: bool,
    accumulate: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients of ``inputs``, and nothing else: autograd's nodes leave out a product that nobody asks for.

    With ``accumulate`` they are added to ``.grad``; without ``inputs``, those of all leaves.

    This is ``torch.autograd.grad`` (or, with ``accumulate``, ``backward``) without the 50 microseconds of its Python,
    and out of sight of modes, so that it may run inside a backward once for each layer.
    """
    made: tuple[Tensor | None, ...] = torch.autograd.Variable._execution_engine.run_backward(
        tuple(edges),
        tuple(gradients),
        keep,
        False,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=accumulate,
    )
    return made


def _unique(waiting: Iterable[_Left]) -> tuple[Tensor, ...]:
    return tuple({id(p): p for left in waiting for p in left.parameters}.values())
