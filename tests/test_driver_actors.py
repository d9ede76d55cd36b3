from __future__ import annotations

import time

import pytest
from driver_toys import Toy, everywhere, told, topology

from raypipe.driver.actors import StageActor
from raypipe.errors import CutError, PeerLost, StageError
from raypipe.stage.protocol import Worker
from raypipe.transport.base import Done

TWO = topology(2)


class Alone:
    """A transport of one rank that notes its end."""

    rank, size, closed = 0, 1, False

    def all_gather(self, vector: object, lengths: object) -> Done[list[object]]:
        return Done([0])

    def close(self) -> None:
        self.closed = True


def hosted(worker: Worker) -> StageActor:
    """An actor as plain Python, its worker connected."""
    actor = StageActor(TWO, 0, 5.0)
    worker.connect(Alone())  # type: ignore[arg-type]
    actor._worker = worker
    return actor


def test_the_dashboard_shows_the_place() -> None:
    assert repr(StageActor(TWO, 1, 5.0)) == "stage 1/2 · replica 0 · rank 1"


def test_a_step_runs_to_its_result() -> None:
    actor = hosted(Toy(0))
    assert actor.train_step(7, {}) == (0, 7, None, [0])
    assert actor.forward_step(8, "batch", "predict") == (0, 8, "predict", "batch")
    assert actor.state(8) == {"rank": 0}


def test_before_the_start_it_says_so() -> None:
    actor = StageActor(TWO, 0, 5.0)
    assert actor.progress().action == "starting"
    with pytest.raises(PeerLost, match="was not started"):
        actor.train_step(0, {})


def test_a_failed_rank_closes_its_channels_and_refuses_what_is_queued() -> None:
    toy = Toy(0)
    actor = hosted(toy)
    with pytest.raises(StageError, match="dislikes step 3") as caught:
        actor.train_step(3, everywhere(told, [0]))
    assert isinstance(caught.value.cause, ValueError)
    assert toy.transport is not None
    assert toy.transport.closed  # type: ignore[attr-defined]
    began = time.monotonic()
    for step in (4, 5):
        with pytest.raises(PeerLost, match="rank 0 does no more work: it failed in step 3"):
            actor.train_step(step, {})
    assert time.monotonic() - began < 0.1


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), KeyboardInterrupt()])
def test_what_a_worker_raises_outside_its_actions_gets_a_place(error: BaseException) -> None:
    class Broken(Toy):
        def state(self) -> None:
            raise error

    with pytest.raises(StageError) as caught:
        hosted(Broken(0)).state(2)
    assert (caught.value.stage, caught.value.action, caught.value.step) == (0, "state", 2)
    assert caught.value.cause is error
    assert caught.value.__suppress_context__


def test_a_refusal_of_ours_stays_what_it_is() -> None:
    class Refusing(Toy):
        def state(self) -> None:
            raise CutError("it cannot be split")

    with pytest.raises(CutError, match="it cannot be split"):
        hosted(Refusing(0)).state(0)


def test_an_error_while_closing_does_not_hide_the_first() -> None:
    class Clumsy(Toy):
        def close(self) -> None:
            raise OSError("cannot close")

    with pytest.raises(StageError, match="dislikes step 0"):
        hosted(Clumsy(0)).train_step(0, everywhere(told, [0]))
