"""Recordings of new sizes, predicted from those that were made.

A recording costs a forward on fake tensors; batches padded to their longest sample have a new length at nearly every
step. So recordings that are equal in everything but sizes give the next one wherever ``model.interpolate`` can tell its
sizes; anything else is recorded, and then helps to predict. Every rank sees the same batches in the same order, so all
predict the same. The rank that runs an event compares each value it makes with what was predicted (``model.replay``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from raypipe.errors import CutError
from raypipe.model.event import Event, New, Same, Value
from raypipe.model.interpolate import Sample, Sizes, interpolate
from raypipe.model.recording import Recording
from raypipe.model.trees import at_path, tensors_in
from raypipe.tensors import TensorSpec

__all__ = ["Predictor", "compare", "compare_value", "family_of", "sizes_of"]

_KEPT = 256
"""Families, and samples of each: sizes alone, so they cost little; a bound for batches that never look alike."""

_COSTS = ("flops", "backward_flops")
_Order = tuple[int, ...] | None
Empty = Callable[[Sizes, Sizes, torch.dtype, torch.device], Tensor]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What recordings share: ``skeleton``, all but their sizes; ``example``, one of them; ``orders``, by value."""

    skeleton: tuple[Any, ...]
    example: Recording
    orders: tuple[_Order, ...]


@dataclass(slots=True)
class _Family:
    kinds: list[_Kind] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


class Predictor:
    """What was recorded so far.

    Args:
        empty: makes a placeholder: shape, strides, dtype, device.
    """

    def __init__(self, empty: Empty) -> None:
        self._empty = empty
        self._families: dict[Hashable, _Family] = {}

    def predict(self, family: Hashable, sizes: Sizes) -> Recording | None:
        """The recording of a microbatch of this family and these sizes, or None: it is to be recorded.

        What its events cost is 0: a rank has no use for that.
        """
        known = self._families.get(family)
        found = None if known is None else interpolate(known.samples, sizes)
        if known is None or found is None:
            return None
        kind = known.kinds[found[0]]
        values = _resized(kind, list(found[1]))
        return replace(kind.example, values=values, placeholders=[], make=self._placeholder, **_fresh_caches())

    def learn(self, family: Hashable, sizes: Sizes, recording: Recording) -> None:
        """Takes a recording that was made."""
        known = self._families.pop(family, None) or _Family()
        self._families[family] = known  # the last to learn stands last
        if len(self._families) > _KEPT:
            del self._families[next(iter(self._families))]
        orders = tuple(_order(value) for value in recording.values)
        skeleton = _skeleton(recording, orders)
        number = next((n for n, kind in enumerate(known.kinds) if _equal(kind.skeleton, skeleton)), len(known.kinds))
        if number == len(known.kinds):
            costs: dict[str, Any] = dict.fromkeys(_COSTS, 0)
            events = [replace(event, **costs) for event in recording.events]
            example = replace(recording, events=events, placeholders=[], **_fresh_caches())
            known.kinds.append(_Kind(skeleton, example, orders))
        known.samples.append(Sample(sizes, _sizes(recording, orders), number))
        if len(known.samples) > _KEPT:  # whatever varies there, it does not predict
            del self._families[family]

    def _placeholder(self, value: Value) -> Tensor:
        made = self._empty(value.spec.shape, value.stride, value.spec.dtype, value.spec.device)
        return made.requires_grad_(value.requires_grad)


def compare(event: Event, leaves: Sequence[Any], inputs: tuple[Any, Any]) -> None:
    """Compares which objects an event returned with what was predicted; the rank that ran it does.

    Args:
        event: that ran.
        leaves: of its result.
        inputs: its positional and keyword arguments.

    Raises:
        CutError: an argument came back in the place of a new tensor, or the other way round.
    """
    pairs = list(zip(leaves, event.leaves, strict=True))
    given = {id(tensor) for _, tensor in tensors_in(inputs)}
    if any(id(leaf) in given for leaf, planned in pairs if isinstance(planned, New)):
        _refuse(event, "returned one of its arguments, not a tensor of its own")
    if any(at_path(inputs, planned.path) is not leaf for leaf, planned in pairs if isinstance(planned, Same)):
        _refuse(event, "returned a tensor of its own, not one of its arguments")


