"""The two kinds of events, as they are recorded: a unit call, and a function outside of units on a value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from raypipe.errors import CutError
from raypipe.model import refusals
from raypipe.model.counter import NEEDS_DATA, Counter
from raypipe.model.cuts import END
from raypipe.model.event import Path
from raypipe.model.frames import Place, place, user_line
from raypipe.model.functions import LASTING, READS, SHAPES, changes_in_place, function_name
from raypipe.model.hooks import HookPlace, heard, hook_name
from raypipe.model.intercept import Watch
from raypipe.model.known import Known
from raypipe.model.ledger import Happening, Ledger
from raypipe.model.once import Once
from raypipe.model.recording import Recording
from raypipe.model.saved import Saved
from raypipe.model.secrets import Secrets
from raypipe.model.traffic import CannotCarry, Traffic
from raypipe.model.trees import held_by, tensors_in
from raypipe.model.twin import Twin
from raypipe.model.within import Within, maker_of
from raypipe.model.written import Written

__all__ = ["AsksForData", "Recorder", "StaysInside"]

Call = Callable[..., Any]


class StaysInside(BaseException):
    """Leaves the forward because of a hook that belongs to its unit; no ``except Exception`` of a model stops it."""

    def __init__(self, hook: str) -> None:
        super().__init__(hook)
        self.hook = hook


class AsksForData(BaseException):
    """Leaves the forward where fakes cannot follow it; no ``except Exception`` of a model stops it."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class Recorder(Watch):
    """Hears of each unit call and of each function on a value, and writes them down as events.

    Args:
        twin: the fake model.
        inside: names of hooks whose bodies belong to their units.
        saved: collects what the backward will need, where somebody asks.
    """

    def __init__(self, twin: Twin, inside: frozenset[str], saved: Saved | None) -> None:
        super().__init__(twin.parameters)
        self.twin, self.saved = twin, saved
        self.recording = Recording(inside=inside)
        self.called: set[str] = set()
        self.calls = 0
        self.secrets = Secrets(twin, self.recording, self._mark)
        self.nested: list[str] = []
        self.written = Written(twin.buffers)
        self.ledger = Ledger(self.recording, self.written, self.mark, twin.parameter_memory)
        self.numbers = self.ledger.numbers

    def depends(self, tensor: Tensor) -> bool:
        """Also true of units' buffers, and of memory that a value was written into, whichever tensor shows it."""
        return super().depends(tensor) or self._is_units_buffer(tensor) or self.written.shows(tensor)

    def _is_units_buffer(self, tensor: Tensor) -> bool:
        return id(tensor) in self.twin.buffers and self.twin.is_fake(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Sees fakes too that are no values: what units keep to themselves."""
        if self.inside or not any(self.depends(t) or self.twin.is_fake(t) for _, t in tensors_in((args, kwargs or {}))):
            return func(*args, **(kwargs or {}))
        return self.function(func, args, kwargs or {})

    def nested_call(self, name: str) -> None:
        self.nested.append(name)
        self.called.add(name)

    def unit_call(self, name: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where = place()
        if self.secrets.in_hook:
            raise CutError(f"a hook calls the unit {name}")
        if where.function is not None:
            self.secrets.keep_in_function(where, name)
        with self.off():
            self.called.add(name)
            return self._unit_call(name, call, (args, kwargs), where)

    def _unit_call(self, name: str, call: Call, arguments: tuple[Any, Any], where: Place) -> Any:
        unit: nn.Module = call.__self__  # type: ignore[attr-defined]
        event = self.ledger.open(name)
        uses, parameters = self._sources(dict(tensors_in(arguments)), name, event)
        traffic = Traffic(unit, event, arguments, self.twin, self.ledger, self.written, self._mark, self.saved)
        self.recording.running = event
        marked = [(traffic.given(t), self.depends(t)) for t in traffic.found]
        known = Known()
        for real, (fake, is_value) in zip(traffic.found, marked, strict=True):
            if not is_value:
                known.tell(fake, real)
        once = Once(unit, traffic.own)
        self.nested, counter = [], Counter(self.twin.mode, guess=True, known=known)
        own = self.twin.unit_parameters[name]
        hide, on_numbers = self.secrets.used_within, counter.on_numbers
        within = Within(name, self._mark, marked, self.numbers, self.parameters, own, event, hide, on_numbers)
        hear = functools.partial(self._hear, traffic, within)
        with heard(unit, hear, self.recording.inside), self.twin.mode, counter, within:
            result = call(*traffic.own[0], **traffic.own[1])
        self.recording.running = None
        changed = traffic.changed()
        for tensor in traffic.found:  # a real argument that the unit changes is a value from now on
            if id(tensor) in changed and not self.twin.is_fake(tensor) and tensor not in self.written:
                self.written.add(tensor, traffic.given(tensor), name, where.line)
        result = traffic.result(result)
        try:
            left = traffic.left()
        except CannotCarry:
            refusals.changes_argument(name, where.line)
        inner = [parameter for unit in self.nested for parameter in self.twin.unit_parameters[unit]]
        sources = ((*uses, *within.uses), (*parameters, *inner, *within.parameters_used))
        self.calls += 1
        what = Happening(name, self.calls - 1, counter, where)
        self.ledger.add(what, sources, traffic.inputs, changed, result, event, (tuple(traffic.plays), left))
        why = once.why(bool(changed), bool(left), within.reads_hidden, where.region is not None, within.normed)
        added = self.recording.events[event]
        self.recording.events[event] = replace(added, once=why, eagerly=once.eagerly, counted=within.counted)
        return result

    def _hear(
        self, traffic: Traffic, within: Within, spot: HookPlace, hook: Call, module: nn.Module, given: tuple[Any, ...]
    ) -> Any:
        """Runs a hook inside of a unit: its body is code between units."""
        if self.secrets.in_hook:
            return hook(module, *given)
        try:
            within.paused = self.secrets.in_hook = True
            with _disable_current_modes():
                outside = traffic.hook_sees(spot, given)
                with self.on_again():
                    result = hook(module, *outside)
                return traffic.inwards(result)
        except (CutError, CannotCarry, AsksForData):
            raise StaysInside(hook_name(hook)) from None
        finally:
            within.paused = self.secrets.in_hook = False

    def function(self, func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = function_name(func)
        found = dict(tensors_in((args, kwargs)))
        if name in SHAPES:
            args, kwargs = self.written.faked((args, kwargs))
            return func(*args, **kwargs)
        sources = self._sources(found, name)
        where = place()
        if where.function is not None:
            self.secrets.keep_in_function(where, name)
        if name in READS:
            self._stop(name, sources, next(iter(found.values())))
        if not any(self.depends(t) for t in found.values()):
            return self._on_hidden(name, func, args, kwargs)
        if name in LASTING:
            refusals.lasting(name, self._describe(*sources, next(iter(found.values()))), where.line)
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
            self._stop(name, sources, next(iter(found.values())))
        if counter.drawn and (where.region is not None or self.secrets.in_hook):
            refusals.draws_in_checkpoint(name, where.line)
        if next(tensors_in(result), None) is None and not changes_in_place(name, kwargs):
            return result  # a shape, a dtype: no value
        originals = {id(given[id(t)]): t for t in found.values()}
        result = pytree.tree_map_only(Tensor, lambda t: originals.get(id(t), t), result)
        changed = {id(t) for t in found.values() if given[id(t)]._version != versions[id(t)]}
        self.ledger.add(Happening(name, None, counter, where), sources, (args, kwargs), changed, result)
        return result

    def _on_hidden(self, name: str, func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of tensors that units kept to themselves, which a replay does not see: it runs where they are."""
        makers = [maker for _, t in tensors_in((args, kwargs)) if (maker := maker_of(t, self._mark)) is not None]
        try:
            with Counter(self.twin.mode, guess=False):
                result = func(*args, **kwargs)
        except NEEDS_DATA:
            self._stop(name, ((), ()), args[0])
        for _, tensor in tensors_in(result):
            if makers:
                tensor._raypipe_maker = min(makers, key=lambda maker: maker.event)  # type: ignore[attr-defined]
        return result

    def look_at_outputs(self, outputs: Any) -> None:
        """Notes the values that the forward returned, and objects that units filled out of sight (a cache)."""
        for number, leaf in enumerate(pytree.tree_leaves(outputs)):
            if id(leaf) in self.numbers:
                self.recording.returned += (self.numbers[id(leaf)],)
            elif isinstance(leaf, Tensor):
                if self.twin.is_fake(leaf) and id(leaf) not in self.parameters:
                    self.secrets.used(leaf, "the model's output", END)
            else:
                held = [tensor for tensor in held_by(leaf) if self.twin.is_fake(tensor)]
                if all(id(tensor) in self.numbers for tensor in held):
                    self.recording.returned += tuple(self.numbers[id(tensor)] for tensor in held)
                else:
                    self.recording.withheld += (number,)

    def _sources(
        self, found: Mapping[Path, Tensor], name: str, event: int | None = None
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Numbers of the values, and names of the parameters, among an event's arguments."""
        uses, parameters = [], []
        for tensor in found.values():
            if id(tensor) in self.numbers:
                uses.append(self.numbers[id(tensor)])
            elif id(tensor) in self.parameters:
                parameters.append(self.parameters[id(tensor)])
            elif self._is_units_buffer(tensor):
                parameters.append(self.twin.buffers[id(tensor)])  # a unit's, which its user then holds too
            elif self.twin.is_fake(tensor):
                self.secrets.used(tensor, name, END)
            elif self.written.shows(tensor):
                refusals.changes_view(name, user_line())
        return tuple(uses), tuple(parameters)

    def _describe(self, uses: tuple[int, ...], parameters: tuple[str, ...], tensor: Tensor) -> str:
        if uses:
            return self.recording.describe(uses[0])
        return f"the parameter {parameters[0]}" if parameters else f"a {tensor.dtype} tensor {tuple(tensor.shape)}"

    def _stop(self, name: str, sources: tuple[tuple[int, ...], tuple[str, ...]], tensor: Tensor) -> NoReturn:
        raise AsksForData(refusals.asks_for_data(user_line(), name, self._describe(*sources, tensor)))
