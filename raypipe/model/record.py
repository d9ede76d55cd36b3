"""Records a forward on a model's fake twin.

Units run on fake tensors; the code between them runs for real as long as it touches no value, so that masks may be asked
for what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from raypipe.errors import CutError
from raypipe.model import refusals
from raypipe.model.frames import Place, place
from raypipe.model.functions import READS, Randomness, changes_in_place, function_name
from raypipe.model.intercept import Watch, at_path, tensors_in
from raypipe.model.recording import Constant, Event, Mutation, New, Path, Recording, Same, Value
from raypipe.model.twin import Twin
from raypipe.model.within import Within
from raypipe.tensors import TensorSpec

__all__ = ["record"]

CANNOT_BE_FAKED = (
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.UnsupportedOperatorException,
)


def record(twin: Twin, forward: Callable[[Any], Any], *, count_flops: bool = False) -> Recording:
    """Runs ``forward(twin.model)`` and returns its events.

    Where the forward asks a value for its data after every unit was called (``loss.item()``, a loss over a mask), the
    recording stops: the last stage runs that part for real, whatever it does.

    Args:
        twin: the fake model, in the modes (train, eval) that the run will have.
        forward: calls the model on one microbatch; it may change that microbatch in place.
        count_flops: also count each event's floating point operations (PyTorch's ``FlopCounterMode``).

    Raises:
        CutError: the model does something that no split reproduces: control flow on a value, a value that leaves a unit
            without being returned.
    """
    recorder = _Recorder(twin)
    with ExitStack() as stack:
        if count_flops:
            recorder.flops = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(twin.switch.on(recorder))
        try:
            outputs = forward(twin.model)
        except _AsksForData as stop:
            if recorder.uncalled():
                raise CutError(stop.sentence) from None
            recorder.recording.stopped = stop.sentence
            return recorder.recording
    return recorder.finish(outputs)


class _AsksForData(BaseException):
    """Leaves the forward where it cannot be followed on fakes; no ``except Exception`` of a model stops it."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class _Recorder(Watch):
    """Attributes: ``values``, the number of each value by the id of its tensor; ``twin``; ``recording``."""

    def __init__(self, twin: Twin) -> None:
        super().__init__(twin.parameters)
        self.twin = twin
        self.recording = Recording()
        self.flops: FlopCounterMode | None = None
        self.values: dict[int, int] = {}
        self.calls: list[str] = []
        self.nested: list[str] = []
        self.storages: dict[int, int] = {}
        self.overwritten: set[int] = set()
        self.keep: list[Any] = []  # tensors and storages are told apart by address: none may be freed meanwhile

    def depends(self, tensor: Tensor) -> bool:
        """Also sees memory that a value was written into, whatever tensor it is seen through."""
        return super().depends(tensor) or self.twin.is_fake(tensor) or self._is_overwritten(tensor)

    def uncalled(self) -> list[str]:
        """The units that were not called yet."""
        return [name for name in self.twin.units if name not in self.calls]

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where = place()
        if where.function is not None:
            refusals.inside_function(where.function, name, where.line)
        with self.off():
            return self._unit_call(name, call, args, kwargs, where)

    def _unit_call(
        self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], where: Place
    ) -> Any:
        found = dict(tensors_in((args, kwargs)))
        uses, parameters = self._sources(found, name)
        # A hook may keep what a unit gets and returns. The unit gets aliases, and its caller aliases of its results, so
        # that a value is known by the way it came.
        own = {id(t): self._handed_in(t) for t in found.values()}
        own_args, own_kwargs = pytree.tree_map_only(Tensor, lambda t: own[id(t)], (args, kwargs))
        versions = {path: own[id(t)]._version for path, t in found.items()}
        leaves_before, tree_before = pytree.tree_flatten((own_args, own_kwargs))
        self.calls.append(name)
        self.nested, before = [], self._total_flops()
        within = Within(self, self._mark, name, self.twin.unit_parameters[name], list(own.values()))
        try:
            with self.twin.mode, within:
                result = call(*own_args, **own_kwargs)
        except CANNOT_BE_FAKED:
            result = self._like_first(name, list(found.values()))
        leaves, tree = pytree.tree_flatten((own_args, own_kwargs))
        if tree != tree_before or any(a is not b for a, b in zip(leaves, leaves_before, strict=True)):
            refusals.changed_argument(name, where.line)
        for path, tensor in found.items():  # a real argument that the unit changes is a value from now on
            if not self.twin.is_fake(tensor) and own[id(tensor)]._version != versions[path]:
                self._overwrite(tensor, name, own[id(tensor)])
        given = {id(mine): tensor for tensor in found.values() for mine in (own[id(tensor)],)}
        result = pytree.tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else _alias(t), result)
        nested = [parameter for unit in self.nested for parameter in self.twin.unit_parameters[unit]]
        sources = (
            tuple(dict.fromkeys((*uses, *within.uses))),
            tuple(dict.fromkeys((*parameters, *nested, *within.parameters))),
        )
        changed = {path: own[id(t)]._version != versions[path] for path, t in found.items()}
        self._refuse_opaque(name, result, leaves)
        flops = self._total_flops() - before
        return self._add(name, sources, (args, kwargs), found, changed, result, flops, where, call=len(self.calls) - 1)

    def nested_call(self, name: str) -> None:
        self.nested.append(name)
        self.calls_nested(name)

    def calls_nested(self, name: str) -> None:
        """A unit inside another one counts as called, but is not a call of its own."""

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError
