"""What a unit call costs, by the measure that a model is to be balanced by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raypipe.model.recording import Recording

__all__ = ["CallTime", "call_costs"]


@dataclass(frozen=True, slots=True)
class CallTime:
    """Seconds of the forward and of the backward of one microbatch; and of the backward's halves, for the input and for
    the weights, where they were measured."""

    forward: float
    backward: float
    input: float = 0.0
    weight: float = 0.0

    def __add__(self, other: CallTime) -> CallTime:
        return CallTime(
            self.forward + other.forward,
            self.backward + other.backward,
            self.input + other.input,
            self.weight + other.weight,
        )


def call_costs(
    recording: Recording,
    unit_parameters: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    balance: str,
    times: Sequence[CallTime] | None = None,
) -> list[float]:
    """A cost for each unit call; what comes after a call, up to the next, belongs to it.

    Args:
        recording: of one microbatch.
        unit_parameters: names of the parameters inside each unit.
        sizes: number of elements of each parameter.
        balance: ``"flops"`` (of forward and backward), ``"parameters"``, or ``"time"``.
        times: of each unit call, for ``"time"``.
    """
    if balance == "time" and times is not None:
        return [time.forward + time.backward for time in times]
    flops = [0.0] * len(recording.calls)
    parameters = [0.0] * len(recording.calls)
    call, seen = 0, set()
    for event in recording.events:
        names = list(event.parameters)
        if event.call is not None:
            call = event.call
            names += unit_parameters[event.name]
        flops[call] += event.flops + event.backward_flops
        parameters[call] += sum(sizes.get(name, 0) for name in dict.fromkeys(names) if name not in seen)
        seen.update(names)
    if balance == "flops" and any(flops):
        # An embedding has no matrix product and is not free: a millionth of its parameters decides between equals.
        return [flop + weight * 1e-6 for flop, weight in zip(flops, parameters, strict=True)]
    return parameters
