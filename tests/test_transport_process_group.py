from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.distributed.distributed_c10d import PrefixStore
from transport_contract import CONTRACT, agree
from transport_team import DEAD, HOST, Team

from raypipe.errors import PeerLost
from raypipe.transport import ProcessGroupTransport, TensorSpec, Wiring, serve_store

ONE = [TensorSpec((1,), torch.float32)]
SOON_S = 2.0


@pytest.fixture(scope="module")
def team():
    team = Team()
    yield team
    team.close()


@contextmanager
def loses(peer, reason=None, within_s=SOON_S):
    """The block raises PeerLost that names ``peer``, soon."""
    start = time.monotonic()
    with pytest.raises(PeerLost, match=reason) as caught:
        yield
    assert caught.value.peer == peer
    assert time.monotonic() - start < within_s


@pytest.mark.parametrize("scenario", CONTRACT, ids=lambda scenario: scenario.__name__)
def test_contract(team, scenario):
    assert agree(team.run(scenario))


def a_silent_peer(transport):
    """Rank 0 says nothing for longer than rank 1 waits; afterwards rank 0 sees the channel closed."""
    if transport.rank == 0:
        transport.send(1, [torch.ones(1)])
        yield transport.flush()
        time.sleep(1.0)
        with loses(1, "closed its end"):
            transport.send(1, [torch.ones(1)])
            transport.flush().wait(10.0)
    if transport.rank == 1:
        handle, late = transport.receive(0, ONE), transport.receive(0, ONE)
        assert (late.ready(), late.source) == (False, 0)
        yield handle
        with loses(0, r"it sent nothing for 0\.3 s"):
            late.wait(0.3)
        assert late.ready()
        with loses(0, r"it sent nothing for 0\.3 s"):
            late.result()


def test_a_wait_ends_in_time_and_names_the_peer(team):
    team.run(a_silent_peer)


def a_receiver_that_never_posts(transport):
    if transport.rank == 0:
        transport.send(1, [torch.ones(1)])
        with loses(1, r"it took nothing for 0\.2 s"):
            transport.flush().wait(0.2)
        transport.send(2, [torch.ones(1)])
    if transport.rank == 2:
        yield transport.receive(0, ONE)
        transport.send(1, [torch.ones(1)])
    if transport.rank == 1:
        yield transport.receive(2, ONE)


def test_flush_ends_in_time_and_sending_never_waits(team):
    team.run(a_receiver_that_never_posts)


def a_message_of_another_size(transport):
    """Neither the abort of the process nor the half-filled buffer that gloo makes of it by itself."""
    if transport.rank == 0:
        transport.send(1, [torch.ones(2)])
        transport.send(2, [torch.ones(2)])
        time.sleep(0.6)
    elif transport.rank == 1:
        with loses(0, "sent nothing for"):
            transport.receive(0, ONE).wait(0.3)
    else:
        with loses(0, "sent nothing for"):
            transport.receive(0, [TensorSpec((3,), torch.float32)]).wait(0.3)
    yield from ()


def test_a_message_of_another_size_never_arrives(team):
    assert DEAD not in team.run(a_message_of_another_size)


def a_tensor_elsewhere(transport):
    if transport.rank == 0:
        with pytest.raises(ValueError, match="tensors of the CPU, but this one is on meta"):
            transport.send(1, [torch.ones(1, device="meta")])
        with pytest.raises(ValueError, match="tensors of the CPU, but this one is on meta"):
            transport.receive(1, [TensorSpec((1,), torch.float32, torch.device("meta"))])
    yield from ()


def test_only_tensors_of_the_cpu_travel(team):
    team.run(a_tensor_elsewhere)


def memory_is_let_go(transport):
    if transport.rank == 0:
        array = np.ones(1000, dtype=np.float32)
        gone = weakref.ref(array)
        transport.send(1, [torch.from_numpy(array)])
        del array
        gc.collect()
        assert gone() is not None, "not received yet, so it must be held"
        transport.send(2, [torch.ones(1)])
        for _ in range(100):
            if gone() is None:
                return
            time.sleep(0.02)
        raise AssertionError("the message was received, but its memory is still held")
    if transport.rank == 2:
        yield transport.receive(0, ONE)
        transport.send(1, [torch.ones(1)])
        yield transport.flush()
    if transport.rank == 1:
        yield transport.receive(2, ONE)
        yield transport.receive(0, [TensorSpec((1000,), torch.float32)])


def test_a_message_is_held_until_it_has_gone_and_no_longer(team):
    team.run(memory_is_let_go)


