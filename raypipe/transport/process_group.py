"""A transport between processes: torch.distributed's process groups, built directly and without global state.

Each directed pair of ranks has a group of its own, so a message never waits behind an unrelated one and a peer's
failure is that channel's failure. Collectives are exchanges of messages too: every rank sends its part to every other
one of the group, so a failure names the rank, lengths may differ, and sums are in order of ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from raypipe.transport.base import Handle, TensorSpec, Wiring, check_parts
from raypipe.transport.gloo import Group, Network, lost
from raypipe.transport.links import Arrival, Links, trade
from raypipe.transport.outbox import Flush, Outbox
from raypipe.transport.reduce import sum_in_rank_order

__all__ = ["ProcessGroupTransport"]

T = TypeVar("T")


class ProcessGroupTransport:
    """The channels of one rank; see ``transport.base.Transport``.

    It is built on all ranks at the same time, and blocks until this rank's connections stand. It closes itself when
    it is collected, and when the interpreter ends.

    Args:
        store: where the ranks meet, of their own: a second transport needs another store or a ``PrefixStore``.
        rank: this rank, from 0.
        wiring: which ranks talk to which; the same on every rank.
        timeout_s: how long to wait for the peers to connect, in seconds.
        host: name or address of this machine to listen at, reachable by the peers; None lets the backend choose.

    Raises:
        PeerLost: a peer did not connect within ``timeout_s``.
        ValueError: ``rank`` or a rank of ``wiring`` is not below ``wiring.size``.
    """

    def __init__(self, store: Store, rank: int, wiring: Wiring, *, timeout_s: float, host: str | None = None) -> None:
        _check_wiring(rank, wiring)
        self.rank, self.size = rank, wiring.size
        self._links = Links()
        weakref.finalize(self, self._links.close)
        self._inbound: dict[int, Group] = {}
        self._outbound: dict[int, tuple[Group, Outbox]] = {}
        self._groups: dict[tuple[int, ...], Group] = {}
        if self.size == 1:
            return
        try:
            self._connect(store, wiring, timeout_s, Network(host))
        except BaseException:
            self.close()
            raise

    def _connect(self, store: Store, wiring: Wiring, timeout_s: float, network: Network) -> None:
        # One order on all ranks: then the first group that is not complete always has all of its ranks at it.
        for pair in sorted(set(wiring.pairs)):
            if self.rank in pair:
                group = self._links.add(network.connect(_room(store, "channel", pair), pair, self.rank, timeout_s))
                source, to = pair
                if self.rank == source:
                    self._outbound[to] = (group, self._links.outbox(to))
                else:
                    self._inbound[source] = group
        everyone = tuple(range(self.size))
        for ranks in sorted({everyone, *wiring.groups}):
            if self.rank in ranks and len(ranks) > 1:
                self._groups[ranks] = self._links.add(
                    network.connect(_room(store, "group", ranks), ranks, self.rank, timeout_s)
                )

    def send(self, to: int, tensors: Sequence[torch.Tensor]) -> None:
        """Sends tensors of the CPU; returns at once.

        Raises:
            PeerLost: the connection is closed already.
            ValueError: the wiring has no channel from this rank to ``to``.
        """
        if (link := self._outbound.get(to)) is None:
            raise ValueError(_no_channel(self.rank, to, self.rank))
        self._links.check_open(to)
        group, outbox = link
        try:
            for tensor in tensors:
                if tensor.numel():  # nothing travels for an empty tensor: the receiver knows its shape
                    outbox.put(group.send(tensor, to))
        except RuntimeError as error:
            raise lost(to, error) from error

    def receive(self, source: int, specs: Sequence[TensorSpec]) -> Handle[list[torch.Tensor]]:
        """Allocates the buffers and posts the receive.

        Raises:
            PeerLost: the connection is closed already.
            ValueError: the wiring has no channel from ``source`` to this rank.
        """
        if (group := self._inbound.get(source)) is None:
            raise ValueError(_no_channel(source, self.rank, self.rank))
        self._links.check_open(source)
        buffers = [spec.empty() for spec in specs]
        try:
            works = [(source, group.receive(buffer, source)) for buffer in buffers if buffer.numel()]
        except RuntimeError as error:
            raise lost(source, error) from error
        return Arrival(self._links, works, lambda: buffers)

    def all_gather(self, vector: torch.Tensor, lengths: Sequence[int]) -> Handle[list[torch.Tensor]]:
        """Every rank's 1-D vector, in order of ranks; ``vector`` is copied and may change at once.

        Raises:
            PeerLost: a connection is closed already.
            ValueError: ``vector`` has not one dimension, or not the length that stands at its place in ``lengths``.
        """
        if vector.dim() != 1 or len(lengths) != self.size or vector.numel() != lengths[self.rank]:
            raise ValueError(
                f"all_gather was given a vector of shape {tuple(vector.shape)} and the lengths {tuple(lengths)}; "
                f"rank {self.rank} of {self.size} needs one dimension, and its own length at place {self.rank}"
            )
        mine = vector.detach().clone()
        parts = {rank: [mine if rank == self.rank else vector.new_empty(n)] for rank, n in enumerate(lengths)}
        return self._exchange(tuple(parts), parts, lambda: [each for (each,) in parts.values()])

    def all_reduce(self, tensors: Sequence[torch.Tensor], ranks: Sequence[int]) -> Handle[None]:
        """Sums each tensor in place, in order of ranks, when the handle is waited for.

        Each rank sends each tensor to each other one: as much as a ring does for two ranks, n - 1 tensors for n.

        Raises:
            PeerLost: a connection is closed already.
            ValueError: ``ranks`` are neither all the ranks nor one of the wiring's groups.
        """
        mine = [tensor.detach() for tensor in tensors]
        parts = {
            rank: mine if rank == self.rank else [torch.empty(each.shape, dtype=each.dtype) for each in mine]
            for rank in ranks
        }

        def add_up() -> None:
            for own, *of_each_rank in zip(mine, *parts.values(), strict=True):
                total = sum_in_rank_order(of_each_rank)
                if total is not own:
                    own.copy_(total)

        return self._exchange(tuple(ranks), parts, add_up)

    def all_to_all(
        self, parts: Sequence[torch.Tensor], lengths: Sequence[int], ranks: Sequence[int]
    ) -> Handle[list[torch.Tensor]]:
        """Sends each rank its part and receives theirs.

        Raises:
            PeerLost: a connection is closed already.
            ValueError: ``ranks`` are neither all the ranks nor one of the wiring's groups, or the parts are not one of
                one dimension for each of them.
        """
        check_parts(self.rank, parts, lengths, ranks)
        mine = dict(zip(ranks, ([part.detach().contiguous()] for part in parts), strict=True))
        came = {
            rank: mine[rank] if rank == self.rank else [parts[0].new_empty(n)]
            for rank, n in zip(ranks, lengths, strict=True)
        }
        return self._exchange(tuple(ranks), came, lambda: [each for (each,) in came.values()], mine)

    def flush(self) -> Handle[None]:
        """Every message that was sent so far has gone."""
        self._links.check_open(None)
        return Flush(self._links.outboxes)

    def close(self) -> None:
        """Closes every connection, from any thread: waits of this rank and of its peers then fail at once."""
        self._links.close()

    def _exchange(
        self,
        ranks: tuple[int, ...],
        parts: dict[int, list[torch.Tensor]],
        finish: Callable[[], T],
        given: dict[int, list[torch.Tensor]] | None = None,
    ) -> Handle[T]:
        """Sends this rank's part to each other rank, or to each the one ``given`` for it, and receives theirs."""
        self._links.check_open(None)
        if ranks == (self.rank,):
            return Arrival(self._links, (), finish)
        if (group := self._groups.get(ranks)) is None:
            raise ValueError(
                f"the ranks {ranks} are no group of rank {self.rank}; those of its wiring are {sorted(self._groups)}"
            )
        try:
            theirs = {rank: part for rank, part in parts.items() if rank != self.rank}
            works = trade(group, given or dict.fromkeys(theirs, parts[self.rank]), theirs)
        except RuntimeError as error:
            raise lost(None, error) from error
        return Arrival(self._links, works, finish)


def _room(store: Store, kind: str, ranks: tuple[int, ...]) -> Store:
    return PrefixStore(f"{kind}/{'-'.join(map(str, ranks))}", store)


def _no_channel(source: int, to: int, rank: int) -> str:
    return f"rank {rank} has no channel from rank {source} to rank {to}; add ({source}, {to}) to the wiring's pairs"


def _check_wiring(rank: int, wiring: Wiring) -> None:
    if not 0 <= rank < wiring.size:
        raise ValueError(f"rank {rank} is not one of the wiring's {wiring.size} ranks, 0 to {wiring.size - 1}")
    for ranks in (*wiring.pairs, *wiring.groups):
        if len(set(ranks)) < len(ranks) or any(not 0 <= each < wiring.size for each in ranks):
            raise ValueError(f"the wiring joins {ranks}, but ranks are distinct and from 0 to {wiring.size - 1}")
    for ranks in wiring.groups:
        if tuple(sorted(ranks)) != ranks:
            raise ValueError(f"the wiring's group {ranks} is not sorted; give {tuple(sorted(ranks))}")
