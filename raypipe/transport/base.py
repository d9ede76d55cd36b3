"""What carries tensors between ranks: one small protocol, two pieces of vocabulary.

A transport belongs to one rank. Between two ranks there is one channel for each direction, and a channel keeps the
sender's order. Nothing here blocks but ``Handle.wait``, so an executor can yield its handles: the Ray backend waits for
each, the local backend runs another rank instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from raypipe.tensors import TensorSpec

__all__ = ["Done", "Handle", "TensorSpec", "Transport", "Wiring", "check_parts"]

T = TypeVar("T", covariant=True)


class Handle(Protocol[T]):
    """Something that will be there."""

    source: int | None
    """The rank that is waited for, where it is one."""

    def ready(self) -> bool:
        """Whether ``wait`` returns, or raises, at once: True is certain, False means that only waiting can tell."""

    def wait(self, timeout_s: float) -> None:
        """Blocks until it is there.

        Raises:
            PeerLost: a connection closed, or nothing came for ``timeout_s`` seconds.
        """

    def result(self) -> T:
        """What came; only after ``wait``, or where ``ready()``."""


class Transport(Protocol):
    """The channels of one rank."""

    rank: int
    size: int

    def send(self, to: int, tensors: Sequence[torch.Tensor]) -> None:
        """Sends tensors to rank ``to``; returns at once and keeps them until they have gone.

        Their data must not change before that. ``receive`` with specs of the same shapes and dtypes must be posted
        at the other end.

        Raises:
            PeerLost: a connection closed; so may every other call.
        """

    def receive(self, source: int, specs: Sequence[TensorSpec]) -> Handle[list[torch.Tensor]]:
        """Posts the receive of the next message from ``source``, whose tensors are as ``specs`` say."""

    def all_gather(self, vector: torch.Tensor, lengths: Sequence[int]) -> Handle[list[torch.Tensor]]:
        """Every rank's 1-D vector, in order of ranks; rank i's has ``lengths[i]`` elements. Same dtype everywhere."""

    def all_reduce(self, tensors: Sequence[torch.Tensor], ranks: Sequence[int]) -> Handle[None]:
        """Sums each tensor in place among ``ranks`` (sorted: all ranks, or a group known at construction).

        The sum is in order of ranks, so it has the same bits on all of them. The tensors must not change before the
        handle was waited for or is ready.
        """

    def all_to_all(
        self, parts: Sequence[torch.Tensor], lengths: Sequence[int], ranks: Sequence[int]
    ) -> Handle[list[torch.Tensor]]:
        """Sends ``parts[i]`` to the i-th of ``ranks`` (as in ``all_reduce``), and gives what each sent to this one.

        Every part has one dimension, and all have one dtype; the i-th rank's has ``lengths[i]`` elements. They must not
        change before the handle was waited for or is ready; this rank's own part comes back as it is.
        """

    def flush(self) -> Handle[None]:
        """Every message that was sent so far has gone."""

    def close(self) -> None:
        """Closes every connection, so that peers that wait for this rank fail at once. May be called twice."""


class Done(Generic[T]):
    """A handle on what is there already."""

    source: int | None = None

    def __init__(self, value: T) -> None:
        self._value = value

    def ready(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> None:
        return None

    def result(self) -> T:
        return self._value


@dataclass(frozen=True, slots=True)
class Wiring:
    """Which ranks talk to which: ordered pairs that have a channel, and groups (sorted) that sum among themselves."""

    size: int
    pairs: tuple[tuple[int, int], ...]
    groups: tuple[tuple[int, ...], ...] = ()


def check_parts(rank: int, parts: Sequence[torch.Tensor], lengths: Sequence[int], ranks: Sequence[int]) -> None:
    """Refuses what ``Transport.all_to_all`` cannot exchange.

    Raises:
        ValueError: there is not one part and one length for each rank, a part has not one dimension, or the own part is
            not as long as ``lengths`` say.
    """
    own = next((part for part, each in zip(parts, ranks, strict=False) if each == rank), None)
    fits = len(parts) == len(lengths) == len(ranks) and all(part.dim() == 1 for part in parts)
    if not fits or (own is not None and own.numel() != lengths[list(ranks).index(rank)]):
        raise ValueError(
            f"all_to_all was given parts of the shapes {[tuple(part.shape) for part in parts]} and the lengths "
            f"{tuple(lengths)} for the ranks {tuple(ranks)}; each rank needs a part of one dimension and a length, and "
            f"rank {rank} its own length at its place"
        )