def another_thread_runs_meanwhile(transport):
    if transport.rank == 0:
        time.sleep(0.5)
        transport.send(1, [torch.ones(1)])
        yield transport.flush()
    if transport.rank == 1:
        ticks, over = [], threading.Event()
        ticker = threading.Thread(target=lambda: [ticks.append(1) for _ in iter(lambda: over.wait(0.005), True)])
        ticker.start()
        yield transport.receive(0, ONE)
        over.set()
        ticker.join()
        assert len(ticks) > 20


def test_waiting_leaves_the_interpreter_to_other_threads(team):
    team.run(another_thread_runs_meanwhile)


def closes_under_its_own_waiting_thread(transport):
    """A control thread closes while the main one waits: that wait ends, and the peer's too."""
    if transport.rank == 2:
        return
    other = 1 - transport.rank
    handle = transport.receive(other, ONE)
    if transport.rank == 0:
        threading.Timer(0.3, transport.close).start()
    with loses(other, "this rank closed" if transport.rank == 0 else "closed its end"):
        yield handle


def test_close_while_its_own_thread_waits(team):
    team.run(closes_under_its_own_waiting_thread)


def closes_in_a_collective(transport):
    gather = (torch.ones(1), (1, 1, 1))
    if transport.rank == 0:
        threading.Timer(0.3, transport.close).start()
        with loses(1, "this rank closed"):
            yield transport.all_gather(*gather)
    else:
        with loses(0):
            yield transport.receive(0, ONE)


def one_waits_in_a_collective_and_one_for_it(transport):
    if transport.rank == 0:
        time.sleep(0.3)
        transport.close()
    if transport.rank == 1:
        with loses(2):
            yield transport.receive(2, ONE)
    if transport.rank == 2:
        with loses(0):
            yield transport.all_gather(torch.ones(1), (1, 1, 1))


@pytest.mark.parametrize("scenario", [closes_in_a_collective, one_waits_in_a_collective_and_one_for_it])
def test_close_ends_collectives_and_the_news_runs_down_the_line(team, scenario):
    team.run(scenario)


def sends_still_pending_at_close(transport):
    if transport.rank == 0:
        for _ in range(5):
            transport.send(1, [torch.ones(100_000)])
        pending = transport.flush()
        start = time.monotonic()
        transport.close()
        assert time.monotonic() - start < SOON_S
        with pytest.raises(PeerLost):
            pending.wait(1.0)
    yield from ()


def test_close_does_not_wait_for_pending_sends(team):
    team.run(sends_still_pending_at_close)


def rank_2_is_killed(transport):
    spec = [TensorSpec((4,), torch.float32)]
    if transport.rank == 2:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    with loses(transport.rank + 1, "closed its end"):
        yield transport.receive(transport.rank + 1, spec)
    # The team's member closes its transport at the end, so rank 0 hears it from rank 1.


def test_a_killed_peer_is_noticed_down_the_line(team):
    assert team.run(rank_2_is_killed) == [None, None, DEAD]


def test_one_rank_needs_nobody():
    store, _ = serve_store(HOST)
    transport = ProcessGroupTransport(store, 0, Wiring(1, (), ((0,),)), timeout_s=1.0)
    handle = transport.all_gather(torch.ones(2), (2,))
    assert handle.ready()
    assert handle.result()[0].tolist() == [1.0, 1.0]
    assert transport.all_reduce([torch.ones(2)], (0,)).ready()
    assert transport.flush().ready()
    transport.close()
    with pytest.raises(PeerLost, match="this rank closed"):
        transport.flush()


def test_peers_that_never_come_are_named():
    store, _ = serve_store(HOST)
    with loses(1, r"no connection within 0\.5 s"):
        ProcessGroupTransport(PrefixStore("a", store), 0, Wiring(2, ((0, 1),)), timeout_s=0.5, host=HOST)


@pytest.mark.parametrize(
    ("rank", "wiring", "message"),
    [
        (2, Wiring(2, ()), "rank 2 is not one of the wiring's 2 ranks"),
        (0, Wiring(2, ((0, 2),)), r"joins \(0, 2\), but ranks are distinct and from 0 to 1"),
        (0, Wiring(2, ((1, 1),)), r"joins \(1, 1\)"),
        (0, Wiring(2, (), ((1, 0),)), r"\(1, 0\) is not sorted; give \(0, 1\)"),
    ],
)
def test_a_wrong_wiring_is_refused(rank, wiring, message):
    store, _ = serve_store(HOST)
    with pytest.raises(ValueError, match=message):
        ProcessGroupTransport(store, rank, wiring, timeout_s=1.0)
