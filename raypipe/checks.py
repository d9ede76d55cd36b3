"""What a plan refuses beside the cut itself: what would train something else in silence."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import cloudpickle
import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raypipe.errors import CutError
from raypipe.model.partition import Partition
from raypipe.options import Options
from raypipe.schedule import Action, Op, Schedule
from raypipe.stage.optimizer import StageOptimizer
from raypipe.stage.spec import Gradients

__all__ = [
    "Changes",
    "refuse_changing_buffers",
    "refuse_foreign_random_numbers",
    "refuse_out_of_order",
    "refuse_parameters_in_functions",
    "refuse_untrainable",
    "try_optimizers",
]


class Changes:
    """Which buffers of a module its forward changes in place.

    Args:
        module: before the forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self._versions = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}

    def names(self) -> list[str]:
        """Those that were changed since."""
        return [name for name, (buffer, version) in self._versions.items() if buffer._version != version]


def refuse_changing_buffers(
    changed: Sequence[str],
    options: Options,
    unit_buffers: Mapping[str, Sequence[str]],
    cut: Partition,
    schedule: Schedule,
) -> None:
    """Refuses buffers that would be changed once a microbatch, or on one of two stages.

    Args:
        changed: names of the buffers that a forward in train mode changes.
        options: of the trainer.
        unit_buffers: names of each unit's buffers.
        cut: of the model.
        schedule: that the model is cut for.

    Raises:
        ValueError: a step's several microbatches would each change one, and ``batch_norm`` does not accept that; or
            the schedule would change it in another order, or replicas each by its own share.
        CutError: one that is changed is held by two chunks.
    """
    if changed and options.data_parallel > 1:
        raise ValueError(
            f"the forward changes the buffer {changed[0]}, which each replica would change by its own share of a "
            "batch; use data_parallel=1, or freeze it by .eval()"
        )
    if changed and options.most_microbatches > 1 and options.batch_norm != "microbatch":
        raise ValueError(
            f"the forward changes the buffer {changed[0]}, which several microbatches would do several times a step; "
            "use microbatches=1, or give batch_norm='microbatch' to accept a microbatch's own changes"
        )
    refuse_out_of_order(changed, schedule)
    for unit, names in unit_buffers.items():
        chunks = [number for number, chunk in enumerate(cut.chunks) if unit in chunk.units]
        inside = [name for name in names if name in changed]
        if len(chunks) > 1 and inside:
            raise CutError(
                f"{unit} is called in chunks {chunks} and changes its buffer {inside[0]}, which would differ between "
                "them; keep its calls in one chunk with balance=[...]"
            )
        readers = [number for number, chunk in enumerate(cut.chunks) if set(inside).intersection(chunk.buffers)]
        if readers and readers != chunks:
            raise CutError(
                f"chunk {readers[0]} reads the buffer {inside[0]} outside of {unit}, which changes it in chunk "
                f"{chunks[0]}; keep both in one chunk with balance=[...], or make both ends one unit with units=[...]"
            )


def refuse_out_of_order(changed: Sequence[str], schedule: Schedule) -> None:
    """Refuses forwards out of microbatch order where buffers are changed by them.

    Args:
        changed: names of the buffers that a forward in train mode changes.
        schedule: of one number of microbatches.

    Raises:
        ValueError: a forward runs before that of an earlier microbatch through the same chunk.
    """
    if changed and (early := _out_of_order(schedule)) is not None:
        raise ValueError(
            f"the forward changes the buffer {changed[0]}, but schedule {schedule.name!r} runs {early} before the "
            "forward of an earlier microbatch, so the buffer would end differently than in order; run each chunk's "
            "forwards in microbatch order"
        )


def _out_of_order(schedule: Schedule) -> Action | None:
    """The first forward that runs before one of an earlier microbatch through the same chunk."""
    for program in schedule.programs:
        due = dict.fromkeys((action.chunk for action in program), 0)
        for action in program:
            if action.op is Op.FORWARD:
                if action.microbatch != due[action.chunk]:
                    return action
                due[action.chunk] += 1
    return None


