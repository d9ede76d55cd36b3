"""A backward in two halves, for any model as it is: gradients of inputs at once, gradients of weights when asked for.

Zero-bubble schedules (Qi et al., "Zero Bubble Pipeline Parallelism", 2024) need the two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function

from raypipe.model.split_call import asked_for, call_in_halves
from raypipe.model.split_functions import Operands, find_operands, mark_views
from raypipe.model.weight_queue import WeightQueue

__all__ = ["SplitBackward", "SplitCalls", "Splittable", "splittable"]


class SplitCalls(TorchFunctionMode):
    """Sees the calls that can be split, also those inside of PyTorch's attention and of a checkpoint's second run."""

    def in_halves(self, func: Any, args: Any, kwargs: dict[str, Any], operands: Operands) -> Any:
        """A call that can be split."""
        raise NotImplementedError

    def whole(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Any other call that autograd may follow."""
        return func(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        opened = _OPENED.get(func)
        if opened is not None:
            with self:
                return opened(*args, **kwargs)
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return func(*args, **kwargs)
        places = ((1, "weight"),) if type(func) is Splittable else None
        operands = find_operands(func, args, kwargs, places)
        if operands is not None:
            return self.in_halves(func, args, kwargs, operands)
        result = self.whole(func, args, kwargs)
        mark_views(func, args, result)
        return result


class SplitBackward(SplitCalls):
    """Leaves weight gradients on a queue.

    To be on around a forward and around its backward (where checkpoints run their forward again)::

        queue = WeightQueue()
        with SplitBackward(queue):
            loss = model(...)
        with SplitBackward(queue):
            loss.backward()  # gradients of inputs, and of the weights that are not split
        queue.drain()  # all others

    Split are linear layers, embeddings, convolutions, layer, RMS and group norms, and matrix products with a parameter
    or a view of one, also inside ``nn.MultiheadAttention``; see ``split_functions``. All else has a whole backward in
    the first half. Either way the gradients are the bits of a whole backward; ``WeightQueue`` says where the last ones
    differ.

    Parameters with hooks stay whole, so that their hooks see them in the backward. Hooks on autograd's own nodes (those
    of ``DistributedDataParallel``) are not seen.

    What ``torch.compile`` compiled is out of its sight and stays whole. ``torch.autograd.grad`` gets what it asks for,
    and nothing of it waits. What waits is kept until ``drain``: a call's saved tensors, such as a layer's input, and
    the gradient of its result.

    Args:
        queue: of this microbatch.

    Raises:
        RuntimeError: in a backward with ``create_graph=True``.
    """

    def __init__(self, queue: WeightQueue) -> None:
        super().__init__()
        self._queue = queue
        self._origin = torch.empty(0, requires_grad=True)

    def in_halves(self, func: Any, args: Any, kwargs: dict[str, Any], operands: Operands) -> Any:
        """Its backward leaves the weights."""
        return call_in_halves(self._queue, func, args, kwargs, operands, self._origin)


def _open(func: Any) -> Any:
    """A function of PyTorch's as it is, but without its question whether a mode wants it whole."""
    never = {name: lambda *_: False for name in func.__globals__ if name.startswith("has_torch_function")}
    made = FunctionType(
        func.__code__, {**func.__globals__, **never}, func.__name__, func.__defaults__, func.__closure__
    )
    made.__kwdefaults__ = func.__kwdefaults__
    return made


_OPENED = {
    func: _open(func)
    for func in (F.multi_head_attention_forward, Tensor.backward, torch.autograd.backward, torch.autograd.grad)
}
"""What they call is seen: linear layers inside attention, and a checkpoint's forward inside a backward."""


class Splittable:
    """A function of an input and a weight that ``SplitBackward`` can split. Made by ``splittable``."""

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor], Tensor],
        input_gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
        weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        self.forward, self.input_gradient, self.weight_gradient = forward, input_gradient, weight_gradient
        self.__name__ = getattr(forward, "__name__", type(forward).__name__)

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        result: Tensor
        if torch.overrides.has_torch_function((input, weight)):
            result = handle_torch_function(self, (input, weight), input, weight)
        else:
            result = _Pair.apply(self, input, weight)  # type: ignore[no-untyped-call]
        return result


def splittable(
    forward: Callable[[Tensor, Tensor], Tensor],
    input_gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
    weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Splittable:
    """A function whose gradients come from two functions, each run only when its result is asked for.

    ``torch.autograd.Function`` has one backward for both; it and its calls are not seen by modes.

    Args:
        forward: ``forward(input, weight)``, run without autograd.
        input_gradient: ``input_gradient(gradient, input, weight)``.
        weight_gradient: ``weight_gradient(gradient, input, weight)``.

    Returns:
        ``function(input, weight)``, for any model; autograd follows it with and without ``SplitBackward``.
    """
    return Splittable(forward, input_gradient, weight_gradient)


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Splittable, input: Tensor, weight: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(input, weight)
        return function.forward(input, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        function: Splittable = ctx.function
        of_input, of_weight = asked_for(ctx)
        return (
            None,
            function.input_gradient(gradient, *ctx.saved_tensors) if of_input else None,
            function.weight_gradient(gradient, *ctx.saved_tensors) if of_weight else None,
        )
