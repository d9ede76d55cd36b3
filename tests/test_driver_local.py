from __future__ import annotations

import cloudpickle
import pytest
import torch
from driver_toys import Toy, builds, everywhere, told

from raypipe.driver.gang import Pending
from raypipe.driver.local import LocalGang
from raypipe.errors import PeerLost, StageError
from raypipe.topology import Topology


def gang_of(ranks: int) -> LocalGang:
    return LocalGang([cloudpickle.loads(build) for build in builds(ranks)])


def test_ranks_meet_in_one_thread() -> None:
    gang = gang_of(3)
    pending = [gang.train_step(step, {}) for step in range(2)]  # queued, as over Ray
    for step, made in enumerate(pending):
        assert gang.wait(made) == [(rank, step, None, [0, 1, 2]) for rank in range(3)]
    assert gang.wait(gang.forward_step(2, "batch", "predict"))[1] == (1, 2, "predict", "batch")
    assert gang.state() == [{"rank": rank} for rank in range(3)]
    assert gang.failure is None
    gang.close()


def test_a_replica_alone_is_given_a_batch_and_the_first_tells_the_state() -> None:
    gang = LocalGang([cloudpickle.loads(build) for build in builds(4)], Topology(stages=2, replicas=2))
    given = [result[3] for result in gang.wait(gang.forward_step(0, "batch", "predict", 1))]
    assert given == [None, None, "batch", "batch"]
    assert gang.state() == [{"rank": 0}, {"rank": 1}]
    gang.close()


def test_the_first_cause_is_raised_and_raised_again() -> None:
    gang = gang_of(3)
    for _ in range(2):
        with pytest.raises(StageError, match="rank 1 dislikes step 0") as caught:
            gang.wait(gang.train_step(0, {1: told}))
        assert caught.value.stage == 1
    assert gang.failure is not None
    gang.close()


def test_where_no_rank_can_go_on_it_says_so() -> None:
    """Rank 1 never comes to the meeting."""
    gang = gang_of(2)
    (work, _) = gang.train_step(0, {}).calls
    with pytest.raises(PeerLost, match="no rank can go on"):
        gang.wait(Pending(0, "train", (work,)))


def test_random_state_and_threads_are_the_callers_own() -> None:
    def draws(toy: Toy, step: int) -> None:
        torch.manual_seed(5)
        torch.rand(3)

    gang = gang_of(2)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    gang.wait(gang.train_step(0, everywhere(draws, range(2))))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
