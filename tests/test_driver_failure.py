from __future__ import annotations

import itertools

import pytest

from raypipe.driver.failure import Decision, decide, explains, first_cause
from raypipe.driver.status import Failed, Finished, GroupStatus, Running
from raypipe.errors import CutError, NonFiniteError, PeerLost, StageError, StageLost, StageStuck

CODE = StageError(1, "2F0", 3, ValueError("boom"))
LOST = StageLost(2, 2, "killed")
STUCK = StageStuck(0, "0F0", 300.0)
NEWS = StageError(3, "3F0", 3, PeerLost(2, "closed"))
PEER = PeerLost(2, "closed")


def status(*errors: BaseException) -> GroupStatus:
    return GroupStatus((Finished(1), *(Failed(error) for error in errors), Running()))


def test_the_cause_is_found_in_whatever_order_the_ranks_stand() -> None:
    for worst in range(5):
        present = (CODE, LOST, STUCK, NEWS, PEER)[worst:]
        for order in itertools.permutations(present):
            assert first_cause(status(*order)) is present[0]


def test_among_equals_the_lowest_rank_counts() -> None:
    again = StageError(2, "2F0", 3, ValueError("boom"))
    assert first_cause(status(CODE, again)) is CODE
    assert first_cause(status(again, CODE)) is again


def test_an_error_of_the_model_counts_as_code() -> None:
    cut = CutError("it cannot be split")
    assert first_cause(status(LOST, cut, PEER)) is cut


def test_news_of_another_failure_explains_nothing() -> None:
    assert not explains(status(NEWS, PEER))
    assert explains(status(NEWS, LOST))
    assert explains(status(CODE))


def test_without_a_failure_there_is_no_cause() -> None:
    with pytest.raises(ValueError, match="no rank has failed"):
        first_cause(GroupStatus((Finished(1), Running())))


@pytest.mark.parametrize("error", [CODE, LOST, STUCK, NEWS, PEER])
def test_a_step_is_tried_again_only_where_a_restart_is_left(error: BaseException) -> None:
    assert decide(status(error), 0) is Decision.RAISE
    assert decide(status(error), 1) is Decision.RETRY
    assert decide(status(error), -1) is Decision.RETRY


def test_what_was_refused_would_be_refused_again() -> None:
    assert decide(status(CutError("no"), PEER), 5) is Decision.RAISE


def test_a_nan_is_traced_to_the_last_parameter_and_not_tried_again() -> None:
    first, last = (
        NonFiniteError(3, stage, "no", parameter="w", position=position) for stage, position in ((0, 1), (1, 9))
    )
    assert first_cause(status(first, last, PEER)) is last
    assert first_cause(status(CODE, PEER, LOST)) is CODE
    assert decide(status(first), 5) is Decision.RAISE
