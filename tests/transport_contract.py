"""What every transport must do, as scenarios for three ranks; each returns something that all ranks agree on.

A scenario yields the handles that it must wait for, as an executor does, so one text runs in one thread over memory
and in three processes over process groups.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Any

import pytest
import torch

from raypipe.errors import PeerLost
from raypipe.transport import Handle, TensorSpec, Transport, Wiring

Scenario = Callable[[Transport], Generator[Handle[Any], None, Any]]

WIRING = Wiring(3, ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)), ((0, 2),))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64)


def arrive(call):
    """Makes the call, waits for its handle, and returns the result: a lost peer may show in any of the three."""
    handle = call()
    yield handle
    return handle.result()


def order_is_kept(transport):
    """Twenty messages of changing length down one channel, two receives ahead."""
    lengths = [1 + 37 * i % 500 for i in range(20)]
    if transport.rank == 0:
        for i, length in enumerate(lengths):
            transport.send(1, [torch.full((length,), float(i))])
        yield transport.flush()
    if transport.rank == 1:
        handles = []
        for i, length in [*enumerate(lengths), (None, None), (None, None)]:
            if i is not None:
                handles.append(transport.receive(0, [TensorSpec((length,), torch.float32)]))
            if len(handles) > 2 or i is None:
                handle = handles.pop(0)
                yield handle
                (came,) = handle.result()
                assert torch.equal(came, torch.full_like(came, 20 - len(handles) - 1.0 if i is None else i - 2.0))


def both_directions_with_late_receives(transport):
    """Everybody sends thirty messages to everybody before anybody posts a receive: nothing may block."""
    others = [rank for rank in range(transport.size) if rank != transport.rank]
    for i in range(30):
        for other in others:
            transport.send(other, [torch.full((20_000,), 100.0 * transport.rank + i)])
    for i in range(30):
        for other in others:
            handle = transport.receive(other, [TensorSpec((20_000,), torch.float32)])
            assert handle.source == other
            yield handle
            assert handle.result()[0].unique().tolist() == [100.0 * other + i]
    yield transport.flush()


def any_tensor_travels(transport):
    """One message with every dtype, an empty tensor, a scalar, and views that are not what lies in memory."""
    tensors = [torch.arange(6).to(dtype).reshape(2, 3) for dtype in DTYPES]
    tensors += [torch.empty(0, 4), torch.tensor(7.0), torch.arange(6.0).reshape(2, 3).t(), torch.ones(3)[::2]]
    tensors += [torch.ones(2, requires_grad=True), torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag]
    if transport.rank == 0:
        transport.send(2, tensors)
        transport.send(2, [torch.empty(0)])
        yield transport.flush()
    if transport.rank == 2:
        handle = transport.receive(0, [TensorSpec(tuple(each.shape), each.dtype) for each in tensors])
        nothing = transport.receive(0, [TensorSpec((0,), torch.float32)])
        yield handle
        for came, sent in zip(handle.result(), tensors, strict=True):
            assert came.dtype == sent.dtype
            assert torch.equal(came, sent.detach())
            assert not came.requires_grad
        yield nothing
        assert nothing.result()[0].shape == (0,)


def in_place_changes_stay_at_home(transport):
    """What a receiver does to its tensor does not reach the sender, nor the other way about once it has gone."""
    tensor = torch.zeros(4)
    if transport.rank == 0:
        transport.send(1, [tensor])
        yield transport.flush()
        tensor.add_(5)
        transport.send(1, [torch.ones(1)])
        back = transport.receive(1, [TensorSpec((1,), torch.float32)])
        yield back
        assert tensor.tolist() == [5.0] * 4
    if transport.rank == 1:
        came = transport.receive(0, [TensorSpec((4,), torch.float32)])
        yield came
        after = transport.receive(0, [TensorSpec((1,), torch.float32)])
        yield after
        assert came.result()[0].tolist() == [0.0] * 4
        came.result()[0].sub_(9)
        transport.send(0, [torch.ones(1)])
        yield transport.flush()


def gathers_vectors_of_any_length(transport):
    gathered = []
    for lengths, dtype in [((0, 3, 5), torch.float64), ((2, 0, 0), torch.bfloat16), ((0, 0, 0), torch.int64)]:
        vector = torch.full((lengths[transport.rank],), transport.rank + 1).to(dtype)
        handle = transport.all_gather(vector, lengths)
        vector.zero_()
        yield handle
        gathered.append([(part.dtype == dtype, part.tolist()) for part in handle.result()])
    assert gathered[0] == [(True, []), (True, [2.0] * 3), (True, [3.0] * 5)]
    assert gathered[1] == [(True, [1.0] * 2), (True, []), (True, [])]
    return gathered


def sums_in_order_of_ranks(transport):
    """The order shows in the bits: (1 + 1e8) - 1e8 is 0 in float32, and 1 where the first rank comes last."""
    tensor = torch.tensor([1.0, 1e8, -1e8])[transport.rank].repeat(5)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(transport.rank))
    column = torch.zeros(4, 3)[:, transport.rank]
    column += transport.rank
    handle = transport.all_reduce([tensor, noise, column, torch.empty(0)], (0, 1, 2))
    yield handle
    assert tensor.tolist() == [0.0] * 5
    assert column.tolist() == [3.0] * 4
    return noise.tolist()


def sums_within_a_group(transport):
    tensor = torch.tensor([transport.rank], dtype=torch.bfloat16)
    if transport.rank != 1:
        first, second = transport.all_reduce([tensor], (0, 2)), torch.ones(2, dtype=torch.int64)
        yield first
        assert tensor.tolist() == [2.0]
        handle = transport.all_reduce([second], (0, 2))
        yield handle
        assert second.tolist() == [2, 2]
    alone = torch.ones(1)
    handle = transport.all_reduce([alone], (transport.rank,))
    assert handle.ready()
    assert alone.item() == 1.0


def swaps_parts_of_any_length(transport):
    """Rank s sends rank t a part of s + t elements, of which each holds 10 s + t; the own part comes back as it is."""
    rank, everyone = transport.rank, (0, 1, 2)
    parts = [torch.full((rank + to,), 10.0 * rank + to) for to in everyone]
    handle = transport.all_to_all(parts, [source + rank for source in everyone], everyone)
    yield handle
    came = handle.result()
    assert [part.tolist() for part in came] == [[10.0 * source + rank] * (source + rank) for source in everyone]
    assert came[rank].data_ptr() == parts[rank].data_ptr()
    came[(rank + 1) % 3].zero_()
    assert [part.tolist() for part in parts] == [[10.0 * rank + to] * (rank + to) for to in everyone]
    if rank != 1:
        halves = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16).tensor_split(2)
        again = transport.all_to_all(halves, [2, 2] if rank == 0 else [1, 1], (0, 2))
        yield again
        assert [part.tolist() for part in again.result()] == ([[1.0, 2.0]] * 2 if rank == 0 else [[3.0]] * 2)


def says_what_is_wrong(transport):
    rank = transport.rank
    with pytest.raises(ValueError, match=f"no channel .*rank {rank}"):
        transport.send(rank, [torch.ones(1)])
    with pytest.raises(ValueError, match=r"no channel .*rank 3"):
        transport.receive(3, [])
    with pytest.raises(ValueError, match=r"shape \(2,\).*lengths \(1, 1, 1\)"):
        transport.all_gather(torch.ones(2), (1, 1, 1))
    with pytest.raises(ValueError, match=r"all_to_all was given parts of the shapes \[\(2,\)\]"):
        transport.all_to_all([torch.ones(2)], [2], (0, 1, 2))
    with pytest.raises(ValueError, match="the ranks"):
        transport.all_reduce([torch.ones(1)], ((rank + 1) % 3, (rank + 2) % 3))
    yield from ()


def a_closed_end_fails_at_once(transport):
    """Rank 2 closes while rank 1 waits for it; rank 1 closes in turn, and the news reaches rank 0."""
    spec = [TensorSpec((1,), torch.float32)]
    if transport.rank < 2:
        handle = transport.receive(transport.rank + 1, spec)
        with pytest.raises(PeerLost) as caught:
            yield from arrive(lambda: handle)
        assert caught.value.peer == transport.rank + 1
    transport.close()
    transport.close()
    calls = [
        lambda: transport.send((transport.rank + 1) % 3, [torch.ones(1)]),
        lambda: transport.receive((transport.rank + 1) % 3, spec),
        lambda: transport.all_gather(torch.ones(1), (1, 1, 1)),
        lambda: transport.all_reduce([torch.ones(1)], (0, 1, 2)),
        lambda: transport.all_to_all([torch.ones(1)] * 3, [1, 1, 1], (0, 1, 2)),
        transport.flush,
    ]
    for call in calls:
        with pytest.raises(PeerLost, match="this rank closed"):
            call()


def a_collective_fails_with_the_rank_that_closed(transport):
    if transport.rank == 1:
        transport.close()
        return
    with pytest.raises(PeerLost) as caught:
        yield from arrive(lambda: transport.all_gather(torch.ones(1), (1, 1, 1)))
    assert caught.value.peer == 1


CONTRACT: list[Scenario] = [
    order_is_kept,
    both_directions_with_late_receives,
    any_tensor_travels,
    in_place_changes_stay_at_home,
    gathers_vectors_of_any_length,
    sums_in_order_of_ranks,
    sums_within_a_group,
    swaps_parts_of_any_length,
    says_what_is_wrong,
    a_closed_end_fails_at_once,
    a_collective_fails_with_the_rank_that_closed,
]


def agree(results: list[Any]) -> bool:
    """Whether all ranks returned the same."""
    return all(one == other for one, other in pairwise(results))
