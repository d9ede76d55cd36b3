"""A transport inside one process and one thread: what the local backend runs on.

Nothing here waits. A message is there once its sender has run, so whoever drives the ranks runs another rank while a
handle is not ready.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from raypipe.errors import PeerLost
from raypipe.transport.base import Done, Handle, TensorSpec, check_parts
from raypipe.transport.reduce import sum_in_rank_order

__all__ = ["MemoryHub", "MemoryTransport"]

T = TypeVar("T")


class _Slot(Generic[T]):
    """A handle that is filled, or fails, later."""

    __slots__ = ("_error", "_filled", "_value", "source")

    def __init__(self, source: int | None) -> None:
        self.source = source
        self._filled = False
        self._value: T | None = None
        self._error: PeerLost | None = None

    def fill(self, value: T) -> None:
        self._value, self._filled = value, True

    def fail(self, error: PeerLost) -> None:
        if not self._filled:
            self._error = error

    def ready(self) -> bool:
        return self._filled or self._error is not None

    def wait(self, timeout_s: float) -> None:
        if self._error is not None:
            raise self._error
        if not self._filled:
            raise PeerLost(
                self.source,
                "it has sent nothing yet, and a single thread cannot wait for it; run that rank before waiting",
            )

    def result(self) -> T:
        self.wait(0.0)
        return self._value  # type: ignore[return-value]


class _Meeting:
    """One collective: what each rank gave, and the handles to fill once all have."""

    def __init__(self, ranks: tuple[int, ...], complete: Callable[[_Meeting], None]) -> None:
        self.ranks = ranks
        self.given: dict[int, list[torch.Tensor]] = {}
        self.slots: dict[int, _Slot[Any]] = {}
        self._complete = complete

    def join(self, rank: int, tensors: list[torch.Tensor]) -> _Slot[Any]:
        self.given[rank] = tensors
        slot = self.slots[rank] = _Slot[Any](None)
        missing = next((other for other in self.ranks if other not in self.given), None)
        for each in self.slots.values():
            each.source = missing
        if missing is None:
            self._complete(self)
        return slot


def _gather(meeting: _Meeting) -> None:
    for slot in meeting.slots.values():
        slot.fill([meeting.given[rank][0].clone() for rank in meeting.ranks])


def _sum(meeting: _Meeting) -> None:
    given = [meeting.given[rank] for rank in meeting.ranks]
    with torch.no_grad():
        for parts in zip(*given, strict=True):
            total = sum_in_rank_order([parts[0].clone(), *parts[1:]])
            for part in parts:
                part.copy_(total)
    for slot in meeting.slots.values():
        slot.fill(None)


def _swap(meeting: _Meeting) -> None:
    for place, rank in enumerate(meeting.ranks):
        came = [meeting.given[other][place] for other in meeting.ranks]
        meeting.slots[rank].fill([part if n == place else part.clone() for n, part in enumerate(came)])


_Key = tuple[Callable[[_Meeting], None], tuple[int, ...], int]


class MemoryHub:
    """What the ranks of one process share: a queue for each channel.

    Args:
        size: the number of ranks, at least 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a hub of {size} ranks was asked for, but it needs at least one")
        self.size = size
        self._sent: dict[tuple[int, int], deque[list[torch.Tensor]]] = defaultdict(deque)
        self._posted: dict[tuple[int, int], deque[tuple[_Slot[list[torch.Tensor]], tuple[TensorSpec, ...]]]] = (
            defaultdict(deque)
        )
        self._meetings: dict[_Key, _Meeting] = {}
        self._closed: set[int] = set()

    def transport(self, rank: int) -> MemoryTransport:
        """The transport of ``rank``."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not one of the hub's {self.size} ranks, 0 to {self.size - 1}")
        return MemoryTransport(self, rank)

    def _deliver(self, source: int, to: int) -> None:
        """Hands the channel's messages to the receives that are posted, oldest first."""
        sent, posted = self._sent[source, to], self._posted[source, to]
        while sent and posted:
            message, (slot, specs) = sent.popleft(), posted.popleft()
            _check_message(source, to, message, specs)
            slot.fill([tensor.to(spec.device) for tensor, spec in zip(message, specs, strict=True)])
        if source in self._closed:
            for slot, _ in posted:
                slot.fail(_closed_by(source))

    def _meet(self, key: _Key, rank: int, tensors: list[torch.Tensor]) -> _Slot[Any]:
        complete, ranks, _ = key
        meeting = self._meetings.setdefault(key, _Meeting(ranks, complete))
        slot = meeting.join(rank, tensors)
        if len(meeting.given) == len(ranks):
            del self._meetings[key]
        self._fail_meetings()
        return slot

    def _fail_meetings(self) -> None:
        for meeting in self._meetings.values():
            gone = next((rank for rank in meeting.ranks if rank in self._closed and rank not in meeting.given), None)
            if gone is not None:
                for slot in meeting.slots.values():
                    slot.fail(_closed_by(gone))

    def _close(self, rank: int) -> None:
        self._closed.add(rank)
        for (source, to), posted in list(self._posted.items()):
            if source == rank:
                self._deliver(source, to)
            elif to == rank:
                for slot, _ in posted:
                    slot.fail(PeerLost(source, "this rank closed its connections"))
        self._fail_meetings()


