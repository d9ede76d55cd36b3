"""Sizes from sizes: what may be told, and what must be looked at."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from raypipe.model.interpolate import Sample, interpolate

Rule = Callable[..., tuple[int, ...]]


def samples(rule: Rule, given: Sequence[tuple[int, ...]], kind: Callable[..., int] = lambda *_: 0) -> list[Sample]:
    return [Sample(sizes, rule(*sizes), kind(*sizes)) for sizes in given]


def told(rule: Rule, seen: Sequence[tuple[int, ...]], new: tuple[int, ...]) -> tuple[int, ...] | None:
    found = interpolate(samples(rule, seen), new)
    return None if found is None else found[1]


def lengths(*values: int) -> list[tuple[int, ...]]:
    return [(value,) for value in values]


def test_lines_products_and_constants() -> None:
    def rule(b: int, s: int) -> tuple[int, ...]:
        return b, s, s - 1, 3 * s + 7, b * s, s * s, 64

    seen = [(4, 10), (4, 31), (4, 20)]
    assert told(rule, seen, (4, 17)) == rule(4, 17)
    assert told(rule, seen[:2], (4, 17)) is None  # two points are on any line
    assert told(rule, seen, (4, 9)) is None
    assert told(rule, seen, (4, 32)) is None
    assert told(rule, seen, (3, 17)) is None
    assert told(rule, seen[:1], (4, 10)) == rule(4, 10)  # known, not told


def test_sizes_that_vary_together_are_one() -> None:
    def rule(s: int, labels: int) -> tuple[int, ...]:
        return s, labels, 2 * labels, s * labels

    assert told(rule, [(10, 11), (31, 32), (20, 21)], (17, 18)) == rule(17, 18)
    assert told(rule, [(10, 11), (31, 32), (20, 21)], (17, 19)) is None


@pytest.mark.parametrize(
    "rule",
    [
        lambda s: ((s + 1) // 2,),
        lambda s: ((s - 3) // 2 + 1,),
        lambda s: (-(-s // 8) * 8,),
        lambda s: (s % 8,),
        lambda s: (min(s, 20),),
        lambda s: (max(20 - s, 0),),
        lambda s: (s * s // 4,),
        lambda s: (1 << s.bit_length(),),
        lambda s: (s // 8 * s,),
        lambda s: (s**3,),
    ],
    ids=["half", "convolution", "padded", "remainder", "window", "rest", "quarter", "power", "blocks", "cube"],
)
def test_no_rule_with_rounding_or_a_kink_is_told_wrong(rule: Rule) -> None:
    """Random samples of many sets: what is told is true."""
    noise = random.Random(0)
    right = 0
    for _ in range(400):
        step = noise.choice([1, 1, 2, 8])
        seen = lengths(*noise.sample(range(8, 73, step), noise.randrange(3, 6)))
        new = (noise.randrange(8, 73),)
        answer = told(rule, seen, new)
        assert answer in (None, rule(*new)), (seen, new)
        right += answer is not None
    assert right < 200


def test_on_its_own_side_of_a_kink_a_length_is_told() -> None:
    def window(s: int) -> tuple[int, ...]:
        return s, min(s, 20)

    seen = lengths(10, 12, 15, 26, 35, 40)
    assert told(window, seen, (11,)) == (11, 11)
    assert told(window, seen, (33,)) == (33, 20)
    assert told(window, seen, (18,)) is None


def test_lengths_that_are_multiples_tell_multiples_alone() -> None:
    def padded(s: int) -> tuple[int, ...]:
        return (-(-s // 8) * 8,)

    seen = lengths(16, 64, 24)
    assert told(padded, seen, (40,)) == (40,)
    assert told(padded, seen, (41,)) is None


def test_another_kind_between_is_not_told() -> None:
    def long(s: int) -> int:
        return int(s > 20)

    seen = samples(lambda s: (s,), lengths(10, 13, 18, 23, 30, 38), long)
    assert interpolate(seen, (12,)) == (0, (12,))
    assert interpolate(seen, (27,)) == (1, (27,))
    assert interpolate(seen, (21,)) is None


def test_two_lengths() -> None:
    """An encoder's and a decoder's: once enough pairs were seen, all within their bounds are told."""

    def rule(b: int, s: int, t: int) -> tuple[int, ...]:
        return b, s, t, b * s, b * t, s + t, 8

    noise = random.Random(1)
    seen: list[Sample] = []
    recorded = 0
    for _ in range(200):
        new = (4, noise.randrange(20, 80), noise.randrange(20, 80))
        found = interpolate(seen, new)
        if found is None:
            recorded += 1
            seen += samples(rule, [new])
        else:
            assert found[1] == rule(*new)
    assert recorded < 30


def test_a_batch_size_of_its_own_is_a_line_of_its_own() -> None:
    def rule(b: int, s: int) -> tuple[int, ...]:
        return b, b * (s + 1), s

    seen = [(b, s) for b in (4, 3) for s in (10, 21, 40)]
    assert told(rule, seen, (4, 30)) == rule(4, 30)
    assert told(rule, seen, (3, 30)) == rule(3, 30)
    assert told(rule, seen, (2, 30)) is None


def test_what_two_sizes_explain_is_not_told() -> None:
    def rule(b: int, s: int) -> tuple[int, ...]:
        return (s,)

    assert told(rule, [(n, 10 + n) for n in range(2, 9)], (4, 15)) is None
