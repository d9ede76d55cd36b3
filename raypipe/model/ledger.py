"""Writes a recording: an event at a time, with a value for each tensor that it made or changed."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from raypipe.model import refusals
from raypipe.model.counter import Counter
from raypipe.model.event import Constant, Event, Leaf, Left, Mutation, New, Path, Play, Same, Value
from raypipe.model.frames import Place
from raypipe.model.recording import Recording
from raypipe.model.trees import PLAIN, held_by, leaves_in
from raypipe.model.written import Written
from raypipe.tensors import TensorSpec

__all__ = ["Happening", "Ledger"]

_, _NOTHING = pytree.tree_flatten(None)


@dataclass(frozen=True, slots=True)
class Happening:
    """What ran: its name, the number of the unit call or None, what it cost, and where it stands in the user's code."""

    name: str
    call: int | None
    counter: Counter
    where: Place


class Ledger:
    """Adds to a recording.

    Args:
        recording: to write.
        written: the fakes of real tensors that values were written into.
        mark: makes a tensor known as a value of this run.
        parameter_memory: addresses of the parameters' storages.

    Attributes:
        numbers: of values, by the id of their tensor.
    """

    def __init__(
        self,
        recording: Recording,
        written: Written,
        mark: Callable[[Tensor], None],
        parameter_memory: Container[int],
    ) -> None:
        self._recording, self._written, self._mark = recording, written, mark
        self._parameter_memory = parameter_memory
        self.numbers: dict[int, int] = {}
        self._storages: dict[int, int] = {}
        # Tensors, storages and frames are told apart by address: none may be freed meanwhile.
        self._regions: list[FrameType] = []
        self._keep: list[Tensor] = []

    def open(self, name: str) -> int:
        """The number of a unit call's event, which is added when the call returns; its hooks' events come after it."""
        self._recording.events.append(Event(name, None, (), (), (), _NOTHING))
        return len(self._recording.events) - 1

    def add(
        self,
        what: Happening,
        sources: tuple[tuple[int, ...], tuple[str, ...]],
        inputs: tuple[Any, Any],
        changed: set[int],
        result: Any,
        number: int | None = None,
        beside: tuple[tuple[Play, ...], tuple[Left, ...]] = ((), ()),
    ) -> None:
        """Adds an event.

        Args:
            what: ran.
            sources: numbers of the values and names of the parameters that it read.
            inputs: its positional and keyword arguments.
            changed: ids of the arguments that it changed in place.
            result: that it returned.
            number: that was opened for it.
            beside: the hooks that it ran, and what it left behind.
        """
        opened, number = number, len(self._recording.events) if number is None else number
        paths: dict[int, Path] = {}
        mutations = []
        for path, leaf in leaves_in(inputs):
            if id(leaf) in paths or isinstance(leaf, PLAIN):
                continue
            paths[id(leaf)] = path
            if id(leaf) in changed:
                mutations.append(Mutation(path, self._changed(leaf, what, number)))
        leaves, tree = pytree.tree_flatten(result)
        described = tuple(self._described(leaf, paths, number) for leaf in leaves)
        event = Event(
            what.name,
            what.call,
            tuple(dict.fromkeys(sources[0])),
            tuple(dict.fromkeys(sources[1])),
            described,
            tree,
            tuple(mutations),
            what.counter.flops,
            what.where.line,
            what.counter.drawn and what.call is None,
            self._region(what.where),
            what.counter.backward_flops,
            *beside,
            guessed=what.counter.guessed,
        )
        if opened is None:
            self._recording.events.append(event)
        else:
            self._recording.events[number] = event

    def value(self, tensor: Tensor, event: int) -> int:
        """The number of a new value, which event ``event`` made; of a known one where that or a later one made it."""
        return self.numbers[id(tensor)] if self.made_since(tensor, event) else self._value(tensor, None, event)

    def made_since(self, tensor: Tensor, event: int) -> bool:
        """Whether this is a value that event ``event`` or a later one made."""
        number = self.numbers.get(id(tensor))
        return number is not None and self._recording.values[number].event >= event

    def refresh(self, tensor: Tensor) -> None:
        """A value that its event changed in place later: a gradient may reach it now."""
        number = self.numbers[id(tensor)]
        if self._recording.values[number].requires_grad != tensor.requires_grad:
            values = self._recording.values
            values[number] = replace(values[number], requires_grad=tensor.requires_grad)
            self._recording.placeholders[number].requires_grad_(tensor.requires_grad)

    def _described(self, leaf: Any, paths: dict[int, Path], event: int) -> Leaf:
        if id(leaf) in paths and not isinstance(leaf, PLAIN):
            return Same(paths[id(leaf)])
        if isinstance(leaf, Tensor):
            return New(self.value(leaf, event))
        return Constant(leaf, fixed=next(held_by(leaf), None) is None)

    def _changed(self, tensor: Tensor, what: Happening, event: int) -> int:
        """A new version of the same object."""
        if tensor.untyped_storage()._cdata in self._parameter_memory:
            refusals.changes_parameter(what.name, what.where.line)
        number = self.numbers.get(id(tensor))
        return self._value(tensor, None if number is None else self._recording.values[number].thing, event)

    def _value(self, tensor: Tensor, thing: int | None, event: int) -> int:
        values = self._recording.values
        number, fake = len(values), self._written.fake_of(tensor)
        storage = self._storages.setdefault(fake.untyped_storage()._cdata, number)
        spec = TensorSpec(tuple(fake.shape), fake.dtype, fake.device)
        thing = number if thing is None else thing
        values.append(Value(number, event, spec, tuple(fake.stride()), fake.requires_grad, thing, storage))
        self._recording.placeholders.append(fake.detach().requires_grad_(fake.requires_grad))
        self._keep += (tensor, fake)
        self.numbers[id(tensor)] = number
        self._mark(tensor)
        return number

    def _region(self, where: Place) -> int | None:
        if where.region is None:
            return None
        if where.region not in self._regions:
            self._regions.append(where.region)
        return self._regions.index(where.region)
