"""Units compiled by ``torch.compile``, each kind once.

Compiled is a unit's call and never the code between units, so a model is cut as if nothing were compiled. Equal units
run the same code with other weights: dynamo takes weights for arguments, and what it asks of a unit (class, shapes,
modes, numbers) is equal for them.
"""

from __future__ import annotations

import functools
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raypipe.errors import ResourcesError
from raypipe.model.husk import Husk
from raypipe.model.split_backward import SplitCalls

__all__ = ["compile_units", "compiled_again", "eagerly"]

_OPTIONS = {"fallback_random": True}
"""Compiled dropout draws as eager dropout does, from the generator that the unit's seed went to."""

_AGAIN = "_raypipe_compiled_again"

Call = Callable[..., Any]


def compile_units(units: Mapping[str, nn.Module], again: Collection[str] = ()) -> None:
    """Makes the calls of these modules compiled, from their next one on.

    A kind of unit compiles anew for train and eval mode and for sizes that changed, which then are dynamic; at most
    ``torch._dynamo.config.recompile_limit`` (8) times. What comes after that runs as it is. A unit that contains
    another unit is left as it is.

    Args:
        units: by name.
        again: names of those that may also run so that they run again in their backward (see ``compiled_again``).

    Raises:
        ResourcesError: this machine has no C++ compiler.
    """
    _refuse_without_compiler(units)
    known = {id(unit) for unit in units.values()}
    made: dict[Any, Call] = {}
    for name, unit in units.items():
        if any(id(module) in known for module in unit.modules() if module is not unit):
            continue
        # The first where ``nn.Module.compile`` puts its own.
        vars(unit)["_compiled_call_impl"] = functools.partial(_out_of_sight, _made(_call, unit, made), unit)
        if name in again:
            vars(unit)[_AGAIN] = functools.partial(_out_of_sight, _made(_call_again, unit, made), unit)


def compiled_again(unit: nn.Module) -> Call | None:
    """The unit's compiled call that keeps its arguments alone and runs again in its backward, or None.

    The checkpoint is inside of the compiled code, so the compiled variant that ran first is the one that runs again.
    What it draws it draws again, by states of the generator that it keeps.
    """
    return vars(unit).get(_AGAIN)


@contextmanager
def eagerly(unit: nn.Module) -> Iterator[None]:
    """Meanwhile the unit runs as it is."""
    compiled = vars(unit).pop("_compiled_call_impl", None)
    try:
        yield
    finally:
        if compiled is not None:
            vars(unit)["_compiled_call_impl"] = compiled


def _call(unit: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return unit._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def _call_again(unit: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(unit._call_impl, *args, use_reentrant=False, **kwargs)


def _made(call: Call, unit: nn.Module, made: dict[Any, Call]) -> Call:
    """The compiled call for a unit's kind.

    Dynamo keeps what it compiled, and counts how often, by code object: kinds must not use up each other's.
    """
    kind = (call, _kind(unit))
    if kind not in made:
        name = f"{type(unit).__name__}_{len(made)}"
        own = FunctionType(call.__code__.replace(co_name=name, co_qualname=name), globals(), name)
        made[kind] = torch.compile(own, options=dict(_OPTIONS))
    return made[kind]


def _out_of_sight(compiled: Call, unit: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls without the mode that parts backwards: what is compiled has a whole one."""
    top = torch._C._len_torch_function_stack() - 1
    if top < 0 or not isinstance(torch._C._get_function_stack_at(top), SplitCalls):
        return compiled(unit, *args, **kwargs)
    mode = torch._C._pop_torch_function_stack()
    try:
        return compiled(unit, *args, **kwargs)
    finally:
        torch._C._push_on_torch_function_stack(mode)


def _kind(unit: nn.Module) -> Any:
    """Equal for units that can run the same code."""
    tensors = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in (*unit.parameters(), *unit.buffers()))
    return type(unit), repr(unit), tensors


def _refuse_without_compiler(units: Mapping[str, nn.Module]) -> None:
    from torch._inductor import config

    wanted = [name for name in config.cpp.cxx if name]
    held = [p for unit in units.values() for p in unit.parameters() if not isinstance(p, Husk)]
    on_cpu = any(p.device.type == "cpu" for p in held)
    if on_cpu and not any(map(shutil.which, wanted)):
        raise ResourcesError(
            f"compile=True needs a C++ compiler on every node, and {socket.gethostname()} has no "
            f"{' or '.join(wanted)}; install one (apt-get install g++), or leave compile out"
        )
