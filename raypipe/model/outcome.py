"""Checks of what came out where a chunk ran: it is what was planned, and no placeholder is in it."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from raypipe.errors import CutError
from raypipe.model.event import Event, Value
from raypipe.model.predict_recording import compare_value
from raypipe.model.recording import Recording
from raypipe.model.trees import held_by

__all__ = ["check_constant", "check_sent", "check_value", "leaves_of", "refuse_placeholder", "without_withheld"]


def leaves_of(event: Event, result: Any) -> list[Any]:
    """The leaves of an event's result.

    Raises:
        CutError: it has another structure than when it was planned.
    """
    if not event.nested and type(result) is Tensor:
        return [result]
    leaves, tree = pytree.tree_flatten(result)
    if tree != event.tree:
        raise CutError(f"{event.name} returned {tree} where it returned {event.tree} when it was planned")
    return leaves


def check_constant(event: Event, found: Any, planned: Any) -> None:
    """Refuses a leaf that is no tensor and another one than when it was planned.

    Raises:
        CutError: it is another one.
    """
    if not _same(found, planned):
        raise CutError(
            f"{event.name} returned {found!r} where it returned {planned!r} when it was planned: a number "
            "that depends on the data cannot be carried; return it as a tensor"
        )


def check_value(recording: Recording, value: int, tensor: Any) -> None:
    """Refuses what came in the place of a value and is no tensor, or not the one that was predicted.

    Raises:
        CutError: it is none.
    """
    if not isinstance(tensor, Tensor):
        made = recording.describe(value)
        raise CutError(f"a {type(tensor).__name__} came where {made} came when it was planned; return a tensor always")
    if recording.predicted:
        compare_value(recording, value, tensor)


def check_sent(recording: Recording, value: Value, tensor: Tensor) -> None:
    """Refuses a value that is sent and has another shape than the next stage expects.

    Raises:
        CutError: it has.
    """
    if tuple(tensor.shape) != value.spec.shape or tensor.dtype != value.spec.dtype:
        raise CutError(
            f"{recording.describe(value)} came out as a {tensor.dtype} tensor {tuple(tensor.shape)}: the "
            "shape depends on the data; put its maker and its users into one unit with units=[...]"
        )


def without_withheld(recording: Recording, outputs: Any) -> Any:
    """What the forward returned, without what units of other stages filled out of sight.

    Raises:
        CutError: there is a placeholder in it.
    """
    if outputs is None:
        return None
    leaves, tree = pytree.tree_flatten(outputs)
    leaves = [None if number in recording.withheld else leaf for number, leaf in enumerate(leaves)]
    if any(type(tensor) is FakeTensor for leaf in leaves for tensor in held_by(leaf)):
        refuse_placeholder(recording)
    return pytree.tree_unflatten(leaves, tree) if recording.withheld else outputs


def refuse_placeholder(recording: Recording) -> NoReturn:
    """A value is used that was not known to be used here, so it never came.

    Raises:
        CutError: always.
    """
    raise CutError(
        recording.stopped
        or "the model used a value in this stage that it did not use when it was planned: it takes another way "
        "from batch to batch; put the part that varies into a unit (units=[...])"
    )


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:
        return type(one) is type(other)
