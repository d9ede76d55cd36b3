from __future__ import annotations

import multiprocessing
import re

import pytest
import torch
from tensor_team import HOST
from torch.distributed.distributed_c10d import PrefixStore

from raypipe.errors import PeerLost
from raypipe.parallel.group import named, open_group
from raypipe.transport import join_store, serve_store


def summed(group):
    values = torch.tensor([group.rank + 1.0])
    most = values.clone()
    group.sum(values)
    group.most(most)
    return group.size, values.item(), most.item()


def test_a_group_sums(tensor_team) -> None:
    assert tensor_team(2).run(summed) == [(2, 3.0, 2.0)] * 2


def again(group):
    try:
        open_group(None, 0, 1, 1.0)
    except ValueError as error:
        return str(error)
    return None


def test_a_process_belongs_to_one_group(tensor_team) -> None:
    for found in tensor_team(2).run(again):
        assert "in a process group already" in found


def alone(port, pipe):
    try:
        open_group(PrefixStore("alone", join_store(HOST, port, 5.0)), 0, 2, 1.0)
    except PeerLost as error:
        pipe.send(str(error))


def left(port, rank, pipe):
    group = open_group(PrefixStore("left", join_store(HOST, port, 5.0)), rank, 2, 20.0)
    if rank:
        return  # without a word
    try:
        group.sum(torch.ones(1))
        group.sum(torch.ones(1))
    except RuntimeError as error:
        lost = named(error)
        assert isinstance(lost, PeerLost)
        pipe.send(str(lost))


@pytest.mark.parametrize(
    ("work", "ranks", "words"), [(alone, [()], "did not come together"), (left, [(0,), (1,)], "is gone")]
)
def test_a_rank_that_is_not_there_is_a_lost_peer(work, ranks, words) -> None:
    _store, port = serve_store(HOST)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    processes = [context.Process(target=work, args=(port, *rank, there), daemon=True) for rank in ranks]
    for process in processes:
        process.start()
    assert here.poll(60.0)
    assert re.search(words, here.recv())
    for process in processes:
        process.join(20.0)


def test_other_errors_stay_what_they_are() -> None:
    mine = RuntimeError("mine")
    assert named(mine) is mine
