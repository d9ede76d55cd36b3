"""What one rank asks of its node; checked without Ray, before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["check_resources"]


def check_resources(given: Mapping[str, float] | None) -> dict[str, float] | None:
    """The user's ``resources_per_stage``, checked.

    Raises:
        TypeError: it is no dict of names and numbers.
        ValueError: a number is not positive, or more than one GPU is asked for in fractions.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(f"resources_per_stage is {given!r}, but it is a dict such as {{'GPU': 1}}")
    if not given:
        raise ValueError("resources_per_stage is empty; name at least one resource, such as {'CPU': 1}")
    for name, amount in given.items():
        if not isinstance(name, str) or isinstance(amount, bool) or not isinstance(amount, int | float):
            raise TypeError(
                f"resources_per_stage has {name!r}: {amount!r}, but it maps names to numbers, such as {{'GPU': 0.25}}"
            )
        if not amount > 0 or math.isinf(amount):
            raise ValueError(f"resources_per_stage has {name!r}: {amount}, but an amount is a number above 0")
        if name == "GPU" and amount > 1 and amount != int(amount):
            raise ValueError(f"resources_per_stage has 'GPU': {amount}, but above 1 only whole GPUs can be given")
    return dict(given)
