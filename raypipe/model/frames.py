"""What the interpreter's stack tells about the place of an event: the user's line, and what it runs inside of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from torch.autograd import Function

__all__ = ["Place", "place", "user_line"]

_NOT_THE_USERS = ("torch", "raypipe", "contextlib")
_APPLY = Function.apply.__func__.__code__  # type: ignore[attr-defined]  # a classmethod that calls C++


@dataclass(frozen=True, slots=True)
class Place:
    """Where an event is.

    Attributes: ``line`` of the user's code; ``function``, the ``autograd.Function`` whose forward it runs in, or None;
    ``region``, the frame of ``torch.utils.checkpoint.checkpoint`` that it runs in, or None.
    """

    line: str
    function: str | None
    region: FrameType | None


def place() -> Place:
    """The place of the code that runs now, looked up from here to the recording's own frame."""
    function: str | None = None
    region: FrameType | None = None
    for frame in _frames():
        name = frame.f_globals.get("__name__", "")
        if name == "raypipe.model.record" and frame.f_code.co_name == "record":
            break
        if frame.f_code is _APPLY:
            function = frame.f_locals["cls"].__name__
        elif name == "torch.utils.checkpoint" and frame.f_code.co_name == "checkpoint":
            region = frame
    return Place(user_line(), function, region)


def user_line() -> str:
    """The innermost line of code that is neither PyTorch's nor ours."""
    for frame in _frames():
        if frame.f_globals.get("__name__", "").split(".")[0] not in _NOT_THE_USERS:
            return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
    return "an unknown line"


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