class MemoryTransport:
    """The channels of one rank of a ``MemoryHub``; see ``transport.base.Transport``.

    A handle that is not ready cannot be waited for: ``wait`` then raises PeerLost at once.
    """

    def __init__(self, hub: MemoryHub, rank: int) -> None:
        self.rank, self.size = rank, hub.size
        self._hub = hub
        self._rounds: dict[tuple[Callable[[_Meeting], None], tuple[int, ...]], int] = defaultdict(int)

    def send(self, to: int, tensors: Sequence[torch.Tensor]) -> None:
        """Sends copies of ``tensors``, so that neither side sees the other's in-place changes."""
        self._check_open(to)
        if to in self._hub._closed:
            raise _closed_by(to)
        self._hub._sent[self.rank, to].append([tensor.detach().clone() for tensor in tensors])
        self._hub._deliver(self.rank, to)

    def receive(self, source: int, specs: Sequence[TensorSpec]) -> Handle[list[torch.Tensor]]:
        """Posts a receive; its handle is ready once ``source`` has sent.

        Raises:
            ValueError: the message that came is not as ``specs`` say.
        """
        self._check_open(source)
        slot = _Slot[list[torch.Tensor]](source)
        self._hub._posted[source, self.rank].append((slot, tuple(specs)))
        self._hub._deliver(source, self.rank)
        return slot

    def all_gather(self, vector: torch.Tensor, lengths: Sequence[int]) -> Handle[list[torch.Tensor]]:
        """Every rank's vector, in order of ranks; ready once every rank has called it."""
        if vector.dim() != 1 or len(lengths) != self.size or vector.numel() != lengths[self.rank]:
            raise ValueError(
                f"all_gather was given a vector of shape {tuple(vector.shape)} and the lengths {tuple(lengths)}; "
                f"rank {self.rank} of {self.size} needs one dimension, and its own length at place {self.rank}"
            )
        return self._meet(_gather, tuple(range(self.size)), [vector.detach().clone()])

    def all_reduce(self, tensors: Sequence[torch.Tensor], ranks: Sequence[int]) -> Handle[None]:
        """Sums in place, in order of ranks; done once every one of ``ranks`` has called it."""
        return self._meet(_sum, tuple(ranks), [tensor.detach() for tensor in tensors])

    def all_to_all(
        self, parts: Sequence[torch.Tensor], lengths: Sequence[int], ranks: Sequence[int]
    ) -> Handle[list[torch.Tensor]]:
        """Gives every other rank its part; ready once every one of ``ranks`` has called it."""
        check_parts(self.rank, parts, lengths, ranks)
        return self._meet(_swap, tuple(ranks), [part.detach() for part in parts])

    def flush(self) -> Handle[None]:
        """Ready at once: a message is a copy that the receiver owns."""
        self._check_open(None)
        return Done(None)

    def close(self) -> None:
        """Closes; receives that wait for this rank then fail, messages it sent before can still be received."""
        self._hub._close(self.rank)

    def _meet(
        self, complete: Callable[[_Meeting], None], ranks: tuple[int, ...], tensors: list[torch.Tensor]
    ) -> _Slot[Any]:
        self._check_open(None)
        if self.rank not in ranks:
            raise ValueError(f"rank {self.rank} called a collective of the ranks {ranks}; only they may call it")
        number = self._rounds[complete, ranks]
        self._rounds[complete, ranks] = number + 1
        return self._hub._meet((complete, ranks, number), self.rank, tensors)

    def _check_open(self, peer: int | None) -> None:
        if peer is not None and not (0 <= peer < self.size and peer != self.rank):
            raise ValueError(f"rank {self.rank} has no channel with rank {peer}; the others of {self.size} have one")
        if self.rank in self._hub._closed:
            raise PeerLost(peer, "this rank closed its connections")


def _check_message(source: int, to: int, message: list[torch.Tensor], specs: tuple[TensorSpec, ...]) -> None:
    came = [(tuple(tensor.shape), tensor.dtype) for tensor in message]
    wanted = [(spec.shape, spec.dtype) for spec in specs]
    if came != wanted:
        raise ValueError(
            f"rank {source} sent {came} to rank {to}, which expects {wanted}; both must know the same shapes"
        )


def _closed_by(rank: int) -> PeerLost:
    return PeerLost(rank, "it closed its connections")
