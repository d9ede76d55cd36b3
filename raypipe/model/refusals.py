"""The sentences with which a recording refuses a model: what stands in the way, both its ends, and what to do."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from raypipe.errors import CutError

__all__ = [
    "asks_for_data",
    "changes_argument",
    "changes_buffer",
    "changes_parameter",
    "changes_view",
    "draws_in_checkpoint",
    "foreign_buffer",
    "hidden",
    "inside_function",
    "lasting",
]


def asks_for_data(line: str, name: str, what: str) -> str:
    """Data of a value, which one stage alone has. A sentence, since the end of a forward may do that."""
    return (
        f"{line} asks {what} for its data ({name}), but only one stage has that; put the code into a module that is a "
        "unit (units=[...]), or decide on the batch instead"
    )


def hidden(tensor: Tensor, maker: str, user: str, line: str) -> tuple[str, str]:
    """A value that leaves its unit by another way than being returned: what a cut would part, and what to do."""
    return (
        f"a {tensor.dtype} tensor {tuple(tensor.shape)}, made inside {maker} and not returned by it (an object that "
        f"others share kept it), from {user} at {line}, which uses it",
        "return it from the unit, or let a hook or an attribute of a module in the unit keep it",
    )


def changes_argument(unit: str, line: str) -> NoReturn:
    """A list or dict that a unit adds to."""
    raise CutError(
        f"{unit}, called at {line}, changes a list or dict that it was given, and another stage's would stay as it "
        "was; return what it adds, or make both ends one unit with units=[...]"
    )


def changes_view(name: str, line: str) -> NoReturn:
    """A value that is written into memory which other tensors show too."""
    raise CutError(
        f"{name} at {line} writes a value into a view of another tensor, or reads one whose memory a value was written "
        "into through another; write into the tensor itself (buffer[:, i] = x) and read it from there"
    )


def changes_buffer(buffer: str, name: str, line: str) -> NoReturn:
    """Running statistics outside of units."""
    raise CutError(
        f"{name} at {line} changes the buffer {buffer} outside of every unit by a value that only one stage has; move "
        "it into a module that is a unit (units=[...])"
    )


def changes_parameter(name: str, line: str) -> NoReturn:
    """A parameter that is clamped in the forward, on one of its holders."""
    raise CutError(
        f"{name} at {line} changes a parameter or a buffer in place outside of its unit, but several stages may hold a "
        "copy; change it inside its own module, or compute with a changed copy"
    )


def foreign_buffer(buffer: str, user: str, line: str) -> NoReturn:
    """A unit's buffer that is read from outside."""
    raise CutError(
        f"{user} at {line} reads the buffer {buffer} outside of its unit, but only the unit's stage has it; compute "
        "with it inside of its own module, or make both ends one unit with units=[...]"
    )


def inside_function(function: str | None, name: str, line: str) -> tuple[str, str]:
    """What an ``autograd.Function`` does with a value has one backward: what a cut would part, and what to do."""
    if function == "CheckpointFunction":
        return (
            f"{name} at {line} from what follows it: it runs inside torch.utils.checkpoint with use_reentrant=True, "
            "which hides the graph",
            "use use_reentrant=False, or checkpoint inside of the unit",
        )
    return (
        f"{name} at {line} from what follows it: it runs inside the autograd function {function}, applied outside of "
        "every unit, whose own backward cannot be cut",
        "apply it inside a module that is a unit (units=[...])",
    )


def lasting(name: str, what: str, line: str) -> NoReturn:
    """A hook on a gradient, a gradient inside the forward."""
    does = "assigns to an attribute of" if name == "__set__" else f"calls {name} on"
    raise CutError(
        f"{line} {does} {what} outside of every unit, where a stage sees a part of the graph only; do it inside a "
        "module that is a unit (units=[...])"
    )


def draws_in_checkpoint(name: str, line: str) -> NoReturn:
    """Random numbers that a recomputation could not draw again."""
    raise CutError(
        f"{name} at {line} draws random numbers inside torch.utils.checkpoint, but outside of every unit, where its "
        "second run would draw others; move it into a unit, or out of the checkpointed part"
    )
