"""Refuses hooks that reach what a copy of the model does not hold.

Every stage runs a copy of the model. What a bound method or a ``functools.partial`` holds is copied with it. What a
function finds in its closure, its defaults or its globals is not: it would fill the user's list, or none, while the
copied model reads its own.
"""

from __future__ import annotations

import dis
import enum
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from raypipe.errors import CutError
from raypipe.model.hooks import function_of, hook_name, hooks_of, is_torchs
from raypipe.model.trees import PLAIN

__all__ = ["refuse_foreign_hooks"]

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)
_CANNOT_CHANGE = (*PLAIN, bytes, complex, type, enum.Enum, types.ModuleType, types.BuiltinFunctionType, torch.dtype)
_CAN_BE_FILLED = (list, dict, set, bytearray, torch.Tensor, nn.Module)


def refuse_foreign_hooks(model: nn.Module) -> None:
    """Refuses hooks, and ``forward`` set on instances, that reach what is not copied; and hooks of all modules.

    Raises:
        CutError: there is one.
    """
    for kind in _GLOBAL_HOOKS:
        for hook in getattr(nn.modules.module, kind).values():
            if not is_torchs(hook):
                raise CutError(
                    f"the hook {hook_name(hook)} is registered for all modules of the process, which no stage does; "
                    "remove it, and register it on the modules of the model that it is meant for"
                )
    held = {id(value) for module in model.modules() for value in vars(module).values() if not _is_constant(value)}
    for (path, _, _), hook in hooks_of(model).items():
        _refuse("hook", hook, path, held)
    for path, module in model.named_modules():
        if "forward" in vars(module):
            _refuse("forward", vars(module)["forward"], path, held)


def _refuse(what: str, hook: Callable[..., Any], path: str, held: Collection[int]) -> None:
    function = function_of(hook)
    if not isinstance(function, types.FunctionType):  # an object that is called
        function = type(function).__call__
    for how, found in _reached(function, held, set()):
        raise CutError(
            f"the {what} {hook_name(hook)} on {path or 'the model'} {how} ({type(found).__name__}), but every stage "
            "runs a copy of the model, and this is not copied with it; keep it in an attribute of a module and use a "
            "bound method (self.my_hook) or functools.partial, or what the hook is given"
        )


def _reached(function: Any, held: Collection[int], seen: set[int]) -> Iterator[tuple[str, Any]]:
    """What a function reaches that may change, and how, in words; ``held``: ids of what the model's modules hold."""
    if not isinstance(function, types.FunctionType) or is_torchs(function) or id(function) in seen:
        return
    seen.add(id(function))
    names, code = function.__globals__, function.__code__
    for name, stores in _outer_names(code, frozenset(code.co_freevars)):
        if stores:
            yield f"sets the variable {name}", names.get(name)
        elif isinstance(names.get(name), _CAN_BE_FILLED) or id(names.get(name)) in held:
            yield f"uses the variable {name}", names[name]
        elif getattr(names.get(name), "__globals__", None) is names:  # a function beside it
            yield from _reached(names[name], held, seen)
    own = dict(function.__kwdefaults__ or {})
    if function.__defaults__:
        last = code.co_varnames[: code.co_argcount][-len(function.__defaults__) :]
        own.update(zip(last, function.__defaults__, strict=True))
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            own[name] = cell.cell_contents
    for name, value in own.items():
        yield from _in_value(name, value, held, seen)


def _in_value(name: str, value: Any, held: Collection[int], seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, frozenset)):
        for item in value:
            yield from _in_value(name, item, held, seen)
    elif isinstance(value, types.FunctionType):
        yield from _reached(value, held, seen)
    elif not _is_constant(value):
        yield f"uses the variable {name}", value


def _outer_names(code: types.CodeType, free: Collection[str]) -> Iterator[tuple[str, bool]]:
    """The globals that some code reads; with True the globals and variables of functions around it that it sets."""
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (step.opname == "STORE_DEREF" and step.argval in free):
            yield step.argval, True
        elif step.opname == "LOAD_GLOBAL":
            yield step.argval, False
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _outer_names(inner, free)


def _is_constant(value: Any) -> bool:
    return isinstance(value, (*_CANNOT_CHANGE, types.FunctionType))
