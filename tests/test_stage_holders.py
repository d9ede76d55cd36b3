from __future__ import annotations

from raypipe.stage.holders import deal, gradients_of, largest_part
from raypipe.topology import Topology

SIZES = {"tied": 8, "a": 5, "b": 3, "c": 1}
HELD = (("tied", "a"), ("b", "tied", "frozen"), ("c",))


def test_every_parameter_of_a_stage_is_shared_by_its_replicas_and_a_tied_one_by_all_holders() -> None:
    found = gradients_of(Topology(3, 2), HELD, SIZES)
    assert found.order == ("tied", "a", "b", "c")
    assert found.shared == {(0, 1, 3, 4): ("tied",), (0, 3): ("a",), (1, 4): ("b",), (2, 5): ("c",)}
    assert found.owned == (("tied", "a"), ("b",), ("c",), (), (), ())


def test_one_pipeline_shares_tied_weights_alone() -> None:
    found = gradients_of(Topology(3), HELD, SIZES)
    assert found.shared == {(0, 1): ("tied",)}
    assert found.owned == (("tied", "a"), ("b",), ("c",))


def test_sharded_owners_are_spread_and_each_holds_what_it_owns() -> None:
    found = gradients_of(Topology(3, 2), HELD, SIZES, sharded=True)
    assert sorted(name for names in found.owned for name in names) == sorted(SIZES)
    assert found.owned == (("tied",), ("b",), ("c",), ("a",), (), ())
    for rank, names in enumerate(found.owned):
        assert set(names) <= set(HELD[Topology(3, 2).place(rank).stage])


def test_of_a_tensor_group_the_first_rank_counts_and_each_steps_its_piece() -> None:
    found = gradients_of(Topology(2, 2, tensor=2), [["a"], ["b"]], {"a": 4, "b": 2}, sharded=True)
    assert found.shared == {(0, 4): ("a",), (1, 5): ("a",), (2, 6): ("b",), (3, 7): ("b",)}
    assert found.owned == (("a",), (), ("b",), (), (), (), (), ())
    assert [found.stepped_by(rank) for rank in range(8)] == [("a",), ("a",), ("b",), ("b",), (), (), (), ()]


def test_the_largest_go_first_each_to_whoever_has_least() -> None:
    holders = dict.fromkeys("vwxyz", (4, 7))
    assert deal(holders, {"v": 1, "w": 2, "x": 3, "y": 4, "z": 4}) == {"y": 4, "z": 7, "x": 4, "w": 7, "v": 7}


def test_the_largest_part_of_equal_parameters_is_an_even_one() -> None:
    sizes = {str(number): 10 for number in range(12)}
    state = dict.fromkeys(sizes, 84)
    assert [largest_part(sizes, state, replicas) for replicas in (1, 2, 3, 4)] == [1008, 504, 336, 252]
    assert largest_part({"big": 100, "small": 1}, {"big": 800, "small": 8}, 2) == 800
    assert largest_part({}, {}, 2) == 0
