from __future__ import annotations

import math

import pytest

from raypipe.model.weights import LossRule, Rule
from raypipe.stage.tally import MOST_TERMS, Tally, refusal_of, tellers_of
from raypipe.topology import Topology

TARGETS = LossRule(Rule.TARGETS)


def told(*tallies: Tally, rule: LossRule = TARGETS) -> float:
    tellers = tellers_of(rule, Topology(3, len(tallies)), 2)
    vectors = [tally.vector() for tally in tallies]
    assert {len(vector) for vector in vectors} == {tellers.length}
    return tellers.divisor(vectors)


def test_a_tally_goes_there_and_back() -> None:
    for tally in (Tally(3.5, True, (3.5, 7.0)), Tally(0.0, False), Tally(2.0, True, (1.0,), refused=True)):
        assert Tally.read(tally.vector()) == tally
    assert Tally.read(Tally(1.0, True, (1.0,) * (MOST_TERMS + 1)).vector()).refused


def test_the_divisor_is_of_all_replicas() -> None:
    assert told(Tally(3.0, True, (3.0,)), Tally(5.0, True, (5.0,))) == 8.0
    assert told(Tally(3.0, True), Tally(5.0, True), rule=LossRule(Rule.SAMPLES)) == 1.0
    assert told(Tally(1.0, True), Tally(1.0, True), rule=LossRule(Rule.SUM)) == 1.0


def test_it_is_counted_in_the_rules_unit() -> None:
    assert told(Tally(3.0, True, (3.0,)), Tally(5.0, True, (5.0,)), rule=LossRule(Rule.TARGETS, unit=4.0)) == 2.0


def test_a_loss_that_is_not_finite_in_any_share_makes_it_nan() -> None:
    bad = Tally(3.0, True, (3.0,), finite=False)
    for rule in (TARGETS, LossRule(Rule.SAMPLES)):
        assert math.isnan(told(bad, Tally(5.0, True, (5.0,)), rule=rule))
        assert math.isnan(told(Tally(5.0, True, (5.0,)), bad, rule=rule))
    assert Tally.read(bad.vector()) == bad


def test_a_share_without_a_valid_target_weighs_nothing_and_a_batch_without_one_is_refused() -> None:
    assert told(Tally(0.0, False, (0.0,)), Tally(5.0, True, (5.0,))) == 5.0
    nothing = (Tally(0.0, True, (0.0,)), Tally(0.0, True, (0.0,)))
    assert told(*nothing) == 0.0
    assert "no microbatch of the batch has a valid target" in (refusal_of(TARGETS, nothing) or "")


def test_a_batch_that_trains_nothing_changes_nothing() -> None:
    assert told(Tally(2.0, False, (2.0,)), Tally(2.0, False, (2.0,))) == 0.0


@pytest.mark.parametrize(
    "other",
    [
        Tally(4.0, True, (4.0, 9.0)),
        Tally(4.0, True, (4.0,)),
        Tally(0.0, True, (0.0, 8.0)),
        Tally(4.0, True, (4.0, 8.0), refused=True),
    ],
    ids=["other-proportion", "other-number", "weightless", "refused-there"],
)
def test_loss_functions_that_average_over_different_things_are_refused(other: Tally) -> None:
    mine = Tally(2.0, True, (2.0, 4.0))
    assert told(mine, Tally(4.0, True, (4.0, 8.0))) == 6.0
    assert told(mine, other) == 0.0
    assert "give microbatch_weight" in (refusal_of(TARGETS, [mine, other]) or "")


def test_who_tells() -> None:
    assert tellers_of(TARGETS, Topology(3), 2).ranks == (2,)
    assert tellers_of(LossRule(Rule.SAMPLES), Topology(3), 2).ranks == ()
    assert tellers_of(LossRule(Rule.SAMPLES), Topology(3, 2), 2).ranks == (2, 5)
