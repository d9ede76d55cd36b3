"""How events are seen: unit calls at ``__call__``, torch functions by a ``TorchFunctionMode`` that is off inside units.

A tensor that an event made carries a tag, the number of its value; a tensor without one does not depend on any unit, and
code that works on such tensors (masks, positions) is not our business: every stage runs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raypipe.model.recording import Path

__all__ = ["Switch", "Watch", "at_path", "install", "tensors_in"]


class Watch(TorchFunctionMode):
    """Sees one forward; its subclasses record it or replay it."""

    def __init__(self, parameters: Mapping[int, str]) -> None:
        super().__init__()
        self.parameters = parameters  # by id of the tensor: every parameter is a source of values
        self.inside = False

    def tag(self, tensor: Tensor) -> int | None:
        """The number of the tensor's value in THIS run; a tensor that was kept from an earlier run has none."""
        mark = getattr(tensor, "_raypipe_tag", None)
        return mark[1] if mark is not None and mark[0] is self else None

    def set_tag(self, tensor: Tensor, value: int) -> None:
        tensor._raypipe_tag = (self, value)  # type: ignore[attr-defined]

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A torch function on at least one value."""
        raise NotImplementedError

    def nested_call(self, name: str) -> None:
        """A unit was called inside another unit."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside or not self._depends(args, kwargs):
            return func(*args, **kwargs)
        return self.function(func, args, kwargs)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside units nothing is seen. Popping the mode costs nothing per function; a mode on top of it forbids that."""
        self.inside = True
        top = torch._C._len_torch_function_stack() - 1
        popped = torch._C._get_function_stack_at(top) is self if top >= 0 else False
        if popped:
            torch._C._pop_torch_function_stack()
        try:
            yield
        finally:
            if popped:
                torch._C._push_on_torch_function_stack(self)
            self.inside = False

    def _depends(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        for arg in args:
            if isinstance(arg, Tensor):
                if self.tag(arg) is not None or id(arg) in self.parameters:
                    return True
            elif isinstance(arg, (list, tuple)) and self._depends(arg, {}):
                return True
        return any(self._depends((arg,), {}) for arg in kwargs.values() if isinstance(arg, (Tensor, list, tuple)))


class Switch:
    """What the units of one model ask at each call: who watches now?"""

    def __init__(self) -> None:
        self.watch: Watch | None = None

    @contextmanager
    def on(self, watch: Watch) -> Iterator[None]:
        before, self.watch = self.watch, watch
        try:
            with watch:
                yield
        finally:
            self.watch = before


def install(units: Mapping[str, nn.Module]) -> Switch:
    """Makes the calls of these modules seen, by a subclass of each one's own class with another ``__call__``.

    ``__call__`` and not ``forward``: Hugging Face's gradient checkpointing enters ``forward`` again in the backward.
    """
    switch = Switch()
    for name, unit in units.items():
        unit.__class__ = _watched(type(unit), name, switch)
    return switch


def _watched(cls: type[nn.Module], name: str, switch: Switch) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch = switch.watch
        if watch is None:
            return cls.__call__(self, *args, **kwargs)
        if watch.inside:
            watch.nested_call(name)
            return cls.__call__(self, *args, **kwargs)
        return watch.unit_call(name, cls.__call__.__get__(self), args, kwargs)

    return type(
        cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )


def tensors_in(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in nested tuples, lists and dicts, with their paths."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, (list, tuple)):
        for index, item in enumerate(tree):
            yield from tensors_in(item, (*path, index))
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from tensors_in(item, (*path, key))


def at_path(tree: Any, path: Path) -> Any:
    """What stands at ``path``."""
    for key in path:
        tree = tree[key]
    return tree
