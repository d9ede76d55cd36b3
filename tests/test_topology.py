from __future__ import annotations

from raypipe.topology import Place, Topology

GRID = Topology(stages=3, replicas=2, tensor=2)


def test_a_rank_and_its_place_are_each_others_inverse() -> None:
    assert [GRID.rank(*(place.stage, place.replica, place.tensor)) for place in map(GRID.place, range(12))] == [
        *range(12)
    ]
    assert GRID.place(9) == Place(replica=1, stage=1, tensor=1)


def test_the_ranks_of_a_replica_and_the_copies_of_a_rank() -> None:
    assert GRID.ranks_of(0) == (0, 1, 2, 3, 4, 5)
    assert GRID.ranks_of(1) == (6, 7, 8, 9, 10, 11)
    assert GRID.leaders(1) == (6, 8, 10)
    assert [GRID.leader(rank) for rank in (8, 9, 10, 11)] == [8, 8, 10, 10]
    assert GRID.copies(3) == GRID.copies(9) == (3, 9)


def test_a_single_pipeline_is_not_called_a_replica() -> None:
    assert Topology(2).replica_named(1) is None
    assert Topology(2, 2).replica_named(1) == 0
    assert Topology(2, 2).replica_named(2) == 1
