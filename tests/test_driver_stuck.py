from __future__ import annotations

from raypipe.driver.stuck import View, find_stuck
from raypipe.errors import StageStuck
from raypipe.stage.protocol import Progress
from raypipe.topology import Topology

THREE = Topology(stages=3)
GRID = Topology(stages=2, replicas=2)


def view(
    rank: int,
    action: str = "0F0",
    seconds: float = 1.0,
    *,
    waits_for: int | None = None,
    finished: bool = False,
    silent_s: float = 0.0,
    waited_s: float = 1000.0,
) -> View:
    return View(rank, finished, Progress(4, action, seconds, waits_for), silent_s, waited_s)


def stuck(*views: View) -> tuple[int, StageStuck] | None:
    return find_stuck(views, 10.0, THREE)


def test_the_rank_at_its_own_action_is_named_not_those_that_wait_for_it() -> None:
    found = stuck(view(0, "1F3", 50, waits_for=1), view(1, "1F2", 20), view(2, "2F2", 60, waits_for=1))
    assert found is not None
    rank, error = found
    assert (rank, error.stage, error.action, error.seconds) == (1, 1, "1F2", 20)
    assert "stage 1 has been at action 1F2 for 20 s" in str(error)
    assert error.ranks == (
        "stage 0/3 · replica 0 · rank 0: at 1F3 for 50 s, waits for rank 1",
        "stage 1/3 · replica 0 · rank 1: at 1F2 for 20 s",
        "stage 2/3 · replica 0 · rank 2: at 2F2 for 60 s, waits for rank 1",
    )


def test_of_several_replicas_the_stuck_one_is_named() -> None:
    found = find_stuck(
        [view(0, waits_for=1), view(1, waits_for=3), view(2, waits_for=3), view(3, seconds=20)], 10.0, GRID
    )
    assert found is not None
    assert (found[0], found[1].stage, found[1].replica) == (3, 1, 1)
    assert str(found[1]).startswith("stage 1 of replica 1 has been at action")


def test_a_slow_stage_is_no_alarm() -> None:
    assert stuck(view(0, seconds=500, waits_for=1), view(1, seconds=9), view(2, seconds=500, waits_for=1)) is None


def test_a_clock_older_than_the_call_says_nothing() -> None:
    assert stuck(*(view(rank, seconds=3600, waited_s=3) for rank in range(3))) is None


def test_a_rank_that_does_not_answer_is_stuck_even_if_it_waited_before() -> None:
    found = stuck(
        view(0, waits_for=1, silent_s=12, seconds=0), view(1, seconds=50, waits_for=0), view(2, finished=True)
    )
    assert found is not None
    assert found[0] == 0
    assert "has not answered for 12 s" in found[1].ranks[0]
    assert found[1].ranks[2].endswith("finished")


def test_a_rank_that_never_answered_is_stuck_at_its_start() -> None:
    found = stuck(View(0, False, None, 11.0, 11.0), view(1, waits_for=0), view(2, waits_for=0))
    assert found is not None
    assert found[1].action == "starting"


def test_ranks_that_wait_in_a_circle_are_found_once_all_wait_too_long() -> None:
    circle = [view(0, seconds=20, waits_for=1), view(1, seconds=30, waits_for=2), view(2, seconds=25, waits_for=0)]
    found = stuck(*circle)
    assert found is not None
    assert found[0] == 1
    assert stuck(circle[0], circle[1], view(2, seconds=5, waits_for=0)) is None


def test_an_idle_rank_is_not_blamed_while_another_works() -> None:
    assert stuck(view(0, "idle", 500), view(1, seconds=5), view(2, finished=True)) is None