def compare_value(recording: Recording, number: int, tensor: Tensor) -> None:
    """Compares a value that this rank made with what was predicted.

    All values are compared, not only those that travel: other stages go by the sizes of all of them. What depended on
    data in the recordings too is left out; of that, only what travels has to come as foreseen.

    Raises:
        CutError: its shape or dtype is another.
    """
    value = recording.values[number]
    event, spec = recording.events[value.event], value.spec
    if not event.guessed and (tensor.shape != spec.shape or tensor.dtype != spec.dtype):
        _refuse(event, f"made a {tensor.dtype} tensor {tuple(tensor.shape)}, not {recording.describe(number)}")


def _refuse(event: Event, what: str) -> NoReturn:
    raise CutError(
        f"{event.name}{event.where and f' ({event.where})'} {what}, which is what batches of other sizes foretold: "
        "this one breaks their rule; pad batches to fewer lengths, or put the part that varies into one unit with "
        "units=[...]"
    )


def family_of(batch: Any) -> tuple[Any, ...]:
    """What the microbatches have in common that predict each other: tree, dtypes, and which sizes are 0 or 1.

    A size of 1 broadcasts, and has strides of its own. Leaves that are no tensors are the caller's to tell apart.
    """
    leaves, tree = pytree.tree_flatten(batch)
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return tree, tuple((t.dtype, t.device, tuple(min(size, 2) for size in t.shape)) for t in tensors)


def sizes_of(batch: Any) -> Sizes:
    """The sizes of all tensors of a batch, one after the other."""
    return tuple(size for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) for size in leaf.shape)


def _skeleton(recording: Recording, orders: Sequence[_Order]) -> tuple[Any, ...]:
    """Everything but sizes, whatever fields there are."""
    events = [_but(event, *_COSTS) for event in recording.events]
    values = [
        (_but(v, "spec", "stride"), _but(v.spec, "shape"), len(v.spec.shape), order)
        for v, order in zip(recording.values, orders, strict=True)
    ]
    others = ("events", "values", "placeholders", "make", "stopped", "together", *(each.name for each in _caches()))
    # Of sentences, which name sizes too, only where they belong.
    together = [(each.first, each.last) for each in recording.together]
    return events, values, together, recording.stopped is None, _but(recording, *others)


def _but(thing: Any, *names: str) -> list[Any]:
    return [getattr(thing, each.name) for each in fields(thing) if each.name not in names]


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # what a unit returned may compare as it likes
        return False


def _caches() -> list[Field[Any]]:
    return [each for each in fields(Recording) if each.name.startswith("_")]


def _fresh_caches() -> dict[str, Any]:
    return {
        each.name: each.default if each.default_factory is MISSING else each.default_factory() for each in _caches()
    }


def _sizes(recording: Recording, orders: Sequence[_Order]) -> Sizes:
    """Each value's shape, and its strides where they do not follow from its shape."""
    found: list[int] = []
    for value, order in zip(recording.values, orders, strict=True):
        found += value.spec.shape
        if order is None:
            found += value.stride
    return tuple(found)


def _resized(kind: _Kind, sizes: list[int]) -> list[Value]:
    """The inverse of ``_sizes``."""
    values = []
    for value, order in zip(kind.example.values, kind.orders, strict=True):
        rank = len(value.spec.shape)
        shape, sizes = tuple(sizes[:rank]), sizes[rank:]
        if order is None:
            stride, sizes = tuple(sizes[:rank]), sizes[rank:]
        else:
            stride = _dense(shape, order)
        values.append(replace(value, spec=TensorSpec(shape, value.spec.dtype, value.spec.device), stride=stride))
    return values


def _order(value: Value) -> _Order:
    """The dimensions from the widest stride to the narrowest, where they lie densely; else None."""
    order = tuple(sorted(range(len(value.stride)), key=lambda dim: (-value.stride[dim], dim)))
    return order if _dense(value.spec.shape, order) == value.stride else None


def _dense(shape: Sizes, order: Sequence[int]) -> Sizes:
    stride, width = [0] * len(shape), 1
    for dim in reversed(order):
        stride[dim] = width
        width *= max(shape[dim], 1)
    return tuple(stride)
