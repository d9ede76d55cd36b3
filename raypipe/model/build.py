"""A model in pieces: a skeleton of husks that every stage holds, and the tensors that one stage holds."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raypipe.model.husk import Husk, husk_of, names_of, replace_tensors
from raypipe.model.reach import refuse_foreign_hooks
from raypipe.model.units import find_units

__all__ = ["Skeleton", "dump", "held_state", "make_skeleton", "materialise", "whole_state"]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The model's objects without the weights of its units.

    Attributes: ``model``, whose parameters, and whose units' buffers, are husks; ``unit_buffers``, names of the buffers
    in each unit.
    """

    model: nn.Module
    unit_buffers: Mapping[str, tuple[str, ...]]

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        _Pickler(buffer).dump(self.model)
        return _rebuild_skeleton, (buffer.getvalue(), self.unit_buffers)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Also takes parametrized modules (weight norm), which refuse to be pickled: their class is made at run time."""

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, nn.Module) or not parametrize.is_parametrized(thing):
            return super().reducer_override(thing)
        names = list(thing.parametrizations._modules)  # type: ignore[union-attr]
        return _new_parametrized, (type(thing).__bases__[0], names), vars(thing)


def _new_parametrized(base: type[nn.Module], names: Iterable[str]) -> nn.Module:
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _rebuild_skeleton(model: bytes, unit_buffers: Mapping[str, tuple[str, ...]]) -> Skeleton:
    return Skeleton(pickle.loads(model), unit_buffers)


def make_skeleton(
    model: nn.Module, patterns: Sequence[str] | None = None, tensor: Callable[[str], Tensor] | None = None
) -> Skeleton:
    """The skeleton of a model, which itself is not changed.

    Args:
        model: with its weights, or of husks.
        patterns: the user's ``units``.
        tensor: gives a buffer by its name, for a model of husks.

    Raises:
        ValueError: the model cannot be copied; the sentence names the attribute.
    """
    refuse_foreign_hooks(model)
    parameters, buffers = names_of(model)
    buffer_names = {id(buffer): name for name, buffer in buffers.items()}
    units = find_units(model, patterns)
    unit_buffers = {name: tuple(buffer_names[id(b)] for b in unit.buffers()) for name, unit in units.items()}
    inside = {name for names in unit_buffers.values() for name in names}
    husks: dict[int, Tensor] = {id(p): husk_of(p, name, True) for name, p in parameters.items()}
    husks.update((id(b), husk_of(b, name, False)) for name, b in buffers.items() if name in inside)
    if tensor is not None:  # plain code between units may look at these
        husks.update((id(b), tensor(name)) for name, b in buffers.items() if name not in inside)
    try:
        return Skeleton(replace_tensors(model, husks), unit_buffers)
    except Exception as error:
        raise ValueError(_left_by_a_forward(model) or _unpicklable(model, error)) from None


def _left_by_a_forward(model: nn.Module) -> str:
    """Says which attribute holds a tensor with a gradient's history, which nothing can copy; empty if none does."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                where = f"{name}.{key}".lstrip(".")
                return (
                    f"{where} is a tensor that was computed from others ({value.grad_fn.name()}), as a forward leaves "
                    "it behind, and a model that holds one cannot be copied: give it before its first forward, or "
                    "set the attribute to None"
                )
    return ""


def dump(skeleton: Skeleton) -> bytes:
    """The skeleton as bytes for other processes; classes of ``__main__`` travel along.

    Raises:
        ValueError: it cannot be pickled; the sentence names the attribute.
    """
    try:
        return cloudpickle.dumps(skeleton)  # type: ignore[no-any-return]
    except Exception as error:
        raise ValueError(_unpicklable(skeleton.model, error)) from None


def materialise(skeleton: Skeleton, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The stage's model: the skeleton with the husks named in ``tensors`` replaced by them."""
    parameters, buffers = names_of(skeleton.model)
    real: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name in parameters:
            real[id(parameters[name])] = nn.Parameter(tensor, requires_grad=parameters[name].requires_grad)
        else:
            real[id(buffers[name])] = tensor
    return replace_tensors(skeleton.model, real)


def whole_state(
    model: nn.Module, held: Iterable[Mapping[str, Tensor]], source: Callable[[str], Tensor] | None = None
) -> dict[str, Any]:
    """The unsplit model's ``state_dict`` with the values that stages hold.

    Args:
        model: the unsplit model; what no stage holds keeps its value.
        held: tensors by first name, a mapping for each stage.
        source: gives a value that no stage holds, by first name; None: the model has it.
    """
    values = {name: tensor for tensors in held for name, tensor in tensors.items()}
    first_names: dict[int, str] = {}
    for named in (model.named_parameters(), model.named_buffers()):
        for first, thing in named:
            first_names.setdefault(id(thing), first)
    with torch.no_grad():
        state = model.state_dict(keep_vars=True)
        for value in state.values():
            name = first_names.get(id(value), "") if isinstance(value, Tensor) else ""
            if name and name not in values:
                values[name] = (value.detach() if source is None else source(name)).clone()
        return {
            key: values[first_names[id(value)]]
            if isinstance(value, Tensor) and id(value) in first_names
            else (value.detach().clone() if isinstance(value, Tensor) else value)
            for key, value in state.items()
        }


def held_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a stage's model that is no husk, by first name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if not isinstance(tensor, Husk)}


def _unpicklable(model: nn.Module, error: Exception) -> str:
    """Names the attribute that stands in the way, by trying each one alone."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                cloudpickle.Pickler(io.BytesIO()).dump(value)
            except Exception as inner:
                path = f"{name}.{key}" if name else key
                return (
                    f"the model cannot be pickled because of its attribute {path!r} ({type(value).__name__}: {inner}); "
                    "remove it, or make it when it is first used"
                )
    return f"the model cannot be pickled ({type(error).__name__}: {error}); a stage gets its slice by pickling"
