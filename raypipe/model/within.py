"""What goes on inside a unit while it is recorded: what it reads beside its arguments, and what it makes.

A value that reaches a unit by an attribute or a closure is as good as an argument. A tensor that another unit made and
kept to itself can be used in its own chunk alone. What depends on no value (a rotary table that the first block makes
and all use) is nobody's secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from raypipe.model.denominators import is_counted
from raypipe.model.trees import tensors_in

__all__ = ["Maker", "Within", "maker_of"]

_NORMS = (F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm, torch.native_batch_norm)
"""They change running statistics without counting up the tensors' versions."""


class Maker(NamedTuple):
    """What made a tensor: the ``event`` of a ``unit``'s call in the run with this ``mark``, of a value or without."""

    mark: object
    event: int
    unit: str
    of_value: bool


_NO_MEMORY = "its data is not allocated yet"
"""What PyTorch says where C++ reads a fake's memory itself, as recurrent layers do with packed sequences."""


class Within(TorchFunctionMode):
    """Sees the torch functions of one unit call.

    Args:
        unit: its name.
        mark: of the run.
        given: the tensors that it was given, and whether each is a value.
        values: numbers of the run's values, by the id of their tensors.
        parameters: names of all parameters, by id.
        own: names of the unit's own.
        event: number of the call's event.
        hidden: is told of a tensor that another unit made and kept to itself, and which unit uses it.
        on_numbers: runs a function for real on stand-ins for its arguments.

    Attributes: ``uses`` and ``parameters_used``, of what it read beside its arguments; ``paused``, while the body of a
    hook runs, which is no part of the unit; ``reads_hidden``, whether it read values that are no arguments;
    ``counted``, whether it called a loss function whose denominator must be seen; ``normed``, the tensors that norms
    with running statistics were given.
    """

    def __init__(
        self,
        unit: str,
        mark: object,
        given: Iterable[tuple[Tensor, bool]],
        values: Mapping[int, int],
        parameters: Mapping[int, str],
        own: Iterable[str],
        event: int,
        hidden: Callable[[Tensor, str], None],
        on_numbers: Callable[[Any, Any, Any], Any],
    ) -> None:
        super().__init__()
        self._on_numbers = on_numbers
        self._unit, self._mark = unit, mark
        self._given = {id(tensor): is_value for tensor, is_value in given}
        self._values, self._parameters, self._own = values, parameters, frozenset(own)
        self._event, self._hidden = event, hidden
        self.paused = False
        self.counted = self.reads_hidden = False
        self.normed: list[Tensor] = []
        self.uses: list[int] = []
        self.parameters_used: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        self.counted |= is_counted(func)
        if func in _NORMS:
            self.normed += [tensor for _, tensor in tensors_in((args, kwargs or {}))]
        tainted = [self._is_value(tensor) for _, tensor in tensors_in((args, kwargs or {}))]
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if _NO_MEMORY not in str(error):
                raise
            result = self._on_numbers(func, args, kwargs or {})
            if torch.is_grad_enabled() and any(t.requires_grad for _, t in tensors_in((args, kwargs or {}))):
                result = pytree.tree_map_only(Tensor, _with_gradient, result)
        for _, tensor in tensors_in(result):
            tensor._raypipe_maker = Maker(self._mark, self._event, self._unit, any(tainted))  # type: ignore[attr-defined]
        return result

    def _is_value(self, tensor: Tensor) -> bool:
        known = self._given.get(id(tensor))
        if known is not None:
            return known
        if id(tensor) in self._parameters:
            if self._parameters[id(tensor)] not in self._own:
                self.parameters_used.append(self._parameters[id(tensor)])
            return True
        if id(tensor) in self._values:
            self.uses.append(self._values[id(tensor)])
            self.reads_hidden = True
            return True
        maker = maker_of(tensor, self._mark)
        if maker is None or not maker.of_value:
            return False
        if maker.event != self._event:
            self.reads_hidden = True
            self._hidden(tensor, self._unit)
        return True


def _with_gradient(fake: Tensor) -> Tensor:
    return fake.requires_grad_() if fake.is_floating_point() else fake


def maker_of(tensor: Tensor, mark: object) -> Maker | None:
    """Which unit call made a tensor in this run, where one did."""
    maker: Maker | None = getattr(tensor, "_raypipe_maker", None)
    return maker if maker is not None and maker.mark is mark else None
