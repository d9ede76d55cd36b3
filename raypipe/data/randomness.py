"""Random numbers that belong to one reader of data.

User code that makes batches draws from the process's global generators (a sampler's shuffle, an augmentation). So does
the model's dropout where stages run in the same process. Neither may depend on the other, and a resumed epoch must
draw what the undisturbed one drew: so the data has states of its own, which are in place only while it is read.
"""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

__all__ = ["Randomness", "mixed_seed"]


def mixed_seed(*parts: int) -> int:
    """One 64-bit seed from several numbers that are not negative."""
    return int(numpy.random.SeedSequence(parts).generate_state(1, numpy.uint64)[0])


class Randomness:
    """The global generators of PyTorch (CPU), NumPy and Python as one epoch's reader has them.

    Inside a ``with`` block they go on where the last block left them; outside they are as they were.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        word = mixed_seed(seed, epoch)
        self._inner: tuple[Any, ...] = (
            torch.Generator().manual_seed(word).get_state(),
            numpy.random.RandomState(word % 2**32).get_state(),
            random.Random(word).getstate(),
        )
        self._outer: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self._outer = _read()
        _write(self._inner)

    def __exit__(self, *_: object) -> None:
        self._inner = _read()
        _write(self._outer)


def _read() -> tuple[Any, ...]:
    return torch.get_rng_state(), numpy.random.get_state(), random.getstate()


def _write(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    numpy.random.set_state(states[1])
    random.setstate(states[2])
