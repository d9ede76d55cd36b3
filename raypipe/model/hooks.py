"""The forward hooks inside of a unit: they are the code of whoever set them, and may collect what the unit makes.

The body of a hook counts as code between units. Where the unit runs, a hook is heard and its body seen; where the unit
is skipped, the hook is played with the tensors that it would get, received ones or placeholders. So a list that hooks
fill is as long on every stage as on the unsplit model. PyTorch's own hooks (weight norm, pruning, sharding) work on the
unit itself and stay inside of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["HookPlace", "function_of", "heard", "hook_name", "hooks_of", "is_torchs", "next_hook", "remove_hooks_since"]

HookPlace = tuple[str, str, int]
"""The module's path inside of the unit, the attribute that holds its hooks, and the number of the hook there."""

_KINDS = ("_forward_pre_hooks", "_forward_hooks")

Hear = Callable[[HookPlace, Callable[..., Any], nn.Module, tuple[Any, ...]], Any]
"""``hear(place, hook, module, given)`` calls ``hook(module, *given)`` and returns what that returns."""


def hooks_of(unit: nn.Module, inside: Collection[str] = ()) -> dict[HookPlace, Callable[..., Any]]:
    """The hooks of a unit and of the modules in it, without PyTorch's own and those named in ``inside``."""
    found: dict[HookPlace, Callable[..., Any]] = {}
    for path, module in unit.named_modules():
        for kind in _KINDS:
            for number, hook in enumerate(getattr(module, kind).values()):
                if not is_torchs(hook) and hook_name(hook) not in inside:
                    found[path, kind, number] = hook
    return found


@contextmanager
def heard(unit: nn.Module, hear: Hear, inside: Collection[str] = ()) -> Iterator[None]:
    """Meanwhile the hooks of ``hooks_of`` are called by ``hear``."""
    changed: list[tuple[dict[int, Any], int, Any, Any]] = []
    for place, hook in hooks_of(unit, inside).items():
        hooks = getattr(unit.get_submodule(place[0]), place[1])
        key = list(hooks)[place[2]]
        own = functools.partial(_call, hear, place, hook)
        changed.append((hooks, key, hook, own))
    for hooks, key, _, own in changed:
        hooks[key] = own
    try:
        yield
    finally:
        for hooks, key, hook, own in changed:
            if hooks.get(key) is own:  # it may have removed itself
                hooks[key] = hook


def hook_name(hook: Callable[..., Any]) -> str:
    """Equal for hooks of the same code, on every copy of a model."""
    function = function_of(hook)
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(hook).__qualname__)
    return name if code is None else f"{name} ({code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno})"


def next_hook() -> int:
    """The number that PyTorch gives to the next hook."""
    return RemovableHandle.next_id


def has_hooks_since(model: nn.Module, number: int) -> bool:
    """Whether modules have hooks that were set since ``next_hook()`` was ``number``."""
    return any(key >= number for module in model.modules() for kind in _KINDS for key in getattr(module, kind))


def remove_hooks_since(model: nn.Module, number: int) -> None:
    """Removes the hooks that a forward set and, as it was left before its end, did not remove.

    Args:
        model: whose modules have them.
        number: ``next_hook()`` before the forward.
    """
    for module in model.modules():
        for kind in _KINDS:
            hooks = getattr(module, kind)
            for key in [key for key in hooks if key >= number]:
                del hooks[key]
                for marks in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                    marks.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def _call(hear: Hear, place: HookPlace, hook: Callable[..., Any], module: nn.Module, *given: Any) -> Any:
    return hear(place, hook, module, given)


def function_of(hook: Callable[..., Any]) -> Any:
    """What a hook runs, behind partials and bound methods."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__func__", hook)


def is_torchs(hook: Any) -> bool:
    """Whether a hook is PyTorch's own, or one that splits a unit as PyTorch's do."""
    function = function_of(hook)
    module = getattr(function, "__module__", None) or type(function).__module__
    # Those of a tensor group too: they work on a split unit, and the recording knows only the whole one.
    return module.split(".")[0] == "torch" or module.startswith("raypipe.parallel.")
