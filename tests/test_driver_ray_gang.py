from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from driver_toys import Act, ToldError, Toy, builds, everywhere, nap, pids, told, topology, wiring

from raypipe.driver.cluster import Session
from raypipe.driver.ray_gang import RayGang, launch
from raypipe.errors import CutError, PeerLost, ResourcesError, StageError, StageLost, StageStuck
from raypipe.stage.protocol import Worker
from raypipe.topology import Topology

pytestmark = pytest.mark.ray


@pytest.fixture
def gang(ray_session: Session) -> Iterator[RayGang]:
    """Three ranks."""
    gang = start(ray_session, 3)
    yield gang
    gang.close()


def start(session: Session, ranks: int, **options: Any) -> RayGang:
    return launch(topology(ranks), builds(ranks), wiring(ranks), session=session, **options)


def run(gang: RayGang, step: int, batch: dict[int, Act]) -> list[Any]:
    return gang.wait(gang.train_step(step, gang.put(batch)))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def soon(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done


def created_groups() -> int:
    return sum(group["state"] == "CREATED" for group in ray.util.placement_group_table().values())


def test_a_healthy_gang(ray_session: Session, gang: RayGang) -> None:
    """One start for many checks: a start takes seconds."""
    ids = [value for _, _, value, _ in run(gang, 0, everywhere(pids, range(3)))]
    assert len(set(ids)) == 3

    late = {0: lambda toy, step: time.sleep(0.3)}
    queued = [gang.train_step(step, gang.put(late)) for step in (1, 2)]
    assert gang.wait(queued[0]) == [(rank, 1, None, [0, 1, 2]) for rank in range(3)]
    assert gang.wait(queued[1]) == [(rank, 2, None, [0, 1, 2]) for rank in range(3)]
    assert gang.wait(gang.forward_step(3, gang.put("rows"), "predict")) == [
        (rank, 3, "predict", "rows") for rank in range(3)
    ]
    assert gang.state() == [{"rank": rank} for rank in range(3)]
    assert gang.failure is None

    with contextlib.closing(start(ray_session, 2)) as other:
        assert len(run(other, 0, {})) == 2
    assert len(run(gang, 4, {})) == 3

    gang.close()
    gang.close()
    assert soon(lambda: not any(map(alive, ids)), 2)
    assert soon(lambda: created_groups() == 0, 2)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_of_the_user_arrives_as_it_is(gang: RayGang, rank: int, caplog: pytest.LogCaptureFixture) -> None:
    run(gang, 0, {})
    began = time.monotonic()
    first = gang.train_step(1, gang.put({rank: told}))
    second = gang.train_step(2, gang.put({}))
    with caplog.at_level(logging.WARNING, "raypipe.driver"), pytest.raises(StageError) as caught:
        gang.wait(first)
    assert time.monotonic() - began < 5
    error = caught.value
    assert (error.stage, error.chunk, error.action, error.microbatch, error.step) == (rank, rank, "0F0", 0, 1)
    assert type(error.cause) is ValueError
    assert str(error).endswith(f"ValueError: rank {rank} dislikes step 1")
    assert "in told" in str(error)
    assert error.__suppress_context__

    assert gang.failure is not None
    others = gang.failure.others(error)
    assert "".join(others).count("lost the connection") == len(others) > 0
    assert sorted(gang.failure.errors) == [0, 1, 2]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(others)

    # The step that was queued behind is answered at once, and it has the same cause.
    began = time.monotonic()
    assert len(ray.wait(list(second.calls), num_returns=3, timeout=5)[0]) == 3
    with pytest.raises(StageError, match=f"rank {rank} dislikes step 1"):
        gang.wait(second)
    assert time.monotonic() - began < 1


def test_a_killed_rank_is_named(gang: RayGang) -> None:
    ids = [value for _, _, value, _ in run(gang, 0, everywhere(pids, range(3)))]
    pending = gang.train_step(1, gang.put({0: nap}))
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(ids[1], signal.SIGKILL)
    with pytest.raises(StageLost, match=r"stage 1 \(rank 1\) is gone in step 1: The actor is dead") as caught:
        gang.wait(pending)
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    assert (caught.value.stage, caught.value.rank, caught.value.step) == (1, 1, 1)
    gang.close()
    assert soon(lambda: not any(map(alive, ids)), 3)


@pytest.mark.slow
def test_a_killed_rank_of_a_replica_is_named_with_it(ray_session: Session) -> None:
    """And a batch of evaluation goes to the ranks of one replica alone."""
    with contextlib.closing(launch(Topology(2, 2), builds(4), wiring(4), session=ray_session)) as gang:
        given = [result[3] for result in gang.wait(gang.forward_step(0, gang.put("batch"), "predict", 1))]
        assert given == [None, None, "batch", "batch"]
        assert gang.state() == [{"rank": 0}, {"rank": 1}]
        ids = [value for _, _, value, _ in run(gang, 0, everywhere(pids, range(4)))]
        pending = gang.train_step(1, gang.put({0: nap}))
        time.sleep(0.3)
        os.kill(ids[3], signal.SIGKILL)
        with pytest.raises(StageLost, match=r"stage 1 of replica 1 \(rank 3\) is gone in step 1") as caught:
            gang.wait(pending)
        assert (caught.value.stage, caught.value.replica) == (1, 1)


@pytest.mark.slow
def test_the_news_never_comes_before_the_cause(gang: RayGang) -> None:
    """Two ranks report a closed connection; the rank that has the error does not say so for a second."""

    def slowly(toy: Toy, step: int) -> None:
        assert toy.transport is not None
        toy.transport.close()
        time.sleep(1.0)
        raise ValueError("the cause")

    with pytest.raises(StageError, match="the cause"):
        run(gang, 0, {1: slowly})


@pytest.mark.slow
def test_a_lost_connection_alone_is_raised_after_a_grace(gang: RayGang) -> None:
    def silently(toy: Toy, step: int) -> None:
        assert toy.transport is not None
        toy.transport.close()
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(StageError) as caught:
        run(gang, 0, {1: silently})
    assert isinstance(caught.value.cause, PeerLost)
    assert 1 < time.monotonic() - began < 10


def test_a_rank_that_hangs_is_stuck_and_the_others_are_not(ray_session: Session) -> None:
    with contextlib.closing(start(ray_session, 3, step_timeout_s=1.0)) as gang:
        run(gang, 0, {})
        began = time.monotonic()
        with pytest.raises(StageStuck) as caught:
            run(gang, 1, {1: nap})
        assert 1 <= time.monotonic() - began < 5
        assert (caught.value.stage, caught.value.action) == (1, "0F0")
        assert "waits for rank" in caught.value.ranks[0]
        assert "rank 1: at 0F0 for" in caught.value.ranks[1]


@pytest.mark.slow
def test_a_stopped_process_is_stuck_and_ends_with_the_gang(ray_session: Session) -> None:
    with contextlib.closing(start(ray_session, 2, step_timeout_s=2.0)) as gang:
        ids = [value for _, _, value, _ in run(gang, 0, everywhere(pids, range(2)))]
        os.kill(ids[1], signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(StageStuck, match="has not answered for") as caught:
            run(gang, 1, {})
        assert caught.value.stage == 1
        assert time.monotonic() - began < 6
    assert soon(lambda: not any(map(alive, ids)), 10)


@pytest.mark.slow
def test_a_slow_step_is_no_alarm(ray_session: Session) -> None:
    def two_slow_halves(toy: Toy, step: int) -> None:
        for _ in range(4):
            toy._at("0F0")
            time.sleep(0.8)

    with contextlib.closing(start(ray_session, 2, step_timeout_s=1.5)) as gang:
        run(gang, 0, {})
        assert len(run(gang, 1, {1: two_slow_halves})) == 2


class Unpicklable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Unpicklable("holds a lock"), "holds a lock"),
        pytest.param(lambda: ToldError("two arguments", 2), "two arguments", marks=pytest.mark.slow),
    ],
)
def test_an_exception_that_cannot_travel_arrives_as_text(
    gang: RayGang, make: Callable[[], Exception], text: str
) -> None:
    def act(toy: Toy, step: int) -> None:
        raise make()

    with pytest.raises(StageError, match=text) as caught:
        run(gang, 0, {2: act})
    assert isinstance(caught.value.cause, str)
    assert str(caught.value).rstrip().splitlines()[-1].endswith(text)
    assert caught.value.stage == 2


