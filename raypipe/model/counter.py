"""What a recorded event costs, whether it draws random numbers, and what to do where fakes know no answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from raypipe.model.flops import flops_of
from raypipe.model.known import Known

__all__ = ["NEEDS_DATA", "Counter"]

NEEDS_DATA = (
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.UnsupportedOperatorException,
)
"""FakeTensor's own exceptions: an error of the user's code is none of them."""


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the kernels of one event.

    Args:
        mode: of the fakes.
        guess: run a kernel that needs data on stand-ins (inside of units: its owner checks what it guessed).
        known: what is known of the data of the fakes.

    Attributes: ``flops`` and ``backward_flops``; ``drawn``, whether a kernel drew random numbers; ``guessed``,
    whether one needed data.
    """

    supports_higher_order_operators = True

    def __init__(self, mode: fake_tensor.FakeTensorMode, *, guess: bool, known: Known | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode, self._guess, self._known = mode, guess, known or Known()
        self.flops = self.backward_flops = 0
        self.drawn = False
        self.guessed = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        # Compiled code (flex attention compiles itself) refuses to run under a mode that does not say this.
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.guessed and func is torch.ops.aten.split_with_sizes.default:
            args = _fitted(*args)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            if not (self._guess if isinstance(error, NEEDS_DATA) else _in_stand_in(error)):
                raise
            self.guessed |= isinstance(error, NEEDS_DATA)
            result = self.on_numbers(func, args, kwargs)
        else:
            self._known.follow(func, args, kwargs, result)
        forward, backward = flops_of(func, args, kwargs, result)
        self.flops += forward
        self.backward_flops += backward
        self.drawn |= torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return result

    def on_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a kernel or function on numbers; an error of its own is then the true one."""
        with _disable_current_modes(), torch.no_grad():
            args, kwargs = pytree.tree_map_only(
                fake_tensor.FakeTensor, lambda fake: self._known.of(fake, _numbers), (args, kwargs)
            )
            result = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, self._faked, result)

    def _faked(self, real: Tensor) -> Tensor:
        fake: Tensor = self._mode.from_tensor(real)
        self._known.tell(fake, real)
        return fake


def _numbers(fake: Tensor) -> Tensor:
    """Zeros; a mask that lets everything through."""
    make = torch.ones if fake.dtype is torch.bool else torch.zeros
    return make(tuple(fake.shape), dtype=fake.dtype, device=fake.device)


def _fitted(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> tuple[Tensor, list[int], int]:
    """Sizes that were guessed may not sum to what is split (rows by their expert): the first takes what is missing."""
    whole, rest = tensor.shape[dim], sum(sizes[1:])
    return tensor, [whole - rest, *sizes[1:]] if rest <= whole else [whole, *[0] * (len(sizes) - 1)], dim


def _in_stand_in(error: Exception) -> bool:
    """Whether a kernel's stand-in failed, which may know less than the kernel (no float32 in a grouped product)."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "torch._meta_registrations":
            return True
        trace = trace.tb_next
    return False
