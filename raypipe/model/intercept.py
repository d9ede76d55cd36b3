"""How events are seen: unit calls at ``__call__``, torch functions by a ``TorchFunctionMode`` that is off inside units.

A tensor that an event made carries the mark of its run; a tensor without it does not depend on any unit, and code that
works on such tensors (masks, positions) is not our business: every stage runs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raypipe.model.seeds import kept_state, run_keyed

__all__ = ["Switch", "Watch", "install"]


class Watch(TorchFunctionMode):
    """Sees one forward; its subclasses record it or replay it."""

    def __init__(self, parameters: Mapping[int, str]) -> None:
        super().__init__()
        # By id of the tensor: every parameter is a source of values. A stage's also has its units' buffers.
        self.parameters = parameters
        self.inside = False
        self._popped = False
        # Not the run itself: a tensor that a model keeps must not keep the run's activations alive.
        self._mark = object()

    def marked(self, tensor: Tensor) -> bool:
        """Whether the tensor is a value of THIS run; one that was kept from an earlier run is not."""
        return getattr(tensor, "_raypipe_mark", None) is self._mark

    def mark(self, tensor: Tensor) -> None:
        """Makes the tensor a value of this run."""
        tensor._raypipe_mark = self._mark  # type: ignore[attr-defined]

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A unit's call, outside of other units."""
        raise NotImplementedError

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A torch function on at least one value or parameter, outside of units."""
        raise NotImplementedError

    def nested_call(self, name: str) -> None:
        """A unit was called inside another unit."""

    def depends(self, tensor: Tensor) -> bool:
        """Whether what is made of this tensor is a value."""
        return getattr(tensor, "_raypipe_mark", None) is self._mark or id(tensor) in self.parameters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside or not (self._any_depends(args) or (kwargs and self._any_depends(kwargs.values()))):
            return func(*args, **kwargs) if kwargs else func(*args)
        return self.function(func, args, kwargs or {})

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside units nothing is seen.

        The mode is popped, which costs nothing per function; a mode on top of it forbids that.
        """
        self.inside = True
        top = torch._C._len_torch_function_stack() - 1
        popped = torch._C._get_function_stack_at(top) is self if top >= 0 else False
        if popped:
            torch._C._pop_torch_function_stack()
        self._popped = popped
        try:
            yield
        finally:
            if popped:
                torch._C._push_on_torch_function_stack(self)
            self.inside = False

    @contextmanager
    def on_again(self) -> Iterator[None]:
        """What the body of a hook inside a unit does is seen."""
        self.inside = False
        if self._popped:
            torch._C._push_on_torch_function_stack(self)
        try:
            yield
        finally:
            if self._popped:
                torch._C._pop_torch_function_stack()
            self.inside = True

    def _any_depends(self, args: Any) -> bool:
        for arg in args:
            if isinstance(arg, Tensor):
                if self.depends(arg):
                    return True
            elif isinstance(arg, (list, tuple)) and self._any_depends(arg):
                return True
        return False


class Switch:
    """What the units of one model ask at each call: who watches now?"""

    def __init__(self) -> None:
        self.watch: Watch | None = None

    @contextmanager
    def on(self, watch: Watch) -> Iterator[None]:
        """``watch`` sees what is called meanwhile; afterwards PyTorch's generators are as they were.

        ``nn.TransformerEncoder``'s fast path gives padded positions another value than its layers do one by one.
        """
        before, self.watch = self.watch, watch
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with kept_state(), watch:
                yield
        finally:
            self.watch = before
            torch.backends.mha.set_fastpath_enabled(fast)


def install(units: Mapping[str, nn.Module]) -> Switch:
    """Makes the calls of these modules seen, by a subclass of each one's own class with another ``__call__``.

    ``__call__`` and not ``forward``: Hugging Face's gradient checkpointing enters ``forward`` again in the backward.
    Units of one class share its subclass, so that what is compiled for one of them fits the others.
    """
    switch = Switch()
    made: dict[type[nn.Module], type[nn.Module]] = {}
    for name, unit in units.items():
        cls = type(unit)
        if cls not in made:
            made[cls] = _watched(cls, switch)
        vars(unit)["_raypipe_unit"] = name
        unit.__class__ = made[cls]
    return switch


def _watched(cls: type[nn.Module], switch: Switch) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch = switch.watch
        if watch is not None and not watch.inside:
            return watch.unit_call(vars(self)["_raypipe_unit"], cls.__call__.__get__(self), args, kwargs)
        if watch is not None:
            watch.nested_call(vars(self)["_raypipe_unit"])
        # Called by another unit, or again in a checkpoint's backward: under the same seed either way.
        return run_keyed(lambda: cls.__call__(self, *args, **kwargs))

    return type(
        cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )
