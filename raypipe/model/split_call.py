"""One call of a torch function whose backward comes in two halves.

The call runs on stand-ins for its inputs, so that it has a small graph of its own that leads to its weights and to
nothing else of the model. Its backward asks that graph for the gradients of the inputs at once and leaves the rest on a
queue. PyTorch's own nodes compute both, each leaving out what is not asked for, so every bit is that of a whole
backward, whatever the function, layout or type.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from raypipe.model.split_functions import Operands
from raypipe.model.weight_queue import WeightQueue, run_backward

__all__ = ["asked_for", "call_in_halves"]


def call_in_halves(
    queue: WeightQueue,
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    operands: Operands,
    origin: Tensor,
) -> Tensor:
    """The call's result; in its backward, gradients of ``operands.parameters`` go on the queue.

    Args:
        queue: for these gradients.
        func: called with ``args`` and ``kwargs``; to return one tensor.
        operands: what of these requires a gradient.
        origin: any leaf that requires a gradient, for the graph of the inputs' stand-ins to end in.
    """
    call = _Call(queue, func, list(args), dict(kwargs), [place for place, _ in operands.inputs], origin)
    inputs = [tensor for _, tensor in operands.inputs]
    return _run(call, *inputs, *operands.parameters)


@dataclass(slots=True)
class _Call:
    queue: WeightQueue
    func: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    places: list[int | str]
    origin: Tensor


class _Wanted(enum.Enum):
    """What the running backward does with the gradient of one of a function's arguments."""

    NOT = enum.auto()
    ADDED = enum.auto()
    RETURNED = enum.auto()


def _wanted(node: Any) -> _Wanted:
    if node is None:
        return _Wanted.NOT
    try:
        return _Wanted.ADDED if torch._C._will_engine_execute_node(node) else _Wanted.NOT
    except RuntimeError:  # a leaf that torch.autograd.grad was asked about
        return _Wanted.RETURNED


def asked_for(ctx: Any) -> list[bool]:
    """Which of its tensor arguments' gradients the running backward asks a function for.

    ``ctx.needs_input_grad`` says what the forward knew: which arguments require a gradient at all. To be called in a
    ``torch.autograd.Function``'s backward.
    """
    return [_wanted(node) is not _Wanted.NOT for node, _ in ctx.next_functions]


class _Saved:
    """What the small graph saves. The function around it saves it for it: so hooks on saved tensors (those of a
    checkpoint, which forget them and run the forward again) act once, in the backward that they belong to."""

    def __init__(self) -> None:
        self.tensors: Sequence[Tensor] = []

    def pack(self, tensor: Tensor) -> int:
        assert isinstance(self.tensors, list)
        self.tensors.append(tensor.detach())
        return len(self.tensors) - 1

    def unpack(self, number: int) -> Tensor:
        return self.tensors[number]


class _Entry(torch.autograd.Function):
    """An input's stand-in: the same memory, and the end of the small graph.

    A detached leaf would be the same, but its graph would keep its memory.
    """

    @staticmethod
    def forward(ctx: Any, origin: Tensor, tensor: Tensor) -> Tensor:
        return tensor.detach()


class _InHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        entries = []
        saved = _Saved()
        with torch.enable_grad():
            for place, tensor in zip(call.places, tensors, strict=False):
                entry = _enter(call.origin, tensor.detach())
                assert entry.grad_fn is not None
                entries.append(GradientEdge(entry.grad_fn, 0))
                if isinstance(place, int):
                    call.args[place] = entry
                else:
                    call.kwargs[place] = entry
            with saved_tensors_hooks(saved.pack, saved.unpack):
                result: Tensor = call.func(*call.args, **call.kwargs)
        ctx.save_for_backward(*saved.tensors)
        saved.tensors = ()
        ctx.set_materialize_grads(False)
        ctx.queue, ctx.entries, ctx.saved, ctx.edge = call.queue, entries, saved, get_gradient_edge(result)
        ctx.parameters = tensors[len(entries) :]
        return result.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * (1 + len(ctx.entries) + len(ctx.parameters))
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the model asks for the gradient of a gradient (create_graph=True), which a backward in two halves "
                "does not have; take a schedule with whole backwards, such as '1f1b'"
            )
        keep: bool = torch._C._autograd._get_current_graph_task_keep_graph()
        saved = ctx.saved_tensors  # an error where they were freed
        ctx.saved.tensors = saved
        edge: GradientEdge = ctx.edge
        inputs = run_backward([edge], [gradient], ctx.entries, keep=True) if ctx.entries else ()
        wanted = [_wanted(node) for node, _ in ctx.next_functions[len(ctx.entries) :]]
        now = [p for p, how in zip(ctx.parameters, wanted, strict=True) if how is _Wanted.RETURNED]
        given = dict(zip(map(id, now), run_backward([edge], [gradient], now, keep=True), strict=True)) if now else {}
        later = [p for p, how in zip(ctx.parameters, wanted, strict=True) if how is _Wanted.ADDED]
        if later:
            ctx.queue.add(edge, gradient, later, keep=keep)
        if not keep:  # the queue alone holds the small graph, and what it saved
            ctx.edge = ctx.saved = None
        return (None, *inputs, *(given.get(id(p)) for p in ctx.parameters))


# Without the Python around ``Function.apply``, which is for functorch's transforms; the mode is off in these.
_enter: Callable[..., Tensor] = super(torch.autograd.Function, _Entry).apply
_run: Callable[..., Tensor] = super(torch.autograd.Function, _InHalves).apply
