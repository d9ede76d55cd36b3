from __future__ import annotations

from raypipe.driver.status import Failed, Finished, GroupStatus, Running
from raypipe.errors import PeerLost, StageError


def test_equal_errors_are_one_line_with_their_ranks_and_the_cause_is_left_out() -> None:
    cause = StageError(1, "2F0", 3, ValueError("boom"))
    status = GroupStatus(
        (Failed(PeerLost(1, "closed")), Failed(cause), Failed(PeerLost(1, "closed")), Running(), Finished(4))
    )
    assert status.others(cause) == ["ranks 0, 2: lost the connection to rank 1: closed"]
    assert status.running == (3,)
    assert list(status.errors) == [0, 1, 2]


def test_an_error_with_a_remote_traceback_is_one_line() -> None:
    status = GroupStatus((Failed(StageError(0, "0F0", 0, ValueError("boom"))), Failed(PeerLost(0, "closed"))))
    (line,) = status.others(status.errors[1])
    assert line == "rank 0: ValueError: boom"


def test_values_are_in_order_of_ranks() -> None:
    assert GroupStatus((Finished("a"), Finished(None), Finished("c"))).values == ["a", None, "c"]
