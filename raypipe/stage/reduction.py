"""The gradients that several ranks hold a part of: summed on all of them, or on owners, who then send the weights.

It begins as soon as this rank's own last gradient is there, while the stages before it still have backwards to do. Sums
are in order of ranks, so that every copy has the same bits. Two messages are on their way at a time: one travels while
another is summed, and more would only hold memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raypipe.stage.buckets import Bucket, flat_gradients, flat_weights, make_buckets, set_gradients, set_weights
from raypipe.stage.protocol import RankWork
from raypipe.stage.spec import Gradients
from raypipe.transport.base import Handle, Transport
from raypipe.transport.reduce import sum_in_rank_order

__all__ = ["Reduction"]

AT_ONCE = 2


class Reduction:
    """Sums one rank's gradients with those of the other holders.

    Args:
        rank: this one.
        parameters: its trainable parameters, by name.
        gradients: whose gradients are whose.
        sharded: whether an owner alone gets the sum, and steps.
    """

    def __init__(
        self, rank: int, parameters: Mapping[str, nn.Parameter], gradients: Gradients, *, sharded: bool
    ) -> None:
        self._rank, self._sharded = rank, sharded
        self._buckets = make_buckets(rank, parameters, gradients.shared, gradients.stepped_by)

    def sum(self, transport: Transport) -> RankWork[None]:
        """Sums the gradients of shared parameters. A parameter without one on every holder stays without."""
        reduce = self._to_owners if self._sharded else self._to_all
        yield from _overlapped(reduce(bucket, transport) for bucket in self._buckets)

    def spread(self, transport: Transport) -> RankWork[None]:
        """Sends the weights that owners have stepped to all holders; nothing where all of them have stepped."""
        if self._sharded:
            yield from _overlapped(self._spread(bucket, transport) for bucket in self._buckets)

    def _to_all(self, bucket: Bucket, transport: Transport) -> RankWork[None]:
        flat = flat_gradients(bucket.parameters)
        if len(bucket.ranks) == 2:  # each sends the other everything: as much as in two steps, and sooner there
            handle = transport.all_reduce([flat], bucket.ranks)
            yield handle
        else:  # each sums a piece and sends it round: less than sending everything to everybody
            pieces = flat.tensor_split(len(bucket.ranks))
            total = yield from self._summed(pieces, bucket.ranks, transport)
            flat = torch.cat((yield from _round(total, [p.numel() for p in pieces], bucket.ranks, transport)))
        set_gradients(bucket.parameters, flat)

    def _to_owners(self, bucket: Bucket, transport: Transport) -> RankWork[None]:
        some = bucket.parameters[0]
        parts = [flat_gradients(part) if part else some.new_empty(0) for part in bucket.parts]
        for parameter in bucket.parameters:
            parameter.grad = None
        total = yield from self._summed(parts, bucket.ranks, transport)
        own = bucket.parts[bucket.ranks.index(self._rank)]
        if own:
            set_gradients(own, total)

    def _summed(self, parts: Sequence[Tensor], ranks: tuple[int, ...], transport: Transport) -> RankWork[Tensor]:
        """Gives every rank its part, and sums this one's."""
        length = parts[ranks.index(self._rank)].numel()
        handle = transport.all_to_all(parts, [length] * len(ranks), ranks)
        yield handle
        return sum_in_rank_order(handle.result())

    def _spread(self, bucket: Bucket, transport: Transport) -> RankWork[None]:
        own = bucket.parts[bucket.ranks.index(self._rank)]
        lengths = [sum(parameter.numel() for parameter in part) for part in bucket.parts]
        mine = flat_weights(own) if own else bucket.parameters[0].detach().new_empty(0)
        came = yield from _round(mine, lengths, bucket.ranks, transport)
        for rank, part, flat in zip(bucket.ranks, bucket.parts, came, strict=True):
            if part and rank != self._rank:
                set_weights(part, flat)


def _round(
    mine: Tensor, lengths: Sequence[int], ranks: tuple[int, ...], transport: Transport
) -> RankWork[list[Tensor]]:
    """Everybody's tensor, in order of ranks."""
    handle = transport.all_to_all([mine] * len(ranks), lengths, ranks)
    yield handle
    return handle.result()


def _overlapped(works: Iterator[RankWork[None]]) -> RankWork[None]:
    """Runs works in their order, each begun before the one ahead of it is waited for."""
    begun: deque[tuple[RankWork[None], Handle[Any] | None]] = deque()
    for work in works:
        begun.append((work, next(work, None)))
        if len(begun) == AT_ONCE:
            yield from _ended(*begun.popleft())
    while begun:
        yield from _ended(*begun.popleft())


def _ended(work: RankWork[None], handle: Handle[Any] | None) -> RankWork[None]:
    while handle is not None:
        yield handle
        handle = next(work, None)
