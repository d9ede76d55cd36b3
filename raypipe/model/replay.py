"""Runs one chunk of a model: the model's OWN forward, with only this chunk's events computed.

An event before the window is answered with a received tensor where its value is live, else with a placeholder; an event
in the window runs; the first event after it ends the run. So whatever else the forward does is plain Python that runs
again. After the last unit call nothing is looked at any more: one stage runs all of it, whatever it does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from raypipe.errors import CutError
from raypipe.model.attributes import Snapshot
from raypipe.model.beside import Hearing, leave, name_left, play
from raypipe.model.compiled import eagerly
from raypipe.model.event import Constant, Event, New, Same
from raypipe.model.functions import SHAPES, changes_in_place, function_name
from raypipe.model.hooks import heard, next_hook, remove_hooks_since
from raypipe.model.intercept import Switch, Watch
from raypipe.model.outcome import (
    check_constant,
    check_sent,
    check_value,
    leaves_of,
    refuse_placeholder,
    without_withheld,
)
from raypipe.model.predict_recording import compare
from raypipe.model.recompute import recomputed
from raypipe.model.recording import Recording, Window
from raypipe.model.seeds import Seeds, pass_by, run_keyed
from raypipe.model.trees import at_path, tensors_in

__all__ = ["Seeds", "replay"]


class _EndOfWindow(BaseException):
    """Leaves the forward; no ``except Exception`` of a model stops it."""


def replay(
    model: nn.Module,
    switch: Switch,
    parameters: Mapping[int, str],
    forward: Callable[[nn.Module], Any],
    recording: Recording,
    window: Window,
    received: Sequence[Tensor],
    seeds: Seeds,
    again: Collection[str] = (),
) -> tuple[list[Tensor], Any]:
    """Runs the window's events.

    Args:
        model: holds the window's weights; its units report to ``switch``.
        parameters: names of all its parameters, husks too, by id.
        forward: calls the model on the microbatch that was recorded, or another of the same signature.
        recording: of that signature.
        window: the chunk.
        received: tensors for ``window.inputs``.
        seeds: of the microbatch.
        again: names of the units that run again in the backward, where there will be one.

    Returns:
        The tensors of ``window.outputs``; and what the forward returned, where the window reaches to the end, else
        None.

    Raises:
        CutError: the model took another way than in its recording.
    """
    run = _Replay(parameters, recording, window, received, again if torch.is_grad_enabled() else ())
    kept = Snapshot(model) if recording.beside else None
    outputs, first_hook = None, next_hook()
    with switch.on(run):
        seeds.start()
        try:
            outputs = forward(model)
        except _EndOfWindow:
            if recording.removes_hooks:  # others stay: some models set theirs in their first forward
                remove_hooks_since(model, first_hook)
            if kept is not None:  # the end of the forward, which may empty a list that hooks fill, does not run here
                kept.restore_contents()
    if run.event != window.end and not run.in_tail:
        raise CutError(
            f"the model's forward ended at event {run.event} ({run.name(run.event)} was next when it was planned): it "
            "takes another way from batch to batch; put the part that varies into a unit (units=[...])"
        )
    return run.live_outputs(), without_withheld(recording, outputs)


class _Replay(Watch):
    """Attributes: ``event``, the number of the next one; ``in_tail``, whether the last unit call of all was made."""

    def __init__(
        self,
        parameters: Mapping[int, str],
        recording: Recording,
        window: Window,
        received: Sequence[Tensor],
        again: Collection[str],
    ) -> None:
        super().__init__(parameters)
        self.again = again
        self.recording, self.window = recording, window
        self.events = recording.events
        self.event = 0
        self.in_tail = False
        self.last_call = recording.calls[-1] if window.end == len(self.events) else -1
        self.received = {value.thing: tensor for value, tensor in zip(window.inputs, received, strict=True)}
        self.wanted = {value.number for value in window.outputs}
        self.live = {
            value.number: tensor
            for value, tensor in zip(window.inputs, received, strict=True)
            if value.number in self.wanted
        }
        for tensor in received:
            self.mark(tensor)

    def name(self, event: int) -> str:
        return self.events[event].name if event < len(self.events) else "the end"

    def depends(self, tensor: Tensor) -> bool:
        return not self.in_tail and super().depends(tensor)

    def live_outputs(self) -> list[Tensor]:
        outputs = []
        for value in self.window.outputs:
            tensor = self.live[value.number]
            check_sent(self.recording, value, tensor)
            outputs.append(tensor)
        if FakeTensor in map(type, outputs):
            refuse_placeholder(self.recording)
        return outputs

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.in_tail:
            raise CutError(self.recording.stopped or self._another_way(name))
        with self.off():
            number, event = self._enter(name)
            if number < self.window.start:
                pass_by()
                result = self._answer(event, args, kwargs)
                if event.plays or event.left:
                    unit: nn.Module = call.__self__  # type: ignore[attr-defined]
                    play(event, unit, (args, kwargs), self.recording, self._stand_in, self._seen)
                    leave(event, unit, (args, kwargs), self._stand_in)
                return result
            if any(type(tensor) is FakeTensor for _, tensor in tensors_in((args, kwargs))):
                refuse_placeholder(self.recording)
            if name in self.again and not self.recording.once(number):
                result = run_keyed(lambda: recomputed(call, args, kwargs))
            elif not event.in_sight:
                result = run_keyed(lambda: call(*args, **kwargs))
            else:
                result = self._run_and_hear(event, call, args, kwargs)
            self._made(event, result, args, kwargs)
            self.in_tail = number == self.last_call
            return result

    def _run_and_hear(
        self, event: Event, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        unit: nn.Module = call.__self__  # type: ignore[attr-defined]
        hearing = Hearing(event, self._name, self._seen)
        with eagerly(unit), heard(unit, hearing, self.recording.inside):
            result = run_keyed(lambda: call(*args, **kwargs))
        hearing.finish()
        name_left(event, unit, (args, kwargs), self._name)
        return result

    def _seen(self, hook: Callable[[], Any]) -> Any:
        with self.on_again():
            return hook()

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = function_name(func)
        if name in SHAPES:
            return func(*args, **kwargs)
        if self.name(self.event) == name:
            number, event = self._enter(name)
            if number < self.window.start:
                if event.random:
                    pass_by()
                return self._answer(event, args, kwargs)
            if FakeTensor in map(type, args):
                refuse_placeholder(self.recording)
            result = run_keyed(lambda: func(*args, **kwargs)) if event.random else func(*args, **kwargs)
            self._made(event, result, args, kwargs)
            return result
        result = func(*args, **kwargs)
        if changes_in_place(name, kwargs) or next(tensors_in(result), None) is not None:
            raise CutError(self._another_way(name))
        return result

    def _enter(self, name: str) -> tuple[int, Event]:
        """The next event, which has this name, and its number."""
        number = self.event
        if number >= self.window.end:
            raise _EndOfWindow
        event = self.events[number]
        if event.name != name:
            raise CutError(self._another_way(name))
        self.event += 1
        return number, event

    def _stand_in(self, value: int) -> Tensor:
        """The tensor for a value that another stage computes: received, or a placeholder."""
        tensor = self.received.get(self.recording.values[value].thing)
        if tensor is None:
            tensor = self.recording.placeholder(value)
        self.mark(tensor)
        return tensor

    def _answer(self, event: Event, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an event that another stage computes."""
        leaves: list[Any] = []
        for leaf in event.leaves:
            if isinstance(leaf, New):
                leaves.append(self._stand_in(leaf.value))
            else:
                leaves.append(at_path((args, kwargs), leaf.path) if isinstance(leaf, Same) else leaf.value)
        for mutation in event.mutations:
            target = at_path((args, kwargs), mutation.path)
            thing = self.recording.values[mutation.value].thing
            tensor = self.received.get(thing)
            if tensor is not None and tensor is not target:  # plain code made the object; a value was written into it
                target.copy_(tensor)
                self.received[thing] = target
            self.mark(target)
        return pytree.tree_unflatten(leaves, event.tree) if event.nested else leaves[0]

    def _made(self, event: Event, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Marks the values that an event of the window made, and keeps those that are sent."""
        leaves = leaves_of(event, result)
        if self.recording.predicted:
            compare(event, leaves, (args, kwargs))
        for leaf, planned in zip(leaves, event.leaves, strict=True):
            if isinstance(planned, New):
                self._name(leaf, planned.value)
            elif isinstance(planned, Constant) and planned.fixed:
                check_constant(event, leaf, planned.value)
        for mutation in event.mutations:
            self._name(at_path((args, kwargs), mutation.path), mutation.value)

    def _name(self, tensor: Any, value: int) -> None:
        check_value(self.recording, value, tensor)
        self.mark(tensor)
        if value in self.wanted:
            self.live[value] = tensor

    def _another_way(self, name: str) -> str:
        return (
            f"the model calls {name} where {self.name(self.event)} came when it was planned: it takes another way from "
            "batch to batch; put the part that varies into a unit (units=[...])"
        )
