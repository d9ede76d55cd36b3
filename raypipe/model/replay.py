"""Runs one chunk of a model: the model's OWN forward, with only this chunk's events computed.

An event before the window is answered with a received tensor where its value is live, else with a placeholder; an event in
the window runs; the first event after it ends the run. So whatever else the forward does is plain Python that runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raypipe.errors import CutError
from raypipe.model.intercept import Switch, Watch, at_path, tensors_in
from raypipe.model.record import changes_in_place, function_name
from raypipe.model.recording import Constant, Event, New, Recording, Same, Window

__all__ = ["Seeds", "replay"]

_SHAPES = frozenset(
    ["shape", "size", "dim", "ndim", "dtype", "device", "stride", "numel", "nelement", "layout", "is_contiguous", "is_floating_point", "is_complex", "is_leaf", "requires_grad", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_cpu", "element_size", "itemsize", "nbytes", "names", "__len__", "storage_offset"]
)

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Seeds:
    """The key of all randomness of one microbatch: dropout depends on it and on the event, not on the stage."""

    seed: int
    step: int
    sample: int
    """Number of the microbatch's first sample in the whole batch."""

    def before(self, event: int) -> int:
        """The generator's seed before an event (splitmix64 of the four numbers; Steele, Lea and Flood, OOPSLA 2014)."""
        state = 0
        for part in (self.seed, self.step, self.sample, event):
            state = (state + part + 0x9E3779B97F4A7C15) & _MASK
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
            state ^= state >> 31
        return state >> 1


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

    Returns:
        The tensors of ``window.outputs``; and what the forward returned, where the window reaches to the end, else None.

    Raises:
        CutError: the model took another way than in its recording.
    """
    run = _Replay(parameters, recording, window, received, seeds)
    outputs: Any = None
    with switch.on(run):
        try:
            run.seed(0)
            outputs = forward(model)
        except _EndOfWindow:
            pass
    if run.event != window.end:
        raise CutError(
            f"the model's forward ended at event {run.event} ({run.name(run.event)} was next when it was planned): it takes "
            "another way from batch to batch; put the part that varies into a unit (units=[...])"
        )
    return run.live_outputs(), outputs


class _Replay(Watch):
    def __init__(
        self,
        parameters: Mapping[int, str],
        recording: Recording,
        window: Window,
        received: Sequence[Tensor],
        seeds: Seeds,
    ) -> None:
        super().__init__(parameters)
        self.recording, self.window, self.seeds = recording, window, seeds
        self.event = 0
        self.received = {value.thing: tensor for value, tensor in zip(window.inputs, received, strict=True)}
        self.wanted = {value.number for value in window.outputs}
        self.live = {
            value.number: tensor
            for value, tensor in zip(window.inputs, received, strict=True)
            if value.number in self.wanted
        }
        for value, tensor in zip(window.inputs, received, strict=True):
            self.set_tag(tensor, value.number)

    def name(self, event: int) -> str:
        events = self.recording.events
        return events[event].name if event < len(events) else "the end"

    def seed(self, event: int) -> None:
        torch.default_generator.manual_seed(self.seeds.before(event))

    def live_outputs(self) -> list[Tensor]:
        outputs = []
        for value in self.window.outputs:
            tensor = self.live[value.number]
            if tuple(tensor.shape) != value.spec.shape or tensor.dtype != value.spec.dtype:
                raise CutError(
                    f"{self.recording.describe(value)} came out as a {tensor.dtype} tensor {tuple(tensor.shape)}: the shape "
                    "depends on the data; put its maker and its users into one unit with units=[...]"
                )
            outputs.append(tensor)
        return outputs

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.off():
            if self.name(self.event) != name:
                self._other_way(name)
            event = self._enter()
            if self.event < self.window.start:
                return self._answer(event, args, kwargs)
            self.seed(self.event)
            return self._made(event, call(*args, **kwargs), args, kwargs)

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = function_name(func)
        if name in _SHAPES:
            return func(*args, **kwargs)
        if self.name(self.event) == name:
            event = self._enter()
            if self.event < self.window.start:
                return self._answer(event, args, kwargs)
            return self._made(event, func(*args, **kwargs), args, kwargs)
        result = func(*args, **kwargs)
        if changes_in_place(name, kwargs) or next(tensors_in(result), None) is not None:
            self._other_way(name)
        return result

    def _enter(self) -> Event:
        if self.event >= self.window.end:
            raise _EndOfWindow
        return self.recording.events[self.event]

    def _answer(self, event: Event, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an event that another stage computes."""
        leaves: list[Any] = []
        for leaf in event.leaves:
            if isinstance(leaf, New):
                thing = self.recording.values[leaf.value].thing
                tensor = self.received.get(thing)
                tensor = self.recording.placeholders[leaf.value] if tensor is None else tensor
                self.set_tag(tensor, leaf.value)
                leaves.append(tensor)
            else:
                leaves.append(at_path((args, kwargs), leaf.path) if isinstance(leaf, Same) else leaf.value)
        for mutation in event.mutations:
            target = at_path((args, kwargs), mutation.path)
            tensor = self.received.get(self.recording.values[mutation.value].thing)
            if tensor is not None and tensor is not target:  # plain code made the object; a value was written into it
                target.copy_(tensor)
                self.received[self.recording.values[mutation.value].thing] = target
            self.set_tag(target, mutation.value)
        return self._passed(event, leaves)

    def _made(self, event: Event, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Names the values that an event of the window made, and keeps those that are sent."""
        if type(result) is Tensor and len(event.leaves) == 1:
            leaves: list[Any] = [result]
        else:
            leaves, tree = pytree.tree_flatten(result)
            if tree != event.tree:
                raise CutError(f"{event.name} returned {tree} where it returned {event.tree} when it was planned")
        for leaf, planned in zip(leaves, event.leaves, strict=True):
            if isinstance(planned, New):
                self._name(leaf, planned.value)
            elif isinstance(planned, Constant) and not _same(leaf, planned.value):
                raise CutError(
                    f"{event.name} returned {leaf!r} where it returned {planned.value!r} when it was planned: a number that "
                    "depends on the data cannot be carried; return it as a tensor"
                )
        for mutation in event.mutations:
            self._name(at_path((args, kwargs), mutation.path), mutation.value)
        self._passed(event, leaves)
        return result

    def _name(self, tensor: Tensor, value: int) -> None:
        self.set_tag(tensor, value)
        if value in self.wanted:
            self.live[value] = tensor

    def _passed(self, event: Event, leaves: list[Any]) -> Any:
        # What draws random numbers next must not depend on which events this stage computed.
        self.event += 1
        self.seed(self.event)
        return pytree.tree_unflatten(leaves, event.tree) if len(leaves) != 1 or event.nested else leaves[0]

    def _other_way(self, name: str) -> NoReturn:
        raise CutError(
            f"the model calls {name} where {self.name(self.event)} came when it was planned: it takes another way from batch "
            "to batch; put the part that varies into a unit (units=[...])"
        )


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:
        return type(one) is type(other)
