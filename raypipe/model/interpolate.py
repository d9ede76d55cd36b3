"""Sizes from sizes: what a tensor's dimensions are for a new batch, told from those for batches seen before.

A dimension is taken to be ``c + n * u`` with whole ``c`` and ``n``, where ``u`` is one of the batch's own sizes, a
product of two or a sum of two. That is believed only

    - between samples, on a line through at least three of them, so that a kink (``min(length, window)``) is seen;
    - where ``u`` is congruent to the samples' by the greatest common divisor of their distances, so that rounding (a
      stride of 2, padding to a multiple of 8) is seen, or does not matter here;
    - where every other line through the samples says the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, combinations_with_replacement
from math import gcd

__all__ = ["Sample", "interpolate"]

Sizes = tuple[int, ...]

_LEAST, _MOST_SIZES = 3, 4


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen: the sizes ``given``, the sizes ``found``, and the ``kind`` of everything that is no size."""

    given: Sizes
    found: Sizes
    kind: int


@dataclass(frozen=True, slots=True)
class _Feature:
    """Something that sizes may depend on: its values in the samples, and in the new batch."""

    seen: Sizes
    new: int

    @property
    def believed(self) -> bool:
        """Whether a line in it may be read at ``new``."""
        if self.new in self.seen:
            return True
        enough = len(set(self.seen)) >= _LEAST and min(self.seen) < self.new < max(self.seen)
        step = gcd(*(value - self.seen[0] for value in self.seen))
        return enough and (self.new - self.seen[0]) % step == 0


def interpolate(samples: Sequence[Sample], given: Sizes) -> tuple[int, Sizes] | None:
    """The kind and the sizes for ``given``, or None where the samples do not tell.

    Args:
        samples: all of as many given sizes; those of one kind of as many found ones.
        given: of the new batch.
    """
    for sample in samples:
        if sample.given == given:
            return sample.kind, sample.found
    for chosen in _neighbourhoods(samples, given):
        if len({sample.kind for sample in chosen}) == 1:
            found = _found(chosen, given)
            if found is not None:
                return chosen[0].kind, found
    return None


def _neighbourhoods(samples: Sequence[Sample], given: Sizes) -> Iterator[Sequence[Sample]]:
    """Sets of samples to draw lines through: all that differ in one size alone, the nearest of those, and all."""
    for column in _independent(samples, given):
        together = [n for n in range(len(given)) if _shift(samples, given, n) == _shift(samples, given, column)]
        others = [n for n in range(len(given)) if n not in together]
        line = [s for s in samples if all(s.given[n] == given[n] for n in others)]
        line.sort(key=lambda sample: sample.given[column])
        left = [s for s in line if s.given[column] < given[column]]
        right = [s for s in line if s.given[column] > given[column]]
        yield line
        # Beyond a kink another line holds: the nearest samples are on this side of it.
        yield left[-2:] + right[:2]
        yield left[-2:] + right[:1]
        yield left[-1:] + right[:2]
    yield samples


def _found(samples: Sequence[Sample], given: Sizes) -> Sizes | None:
    independent = _independent(samples, given)
    if len(samples) < (_LEAST if len(independent) < 2 else len(independent) + _LEAST):
        return None
    columns = {tuple(s.given[n] for s in samples): given[n] for n in range(len(given))}
    varying = [_Feature(seen, new) for seen, new in columns.items() if len({*seen, new}) > 1]
    if len(varying) > _MOST_SIZES or not all(feature.believed for feature in varying):
        return None
    features = [feature for feature in _features(varying) if len(set(feature.seen)) > 1]
    known: dict[Sizes, int] = {}
    for column in zip(*(sample.found for sample in samples), strict=True):
        if column not in known:
            size = _read(column, features)
            if size is None:
                return None
            known[column] = size
    return tuple(known[column] for column in zip(*(sample.found for sample in samples), strict=True))


def _features(sizes: Sequence[_Feature]) -> Iterator[_Feature]:
    yield from sizes
    for one, other in combinations_with_replacement(sizes, 2):
        yield _Feature(tuple(a * b for a, b in zip(one.seen, other.seen, strict=True)), one.new * other.new)
    for one, other in combinations(sizes, 2):
        yield _Feature(tuple(a + b for a, b in zip(one.seen, other.seen, strict=True)), one.new + other.new)


def _read(column: Sizes, features: Sequence[_Feature]) -> int | None:
    """The new size where all lines through the samples agree on it, and one of them is believed."""
    answers: set[Fraction] = set()
    believed = False
    for feature in features:
        first = feature.seen[0]
        other = next(n for n, value in enumerate(feature.seen) if value != first)
        slope = Fraction(column[other] - column[0], feature.seen[other] - first)
        if all(y - column[0] == slope * (u - first) for y, u in zip(column, feature.seen, strict=True)):
            answers.add(column[0] + slope * (feature.new - first))
            believed |= slope.denominator == 1 and feature.believed
    return int(answers.pop()) if believed and len(answers) == 1 else None


def _independent(samples: Sequence[Sample], given: Sizes) -> list[int]:
    """Of each set of sizes that vary together (a length, and labels that are one longer) the first."""
    shifts: dict[Sizes, int] = {}
    for column in range(len(given)):
        shift = _shift(samples, given, column)
        if any(shift):
            shifts.setdefault(shift, column)
    return list(shifts.values())


def _shift(samples: Sequence[Sample], given: Sizes, column: int) -> Sizes:
    return tuple(sample.given[column] - given[column] for sample in samples)
