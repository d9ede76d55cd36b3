"""What actions and messages cost: the numbers that a schedule is played against."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from .action import Op

__all__ = ["ByChannel", "Costs"]

ByChannel: TypeAlias = Mapping[tuple[int, int], float]
"""A number for each channel: (source stage, target stage)."""

_BY_CHUNK = ("forward", "backward", "input", "weight", "activation_bytes")
_BY_BOUNDARY = ("boundary_bytes", "gradient_bytes")
_BY_CHANNEL = ("latency", "bandwidth")
_CHANNEL = "{(source stage, target stage): number}"


@dataclass(frozen=True)
class Costs:
    """How long actions take, what messages weigh, and what a microbatch keeps in memory.

    Times are all in one unit of the caller's choice; bandwidth is in bytes for each of that unit.

    Raises:
        TypeError: a cost of another type than its field says.
        ValueError: a cost that is negative or not finite, a bandwidth of 0, a share above 1, a mapping whose keys are
            no pairs of two stages.
    """

    forward: float | tuple[float, ...] = 1.0
    """A forward: of every chunk, or a tuple with one number for each chunk. So the next three."""
    backward: float | tuple[float, ...] = 2.0
    """A whole backward (B)."""
    input: float | tuple[float, ...] = 1.0
    """A backward's input gradient alone (I)."""
    weight: float | tuple[float, ...] = 1.0
    """A backward's weight gradient alone (W)."""
    latency: float | ByChannel = 0.0
    """How long a message is on its way, of every channel between two stages, or ``{(source stage, target stage):
    number}``; a stage's message to itself is free. Messages on their way do not hinder each other."""
    bandwidth: float | ByChannel | None = None
    """Bytes for each unit of time that a channel takes in, one message after the other; None: without limit."""
    boundary_bytes: float | tuple[float, ...] = 0.0
    """Activations that cross a boundary for one microbatch: every boundary, or a tuple with one number for each of the
    chunks - 1 boundaries in model order."""
    gradient_bytes: float | tuple[float, ...] | None = None
    """Gradients that cross it back; None: as many as activations."""
    activation_bytes: float | tuple[float, ...] = 0.0
    """What a chunk keeps of one microbatch, from its forward until its backward (B, or W) has ended: every chunk, or
    a tuple with one number for each."""
    input_share: float = 0.0
    """Which share of it, 0 to 1, is given back when I has ended, where the backward is in two halves."""

    def __post_init__(self) -> None:
        for name in (*_BY_CHUNK, *_BY_BOUNDARY):
            _check_numbers(name, getattr(self, name), "chunk" if name in _BY_CHUNK else "boundary")
        for name in _BY_CHANNEL:
            value = getattr(self, name)
            _check_channels(name, value)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, dict(value))  # so that nobody changes it later
        _check_share(self.input_share)

    def table(self, chunks: int) -> dict[Op, tuple[float, ...]]:
        """For each computing operation its cost on each of ``chunks`` chunks.

        Raises:
            ValueError: a tuple whose length is not ``chunks``.
        """
        given = {Op.FORWARD: self.forward, Op.BACKWARD: self.backward, Op.INPUT: self.input, Op.WEIGHT: self.weight}
        return {op: _spread(op.name.lower(), cost, chunks, "chunk") for op, cost in given.items()}

    def crossing(self, chunks: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Bytes of activations and of gradients that cross each of the ``chunks - 1`` boundaries.

        Raises:
            ValueError: a tuple whose length is not ``chunks - 1``.
        """
        forward = _spread("boundary_bytes", self.boundary_bytes, chunks - 1, "boundary")
        if self.gradient_bytes is None:
            return forward, forward
        return forward, _spread("gradient_bytes", self.gradient_bytes, chunks - 1, "boundary")

    def kept(self, chunks: int) -> tuple[float, ...]:
        """Bytes that each of ``chunks`` chunks keeps of one microbatch.

        Raises:
            ValueError: a tuple whose length is not ``chunks``.
        """
        return _spread("activation_bytes", self.activation_bytes, chunks, "chunk")

    def channel(self, source: int, target: int) -> tuple[float, float]:
        """Latency and bandwidth (infinite where there is no limit) of the channel between two stages.

        Raises:
            ValueError: a mapping that lacks this channel.
        """
        bandwidth = math.inf if self.bandwidth is None else _of_channel("bandwidth", self.bandwidth, source, target)
        return _of_channel("latency", self.latency, source, target), bandwidth


def _spread(name: str, cost: float | tuple[float, ...], count: int, what: str) -> tuple[float, ...]:
    if not isinstance(cost, tuple):
        return (cost,) * count
    if len(cost) != count:
        raise ValueError(
            f"the cost {name} has {_count(len(cost), 'number')}, but there {'is' if count == 1 else 'are'} "
            f"{_count(count, what)}; give one each"
        )
    return cost


def _count(number: int, noun: str) -> str:
    many = "boundaries" if noun == "boundary" else f"{noun}s"
    return f"{number} {noun if number == 1 else many}"


def _of_channel(name: str, cost: float | ByChannel, source: int, target: int) -> float:
    if not isinstance(cost, Mapping):
        return cost
    if (source, target) not in cost:
        raise ValueError(
            f"the cost {name} has no number for the channel from stage {source} to stage {target}, which the schedule "
            f"uses; give one for ({source}, {target})"
        )
    return cost[source, target]


def _check_numbers(name: str, value: Any, what: str) -> None:
    if name == "gradient_bytes" and value is None:
        return
    numbers = value if isinstance(value, tuple) else (value,)
    _check_reals(name, value, numbers, f"a number, or a tuple with one for each {what}")


def _check_channels(name: str, value: Any) -> None:
    if name == "bandwidth" and value is None:
        return
    if isinstance(value, Mapping):
        for key in value:
            _check_key(name, key)
    numbers = value.values() if isinstance(value, Mapping) else (value,)
    _check_reals(name, value, numbers, f"a number, or a mapping {_CHANNEL}")
    if name == "bandwidth" and not all(number > 0 for number in numbers):
        raise ValueError(f"the cost bandwidth is {value!r}, but nothing crosses at 0; leave it out for no limit")


def _check_reals(name: str, value: object, numbers: Iterable[Any], allowed: str) -> None:
    for number in numbers:
        if not isinstance(number, Real):
            raise TypeError(f"the cost {name} is {value!r}, but it must be {allowed}")
        if not (math.isfinite(number) and float(number) >= 0):
            raise ValueError(f"the cost {name} is {value!r}, but costs are finite and not negative")


def _check_share(value: Any) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"the cost input_share is {value!r}, but it must be a number from 0 to 1")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"the cost input_share is {value!r}, but a share is from 0 to 1")


def _check_key(name: str, key: Any) -> None:
    stages = isinstance(key, tuple) and len(key) == 2 and all(type(stage) is int and stage >= 0 for stage in key)
    if not stages:
        raise ValueError(f"the cost {name} has the key {key!r}, but its keys are channels: {_CHANNEL}")
    if key[0] == key[1]:
        raise ValueError(f"the cost {name} has the key {key!r}, but a stage's message to itself is free; leave it out")
