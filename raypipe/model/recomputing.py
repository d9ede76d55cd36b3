"""Which units run again in their backward: those that were asked for, can, and save memory by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from raypipe.model.recording import Recording
from raypipe.model.saved import Saved

__all__ = ["Recomputed", "charge", "check_recompute", "recomputed_units"]


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What ``recompute`` comes to for one model.

    Attributes: ``units``, the names of those that run again; ``whole``, of those that were asked for and keep what they
    saved, each with the reason.
    """

    units: tuple[str, ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)

    def events(self, recording: Recording) -> frozenset[int]:
        """The events of their calls."""
        chosen = set(self.units)
        return frozenset(number for number in recording.calls if recording.events[number].name in chosen)


def check_recompute(recompute: object) -> None:
    """Refuses a value that ``recompute`` must not have.

    Raises:
        ValueError: it is another word.
        TypeError: it is no word and no callable.
    """
    allowed = "'none', 'full', or a callable recompute(unit_name) -> bool"
    if isinstance(recompute, str):
        if recompute not in ("none", "full"):
            raise ValueError(f"recompute is {recompute!r}, but must be {allowed}")
    elif not callable(recompute):
        raise TypeError(f"recompute is {recompute!r}, but must be {allowed}")


def recomputed_units(
    recompute: str | Callable[[str], bool], recording: Recording, saved: Saved | None, *, compiled: bool = False
) -> Recomputed:
    """Which units run again.

    Args:
        recompute: the argument of the trainer.
        recording: of one microbatch.
        saved: what its backward needs; None where nothing is trained.
        compiled: whether units are compiled.

    Raises:
        TypeError: ``recompute`` answered with something else than True or False.
    """
    if recompute == "none" or saved is None:
        return Recomputed()
    units, whole = [], {}
    for name in dict.fromkeys(recording.names):
        if _chosen(recompute, name):
            calls = [number for number in recording.calls if recording.events[number].name == name]
            reason = _why_whole(calls, recording, saved, compiled)
            if reason:
                whole[name] = reason
            else:
                units.append(name)
    return Recomputed(tuple(units), whole)


def _why_whole(calls: Sequence[int], recording: Recording, saved: Saved, compiled: bool) -> str:
    """Why a unit with these calls is left whole, or ``""``."""
    if not saved.by_event:
        return "is of a model with torch.func, which refuses to be watched for what it saves"
    reason = next(filter(None, map(recording.once, calls)), "")
    if reason:
        return reason
    if compiled and any(recording.events[number].eagerly or recording.events[number].counted for number in calls):
        return "gets an object, has running statistics or a loss in it, which is for eager code"
    if not any(saved.beside_arguments(number) for number in calls):
        return "saves no more than its arguments"
    return ""


def charge(recording: Recording, recomputed: Recomputed) -> None:
    """Adds to the backward of each unit call that runs again the FLOPs of its forward."""
    for number in recomputed.events(recording):
        event = recording.events[number]
        recording.events[number] = replace(event, backward_flops=event.backward_flops + event.flops)


def _chosen(recompute: str | Callable[[str], bool], name: str) -> bool:
    if isinstance(recompute, str):
        return True
    answer = recompute(name)
    if not isinstance(answer, bool):
        raise TypeError(f"recompute({name!r}) returned {answer!r}, but must return True or False")
    return answer