@pytest.mark.slow
def test_a_worker_that_ends_its_process_is_lost(gang: RayGang) -> None:
    with pytest.raises(StageLost) as caught:
        run(gang, 0, {2: lambda toy, step: os._exit(3)})
    assert caught.value.rank == 2


def test_a_rank_that_cannot_be_built_is_the_cause_and_leaves_nothing(ray_session: Session) -> None:
    import cloudpickle

    def refuse() -> Worker:
        raise CutError("the model cannot be split")

    first, _ = builds(2)
    began = time.monotonic()
    with pytest.raises(CutError, match="the model cannot be split"):
        launch(topology(2), [first, cloudpickle.dumps(refuse)], wiring(2), session=ray_session)
    assert time.monotonic() - began < 20
    assert soon(lambda: created_groups() == 0, 2)


def test_wrong_arguments_are_refused_before_anything_starts(ray_session: Session) -> None:
    with pytest.raises(ValueError, match="1 builds were given for 2 ranks"):
        launch(topology(2), builds(1), wiring(2), session=ray_session)
    with pytest.raises(TypeError, match="resources_per_stage"):
        start(ray_session, 2, resources={"CPU": "one"})
    with pytest.raises(ResourcesError, match="2 ranks want unobtainium 1 each"):
        start(ray_session, 2, resources={"unobtainium": 1})
    assert created_groups() == 0


@pytest.mark.slow
def test_a_gang_that_is_forgotten_is_ended(ray_session: Session) -> None:
    gang = start(ray_session, 2)
    ids = [value for _, _, value, _ in run(gang, 0, everywhere(pids, range(2)))]
    del gang
    assert soon(lambda: not any(map(alive, ids)))
    assert soon(lambda: created_groups() == 0)


def test_an_interrupt_while_submitting_reaches_all_ranks_or_none(gang: RayGang) -> None:
    run(gang, 0, {})
    batch = gang.put({})
    kill = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    kill.start()
    step = 0
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        while True:
            step += 1
            gang.train_step(step, batch)
    kill.join()
    # Every rank has the same calls, so the next step meets on all of them.
    assert [row[1] for row in run(gang, 1000, {})] == [1000] * 3