@contextmanager
def refuse_foreign_random_numbers() -> Iterator[None]:
    """Around a forward: refuses one that draws from Python's or NumPy's generator.

    Raises:
        CutError: it did; stages run that code again, each with draws of its own.
    """
    before = random.getstate(), numpy.random.get_state(legacy=False)
    yield
    after = random.getstate(), numpy.random.get_state(legacy=False)
    moved = [name for name, b, a in zip(("random", "numpy.random"), before, after, strict=True) if str(b) != str(a)]
    if moved:
        raise CutError(
            f"the model's forward draws from {moved[0]}, and every stage that runs it again would draw other numbers; "
            "draw with torch (torch.rand), which is keyed by step and sample"
        )


def refuse_parameters_in_functions(options: Options) -> None:
    """Refuses functions that carry trainable parameters along: no stage would train them, nor see the model's change.

    Raises:
        ValueError: one does; the sentence names it.
    """
    functions: dict[str, Any] = {name: getattr(options, name) for name in ("loss", "forward", "microbatch_weight")}
    functions.update((f"metrics[{name!r}]", metric) for name, metric in options.metrics.items())
    for name, function in functions.items():
        try:
            _Finder(io.BytesIO()).dump(function)
        except _FoundError:
            raise ValueError(
                f"{name} refers to a parameter that requires a gradient, but stages hold copies and do not train it; "
                "compute with the model's outputs alone, make it a part of the model, or freeze it by "
                "requires_grad_(False)"
            ) from None
        except Exception:  # what cannot be pickled is refused, by name, where it has to be
            continue


def refuse_untrainable(model: nn.Module) -> None:
    """Refuses a model of which nothing is trained, and hooks on the gradients of single parameters.

    Stages hold copies of parameters, which PyTorch makes without their hooks; and a hook would see the gradient of
    each microbatch instead of the batch's.

    Raises:
        ValueError: no parameter requires a gradient, or one has such a hook.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model requires a gradient, so there is nothing to train; call requires_grad_(True) on "
            "the part to train, or use predict"
        )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a hook on its gradient, which would run once a microbatch and not once a batch; remove it "
                "and let optimizer return one that changes gradients in its step, or mask the weight in the forward"
            )


class _FoundError(Exception):
    pass


class _Finder(cloudpickle.Pickler):  # type: ignore[misc]
    """Stops at the first parameter that is to be trained."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, nn.Parameter) and obj.requires_grad:
            raise _FoundError
        if isinstance(obj, Tensor):  # its data is of no interest
            return torch.Size, ((),)
        return super().reducer_override(obj)


def try_optimizers(
    options: Options, gradients: Gradients, held: Sequence[tuple[int, Mapping[str, nn.Parameter]]]
) -> None:
    """Makes each rank's optimizer once on stand-ins, so that one that cannot be used is refused before anything starts.

    Args:
        options: of the trainer.
        gradients: whose gradients are whose.
        held: ranks with their parameters by name.

    Raises:
        TypeError: it is of a kind that cannot be split.
        ValueError: it works on other parameters than it was given. An exception of the user's code comes as itself.
    """
    for rank, parameters in held:
        tried = None
        # It may read data; or its fault is its own, which ordinary tensors show in its own words.
        with suppress(Exception):
            tried = _tried(rank, parameters, gradients, options, _fake)
        own, made = tried or _tried(rank, parameters, gradients, options, _stand_in)
        given = {id(parameter) for parameter in own.values()}
        groups = made.param_groups if made is not None else []
        if any(id(parameter) not in given for group in groups for parameter in group["params"]):
            raise ValueError(
                "optimizer(named_parameters) made an optimizer of other parameters than it was given, so a stage would "
                "not train its own; use its argument, as in lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)"
            )


def _tried(
    rank: int,
    parameters: Mapping[str, nn.Parameter],
    gradients: Gradients,
    options: Options,
    stand_in: Callable[[nn.Parameter], nn.Parameter],
) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer | None]:
    own = {name: stand_in(parameter) for name, parameter in parameters.items()}
    makers, sharded = (options.optimizer, options.lr_scheduler), options.shard == "optimizer"
    return own, StageOptimizer(rank, own, gradients, *makers, None, None, sharded=sharded).optimizer


def _fake(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter without memory, and state made like it has none either: Adagrad makes its own at once."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        empty = torch.empty(tuple(parameter.shape), dtype=parameter.dtype, device=parameter.device)
        return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape, dtype and device on one element of memory."""
    empty = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
