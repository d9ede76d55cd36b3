from __future__ import annotations

import pytest

from raypipe.errors import PeerLost
from raypipe.stage.protocol import RankWork, run_blocking
from raypipe.transport.base import Done


class Failing(Done[int]):
    def wait(self, timeout_s: float) -> None:
        raise PeerLost(3, f"waited {timeout_s} s")


def test_work_is_run_to_its_end() -> None:
    def work() -> RankWork[int]:
        total = 0
        for number in range(3):
            handle = Done(number)
            yield handle
            total += handle.result()
        return total

    assert run_blocking(work(), 1.0) == 3


def test_a_wait_that_fails_fails_inside_the_work() -> None:
    seen = []

    def work() -> RankWork[str]:
        try:
            yield Failing(0)
        except PeerLost as error:
            seen.append(error)
            raise RuntimeError("in action 0F1") from error
        return "never"

    with pytest.raises(RuntimeError, match="in action 0F1"):
        run_blocking(work(), 2.5)
    assert seen[0].peer == 3
    assert "2.5 s" in seen[0].reason
