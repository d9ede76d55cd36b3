"""Running a model so that a second run gives the same: randomness off, its state as it was.

Random numbers are replaced by their expectation (a dropout keeps everything), below PyTorch's functions, so that it
does not matter how a model asks for them. What has no expectation worth the name (``randperm``, ``multinomial``) is
drawn from the same seed each time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["quiet"]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Without gradients and without randomness; buffers, modes and random states are restored at the end.

    BatchNorm runs on its running statistics, since those of a microbatch are another model's.
    """
    with ExitStack() as stack:
        stack.enter_context(_generators_restored())
        stack.enter_context(_buffers_restored(model))
        stack.enter_context(_batch_norm_in_eval(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Expectations())  # type: ignore[no-untyped-call]
        yield


class _Expectations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts expectations in the place of random numbers."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        # Compiled code (flex attention compiles itself) refuses to run under a mode that does not say this.
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        result = func(*_without_dropout(func, args), **kwargs)
        expectation = _EXPECTATIONS.get(func.overloadpacket.__name__)
        if expectation is None or not isinstance(result, torch.Tensor):
            return result
        value = expectation(args)
        return result.copy_(value) if isinstance(value, torch.Tensor) else result.fill_(value)


def _argument(position: int, default: float) -> Callable[[tuple[Any, ...]], Any]:
    return lambda args: args[position] if len(args) > position else default


_EXPECTATIONS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "rand": lambda args: 0.5,
    "rand_like": lambda args: 0.5,
    "randn": lambda args: 0.0,
    "randn_like": lambda args: 0.0,
    "bernoulli_": _argument(1, 0.5),
    "bernoulli": lambda args: args[1] if len(args) > 1 else args[0],
    "uniform_": lambda args: (_argument(1, 0.0)(args) + _argument(2, 1.0)(args)) / 2,
    "normal_": _argument(1, 0.0),
    "normal": lambda args: args[0] if isinstance(args[0], torch.Tensor) else 0.0,
    "exponential_": lambda args: 1.0 / _argument(1, 1.0)(args),
}


def _without_dropout(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """The arguments, with the dropout of fused kernels (attention, recurrent layers on a GPU) switched off."""
    quiet_args = list(args)
    for position, argument in enumerate(func._schema.arguments[: len(args)]):
        if argument.name in ("dropout_p", "dropout"):
            quiet_args[position] = 0.0
        elif argument.name == "train" and func.overloadpacket.__name__ == "native_dropout":
            quiet_args[position] = False
    return quiet_args


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Seeds every global generator for the time being."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Restores which tensor each buffer is, and what it holds."""
    saved = [(m, dict(m._buffers)) for m in model.modules() if m._buffers]
    values = {id(b): (b, b.detach().clone()) for _, buffers in saved for b in buffers.values() if b is not None}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values.values():
                buffer.copy_(value)
        for module, buffers in saved:
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def _batch_norm_in_eval(model: nn.Module) -> Iterator[None]:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True
