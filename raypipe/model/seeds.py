"""Randomness that depends on the run, the microbatch and the place in the model, and not on where the model is cut.

The seed goes from event to event as a chain: what draws random numbers runs under a seed made from the one before, and
another is made from that one afterwards, whether it ran here or not. Since the chain lives in the generator itself,
``torch.utils.checkpoint``, which restores the generator's state, replays it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = ["Seeds", "kept_state", "pass_by", "run_keyed", "run_under"]

T = TypeVar("T")
_MASK = (1 << 64) - 1
_INSIDE, _AFTER = 1, 2


@dataclass(frozen=True, slots=True)
class Seeds:
    """The key of all randomness of one microbatch.

    Attributes: ``seed`` of the run; ``step``; ``sample``, number of the microbatch's first sample in the whole batch.
    """

    seed: int
    step: int
    sample: int

    def start(self) -> None:
        """Seeds PyTorch's generators for the start of the forward."""
        state = 0
        for part in (self.seed, self.step, self.sample):
            state = _mixed(state + part)
        _seed(state)


def run_keyed(call: Callable[[], T]) -> T:
    """Runs ``call`` under its link of the chain, and goes on to the next."""
    before = torch.default_generator.initial_seed()
    _seed(_mixed(before + _INSIDE))
    result = call()
    _seed(_mixed(before + _AFTER))
    return result


def run_under(link: int, call: Callable[[], T]) -> T:
    """Runs ``call`` once more under the link that was there when it ran; the generators stay as they are."""
    with kept_state():
        _seed(link)
        return call()


def pass_by() -> None:
    """Goes on to the link that ``run_keyed`` would leave."""
    _seed(_mixed(torch.default_generator.initial_seed() + _AFTER))


@contextmanager
def kept_state() -> Iterator[None]:
    """Gives the caller's generators back as they were."""
    generators = _generators()
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _mixed(state: int) -> int:
    """A step of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), without the sign bit."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return (state ^ (state >> 31)) >> 1


def _seed(seed: int) -> None:
    for generator in _generators():
        generator.manual_seed(seed)


def _generators() -> tuple[torch.Generator, ...]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return (torch.default_generator,)
    return torch.default_generator, torch.cuda.default_generators[torch.cuda.current_device()]
