"""Records a forward on a model's fake twin.

Units run on fake tensors; the code between them runs for real as long as it touches no value, so that masks may be
asked for what they hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from raypipe.errors import CutError
from raypipe.model import refusals
from raypipe.model.counter import NEEDS_DATA, Counter
from raypipe.model.frames import Place, place, user_line
from raypipe.model.functions import LASTING, READS, SHAPES, changes_in_place, function_name
from raypipe.model.intercept import Watch
from raypipe.model.known import Known
from raypipe.model.ledger import Happening, Ledger
from raypipe.model.recording import Path, Recording
from raypipe.model.saved import Saved
from raypipe.model.trees import held_by, leaves_in, same_leaves, tensors_in
from raypipe.model.twin import Twin
from raypipe.model.within import Within, maker_of
from raypipe.model.written import Written

__all__ = ["record"]

Call = Callable[..., Any]


def record(twin: Twin, forward: Callable[[Any], Any], saved: Saved | None = None) -> Recording:
    """Runs ``forward(twin.model)`` and returns its events.

    Where the forward asks a value for its data after every unit was called (``loss.item()``, a loss over a mask), the
    recording stops: the last stage runs that part for real, whatever it does.

    Args:
        twin: the fake model, in the modes (train, eval) that the run will have.
        forward: calls the model on one microbatch; it may change that microbatch in place.
        saved: collects what the backward will need, where somebody asks.

    Raises:
        CutError: the model does something that no split reproduces: control flow on a value, a value that leaves a unit
            without being returned.
    """
    recorder = _Recorder(twin, saved)
    outputs: Any = None
    collecting = nullcontext() if saved is None else saved.during(recorder.recording)
    with twin.switch.on(recorder), _silent_fakes(), collecting:
        try:
            outputs = forward(twin.model)
        except _AsksForData as stop:
            recorder.recording.stopped = stop.sentence
    recorder.look_at_outputs(outputs)
    if recorder.recording.stopped is not None and not recorder.called.issuperset(twin.units):
        raise CutError(recorder.recording.stopped)
    return recorder.recording


class _AsksForData(BaseException):
    """Leaves the forward where fakes cannot follow it; no ``except Exception`` of a model stops it."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class _Recorder(Watch):
    def __init__(self, twin: Twin, saved: Saved | None) -> None:
        super().__init__(twin.parameters)
        self.twin, self.saved = twin, saved
        self.recording = Recording()
        self.called: set[str] = set()
        self.calls = 0
        self.nested: list[str] = []
        self.written = Written(twin.buffers)
        self.ledger = Ledger(self.recording, self.written, self.mark, twin.parameter_memory)
        self.numbers = self.ledger.numbers

    def depends(self, tensor: Tensor) -> bool:
        """Also true of memory that a value was written into, whichever tensor shows it."""
        return super().depends(tensor) or self.twin.is_fake(tensor) or self.written.shows(tensor)

    def nested_call(self, name: str) -> None:
        self.nested.append(name)
        self.called.add(name)

    def unit_call(self, name: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where = place()
        if where.function is not None:
            refusals.inside_function(where.function, name, where.line)
        with self.off():
            self.called.add(name)
            return self._unit_call(name, call, args, kwargs, where)

    def _unit_call(self, name: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], where: Place) -> Any:
        found = dict(tensors_in((args, kwargs)))
        uses, parameters = self._sources(found, name)
        # A hook may keep what a unit gets and returns. So the unit gets aliases, and its caller aliases of its results:
        # a value is known by the way it came.
        given = {id(t): self._handed_in(t) for t in found.values()}
        own = pytree.tree_map_only(Tensor, lambda t: given.get(id(t), t), (args, kwargs))
        versions = {id(t): given[id(t)]._version for t in found.values()}
        before = pytree.tree_flatten(own)
        marked = [(given[id(t)], self.depends(t)) for t in found.values()]
        known = Known()
        for real, (fake, is_value) in zip(found.values(), marked, strict=True):
            if not is_value:
                known.tell(fake, real)
        self.nested, counter = [], Counter(self.twin.mode, guess=True, known=known)
        own_parameters = self.twin.unit_parameters[name]
        within = Within(name, self._mark, marked, self.numbers, self.parameters, own_parameters, counter.on_numbers)
        with self.twin.mode, counter, within:
            result = call(*own[0], **own[1])
        if not same_leaves(before, pytree.tree_flatten(own)):
            refusals.changes_argument(name, where.line)
        originals = {id(given[id(t)]): t for t in found.values()}
        result = pytree.tree_map_only(
            Tensor, lambda t: originals[id(t)] if id(t) in originals else self._handed_out(t), result
        )
        changed = {id(t) for t in found.values() if given[id(t)]._version != versions[id(t)]}
        for tensor in found.values():  # a real argument that the unit changes is a value from now on
            if id(tensor) in changed and not self.twin.is_fake(tensor) and tensor not in self.written:
                self.written.add(tensor, given[id(tensor)], name, where.line)
        self._refuse_opaque(name, result, (args, kwargs))
        inner = [parameter for unit in self.nested for parameter in self.twin.unit_parameters[unit]]
        sources = ((*uses, *within.uses), (*parameters, *inner, *within.parameters_used))
        self.calls += 1
        what = Happening(name, self.calls - 1, counter, where)
        self.ledger.add(what, sources, (args, kwargs), changed, result)
        return result

    def function(self, func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = function_name(func)
        found = dict(tensors_in((args, kwargs)))
        sources = self._sources(found, name)
        if name in SHAPES:
            args, kwargs = self.written.faked((args, kwargs))
            return func(*args, **kwargs)
        where = place()
        if where.function is not None:
            refusals.inside_function(where.function, name, where.line)
        if name in READS:
            self._stop(name, sources)
        if name in LASTING:
            refusals.lasting(name, self._describe(*sources), where.line)
        if changes_in_place(name, kwargs):
            target = kwargs.get("out", args[0] if args else None)
            if isinstance(target, Tensor) and not self.twin.is_fake(target) and target not in self.written:
                self.written.add(target, self.twin.fake(target), name, where.line)
        given = {id(t): self.written.fake_of(t) for t in found.values()}
        versions = {id(t): given[id(t)]._version for t in found.values()}
        own_args, own_kwargs = self.written.faked((args, kwargs))
        counter = Counter(self.twin.mode, guess=False)
        try:
            with counter:
                result = func(*own_args, **own_kwargs)
        except NEEDS_DATA:
            self._stop(name, sources)
        if counter.drawn and where.region is not None:
            refusals.draws_in_checkpoint(name, where.line)
        if next(tensors_in(result), None) is None and not changes_in_place(name, kwargs):
            return result  # a shape, a dtype: no value
        originals = {id(given[id(t)]): t for t in found.values()}
        result = pytree.tree_map_only(Tensor, lambda t: originals.get(id(t), t), result)
        changed = {id(t) for t in found.values() if given[id(t)]._version != versions[id(t)]}
        self.ledger.add(Happening(name, None, counter, where), sources, (args, kwargs), changed, result)
        return result

    def look_at_outputs(self, outputs: Any) -> None:
        """Notes the values that the forward returned, and objects that units filled out of sight (a cache)."""
        for number, leaf in enumerate(pytree.tree_leaves(outputs)):
            if id(leaf) in self.numbers:
                self.recording.returned += (self.numbers[id(leaf)],)
            elif isinstance(leaf, Tensor):
                if self.twin.is_fake(leaf) and id(leaf) not in self.parameters:
                    self._refuse_hidden(leaf, "the model's output")
            else:
                held = [tensor for tensor in held_by(leaf) if self.twin.is_fake(tensor)]
                if all(id(tensor) in self.numbers for tensor in held):
                    self.recording.returned += tuple(self.numbers[id(tensor)] for tensor in held)
                else:
                    self.recording.withheld += (number,)

    def _sources(self, found: Mapping[Path, Tensor], name: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Numbers of the values, and names of the parameters, among an event's arguments."""
        uses, parameters = [], []
        for tensor in found.values():
            if id(tensor) in self.numbers:
                uses.append(self.numbers[id(tensor)])
            elif id(tensor) in self.parameters:
                parameters.append(self.parameters[id(tensor)])
            elif self.twin.is_fake(tensor):
                self._refuse_hidden(tensor, name)
            elif self.written.shows(tensor):
                refusals.changes_view(name, user_line())
        return tuple(uses), tuple(parameters)

    def _handed_in(self, tensor: Tensor) -> Tensor:
        """What a unit gets in the place of an argument."""
        tensor = self.written.fake_of(tensor)
        if not self.twin.is_fake(tensor):
            made = self.twin.fake(tensor)
            if self.saved is not None:
                self.saved.stands_for(made, tensor)
            return made
        return tensor if id(tensor) in self.parameters else _alias(tensor)

    def _handed_out(self, tensor: Tensor) -> Tensor:
        """What a unit's caller gets in the place of a result."""
        return _alias(tensor) if self.twin.is_fake(tensor) else self.twin.fake(tensor)

    def _describe(self, uses: tuple[int, ...], parameters: tuple[str, ...]) -> str:
        return self.recording.describe(uses[0]) if uses else f"the parameter {parameters[0]}"

    def _stop(self, name: str, sources: tuple[tuple[int, ...], tuple[str, ...]]) -> NoReturn:
        raise _AsksForData(refusals.asks_for_data(user_line(), name, self._describe(*sources)))

    def _refuse_opaque(self, name: str, result: Any, inputs: Any) -> None:
        given = {id(leaf) for _, leaf in leaves_in(inputs)}
        for leaf in pytree.tree_leaves(result):
            if not isinstance(leaf, Tensor) and id(leaf) not in given and next(held_by(leaf), None) is not None:
                refusals.opaque(name, leaf)

    def _refuse_hidden(self, tensor: Tensor, user: str) -> None:
        if id(tensor) in self.twin.buffers:
            refusals.foreign_buffer(self.twin.buffers[id(tensor)], user, user_line())
        last = next((event.name for event in reversed(self.recording.events) if event.call is not None), "a unit")
        refusals.hidden(tensor, maker_of(tensor, self._mark) or f"a unit (at or before {last})", user, user_line())


@contextmanager
def _silent_fakes() -> Iterator[None]:
    """FakeTensor logs what it cannot do as an error; here it is none."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _alias(tensor: Tensor) -> Tensor:
    with torch.enable_grad():
        return tensor.view_as(tensor)
