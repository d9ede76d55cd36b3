from __future__ import annotations

from typing import Any

import pytest
from made_by_hand import looped, mine

from raypipe.schedule import Costs, Schedule, build, choose

KEEPS = Costs(activation_bytes=1e6)


def test_the_least_makespan_is_taken() -> None:
    few, many = build("1f1b", 4, 4), build("1f1b", 4, 16)

    def costs_of(schedule: Schedule) -> Costs:
        return Costs(forward=16 / schedule.microbatches, backward=32 / schedule.microbatches)

    choice = choose([few, many], costs_of)
    assert choice.schedule is many
    assert choice.simulation.makespan == 19 * 3
    assert [one.found.makespan for one in choice.tried] == [7 * 12, 19 * 3]


def test_of_equal_makespans_the_one_that_keeps_less() -> None:
    choice = choose([build("gpipe", 3, 6), build("1f1b", 3, 6)], lambda schedule: KEEPS)
    assert choice.schedule.name == "1f1b"
    assert str(choice) == (
        "    schedule                         makespan  bubble  peak memory  fits\n"
        "    gpipe: 3 stages, 6 microbatches  24        25.0%   6 MB         yes\n"
        "->  1f1b: 3 stages, 6 microbatches   24        25.0%   3 MB         yes\n"
        "1f1b: 3 stages, 6 microbatches has the least makespan, 24, and of those that have it the least memory."
    )


def test_of_equal_ones_the_first() -> None:
    first, second = build("gpipe", 2, 2), mine("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1", microbatches=2)
    assert choose([first, second], lambda schedule: KEEPS).schedule is first
    choice = choose([second, first], lambda schedule: KEEPS)
    assert choice.schedule is second
    assert choice.why().endswith("has the least makespan, 9, and came first of those that are equal")


def test_what_does_not_fit_is_left_out() -> None:
    def costs_of(schedule: Schedule) -> Costs:
        share = schedule.stages / schedule.chunks
        return Costs(forward=share, backward=2 * share, activation_bytes=share * 1e6)

    fast, slow = looped(2, 2, 6), build("1f1b", 2, 6)
    assert choose([slow, fast], costs_of).schedule is fast
    assert choose([slow, fast], costs_of, 6e6).schedule is fast
    choice = choose([slow, fast], costs_of, 5.9e6)
    assert choice.schedule is slow
    assert [one.fits for one in choice.tried] == [True, False]
    assert str(choice).splitlines()[2].endswith("6 microbatches  19.5      7.7%    6 MB         no")
    assert choice.why() == ("1f1b: 2 stages, 6 microbatches is the only one that fits; 1 of 2 schedules would not fit")


def test_each_stage_has_its_own_limit() -> None:
    candidates = [build("1f1b", 3, 6)]
    assert choose(candidates, lambda schedule: KEEPS, (3e6, 2e6, 1e6)).best.fits
    with pytest.raises(
        ValueError, match="the smallest peak is that of 1f1b: 3 stages, 6 microbatches, 2 MB on stage 1"
    ):
        choose(candidates, lambda schedule: KEEPS, (3e6, 1.5e6, 1e6))


def test_none_that_fits_is_one_sentence() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the whole text is compared
        choose([build("gpipe", 3, 6), build("1f1b", 3, 6)], lambda schedule: KEEPS, 2.5e6)
    assert str(caught.value) == (
        "no schedule of 2 fits in memory: the smallest peak is that of 1f1b: 3 stages, 6 microbatches, 3 MB on stage "
        "0, where the limit is 2.5 MB; allow more memory, use more stages, or cut the batch into more "
        "microbatches"
    )


@pytest.mark.parametrize(
    ("limit", "error", "sentence"),
    [
        ("2 GB", TypeError, "memory_bytes is '2 GB', but it must be a number, one for each stage, or None"),
        ((1.0, None), TypeError, "it must be a number, one for each stage, or None"),
        (-1, ValueError, "memory_bytes is -1, but a limit is not negative; give None for no limit"),
        (float("nan"), ValueError, "memory_bytes is nan, but"),
        (
            (1.0, 2.0, 3.0),
            ValueError,
            "memory_bytes has 3 numbers, but 1f1b: 2 stages, 3 microbatches; give one for ea",
        ),
    ],
)
def test_wrong_limits_are_refused(limit: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        choose([build("1f1b", 2, 3)], lambda schedule: KEEPS, limit)


def test_no_candidate_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no schedule to choose from; give at least one candidate"):
        choose([], lambda schedule: KEEPS)
