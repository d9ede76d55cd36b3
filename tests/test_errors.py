from __future__ import annotations

import pickle

import pytest

from raypipe.errors import StageError, StageLost, StageStuck, StepError


@pytest.mark.parametrize("replica", [None, 1])
@pytest.mark.parametrize(
    ("kind", "given"),
    [(StageError, (2, "4F1", 3, ValueError("boom"))), (StageLost, (2, 5, "killed", 3)), (StageStuck, (2, "4F1", 9.0))],
)
def test_a_replica_is_named_where_there_are_several_and_survives_pickling(
    kind: type[StepError], given: tuple[object, ...], replica: int | None
) -> None:
    error = kind(*given, replica=replica)
    assert str(error).startswith("stage 2 of replica 1" if replica else "stage 2")
    assert ("replica" in str(error)) == (replica is not None)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.replica) == (kind, str(error), replica)
