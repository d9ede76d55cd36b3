from __future__ import annotations

import pytest
import torch
from transport_contract import CONTRACT, agree

from raypipe.errors import PeerLost
from raypipe.transport import MemoryHub, TensorSpec

ONE = [TensorSpec((1,), torch.float32)]


def run_in_one_thread(scenario, size=3):
    """Runs the ranks in turn: each until it would wait for a handle that is not ready."""
    hub = MemoryHub(size)
    works = {rank: scenario(hub.transport(rank)) for rank in range(size)}
    waits = dict.fromkeys(works)
    results = dict.fromkeys(works)
    while works:
        able = [rank for rank in works if waits[rank] is None or waits[rank].ready()]
        assert able, f"ranks {list(works)} wait for each other"
        for rank in able:
            try:
                waits[rank] = next(works[rank])
            except StopIteration as stop:
                results[rank] = stop.value
                del works[rank]
    return list(results.values())


@pytest.mark.parametrize("scenario", CONTRACT, ids=lambda scenario: scenario.__name__)
def test_contract(scenario):
    assert agree(run_in_one_thread(scenario))


def test_ready_is_exact_and_waiting_too_early_is_refused():
    hub = MemoryHub(2)
    handle = hub.transport(1).receive(0, ONE)
    assert not handle.ready()
    with pytest.raises(PeerLost, match=r"rank 0: it has sent nothing yet.*run that rank"):
        handle.wait(1.0)
    hub.transport(0).send(1, [torch.ones(1)])
    assert handle.ready()
    handle.wait(0.0)
    assert handle.result()[0].item() == 1.0


def test_a_collective_names_the_first_rank_that_is_missing():
    hub = MemoryHub(3)
    handle = hub.transport(0).all_gather(torch.ones(1), (1, 1, 1))
    assert (handle.ready(), handle.source) == (False, 1)
    hub.transport(1).all_gather(torch.ones(1), (1, 1, 1))
    assert (handle.ready(), handle.source) == (False, 2)


def test_a_sender_may_change_its_tensor_at_once():
    hub, tensor = MemoryHub(2), torch.zeros(1)
    hub.transport(0).send(1, [tensor])
    tensor.fill_(3.0)
    assert hub.transport(1).receive(0, ONE).result()[0].item() == 0.0


def test_what_was_sent_before_closing_still_arrives():
    hub = MemoryHub(2)
    early = hub.transport(1).receive(0, ONE)
    hub.transport(0).send(1, [torch.ones(1)])
    hub.transport(0).send(1, [torch.ones(1)])
    hub.transport(0).close()
    assert early.result()[0].item() == 1.0
    assert hub.transport(1).receive(0, ONE).result()[0].item() == 1.0
    with pytest.raises(PeerLost) as caught:
        hub.transport(1).receive(0, ONE).wait(1.0)
    assert caught.value.peer == 0
    with pytest.raises(PeerLost, match="rank 0"):
        hub.transport(1).send(0, [torch.ones(1)])


def test_a_message_of_another_shape_is_refused():
    hub = MemoryHub(2)
    hub.transport(1).receive(0, ONE)
    with pytest.raises(ValueError, match=r"rank 0 sent .*\(2,\).* to rank 1, which expects .*\(1,\)"):
        hub.transport(0).send(1, [torch.ones(2)])


def test_one_rank_needs_nobody():
    transport = MemoryHub(1).transport(0)
    assert transport.all_gather(torch.ones(2), (2,)).result()[0].tolist() == [1.0, 1.0]
    assert transport.all_reduce([torch.ones(2)], (0,)).ready()
    assert transport.flush().ready()


@pytest.mark.parametrize("size", [0, -1])
def test_a_hub_needs_ranks(size):
    with pytest.raises(ValueError, match=f"a hub of {size} ranks"):
        MemoryHub(size)
    with pytest.raises(ValueError, match="rank 2 is not one of the hub's 2 ranks"):
        MemoryHub(2).transport(2)
