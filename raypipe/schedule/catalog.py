"""The schedules that have a name, and what makes each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from .action import Programs
from .check import check_count
from .dualpipev import dualpipev
from .gpipe import gpipe
from .interleaved import interleaved_1f1b
from .interleaved_zb import interleaved_zb
from .looped_bfs import looped_bfs
from .one_f_one_b import one_f_one_b
from .schedule import Schedule
from .v_blocks import v_half, v_min
from .zbv import zbv
from .zero_bubble import zb_h1, zb_h2

__all__ = ["build", "chunks_of", "names"]

_ONE_CHUNK: Mapping[str, Callable[[int, int], Programs]] = MappingProxyType(
    {"1f1b": one_f_one_b, "gpipe": gpipe, "zb_h1": zb_h1, "zb_h2": zb_h2}
)
_IN_A_V: Mapping[str, Callable[[int, int], Programs]] = MappingProxyType(
    {"dualpipev": dualpipev, "v_half": v_half, "v_min": v_min, "zbv": zbv}
)
_ANY_CHUNKS: Mapping[str, Callable[[int, int, int], Programs]] = MappingProxyType(
    {"interleaved_1f1b": interleaved_1f1b, "interleaved_zb": interleaved_zb, "looped_bfs": looped_bfs}
)


def names() -> tuple[str, ...]:
    """The names that ``build`` knows, sorted."""
    return tuple(sorted({**_ONE_CHUNK, **_IN_A_V, **_ANY_CHUNKS}))


def chunks_of(name: str, chunks: int | None = None) -> int:
    """How many chunks a stage holds in the schedule of this name.

    Args:
        name: one of ``names()``.
        chunks: chunks a stage; without it the schedule's own number: 1, or 2 where it interleaves or is a V.

    Raises:
        TypeError: ``chunks`` is no int.
        ValueError: an unknown name, or a number of chunks that the schedule does not hold.
    """
    if name not in names():
        raise ValueError(f"the schedule {name!r} is not known; choose one of {', '.join(names())}")
    own, word = (1, "one chunk") if name in _ONE_CHUNK else (2, "two chunks")
    if chunks is None:
        return own
    check_count("chunks", chunks)
    if chunks != own and name not in _ANY_CHUNKS:
        raise ValueError(f"chunks is {chunks}, but the schedule {name!r} holds {word} a stage; leave chunks out")
    return chunks


def build(name: str, stages: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule of this name.

    Args:
        name: one of ``names()``.
        stages: pipeline stages, at least 1.
        microbatches: microbatches a step, at least 1; every schedule takes any number.
        chunks: chunks a stage; without it the schedule's own number, see ``chunks_of``.

    Raises:
        TypeError: a number that is no int.
        ValueError: an unknown name, a number below 1, or a number of chunks that the schedule does not hold.
    """
    held = chunks_of(name, chunks)
    check_count("stages", stages)
    check_count("microbatches", microbatches)
    if name in _ANY_CHUNKS:
        programs = _ANY_CHUNKS[name](stages, microbatches, held)
    else:
        programs = {**_ONE_CHUNK, **_IN_A_V}[name](stages, microbatches)
    return Schedule(name, programs, microbatches)
