"""Whether a split unit computes what the whole one does: tried once, on the first batch, before anything is trained.

A plan can be wrong in silence: a fused layer whose columns are queries, keys and values, a forward that counts with the
whole number of heads, a norm of split activations, dropout whose masks are the ranks' own. The first call of one unit
of each kind is run whole too, forward and backward, and every result compared.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, Replicate
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from raypipe.errors import CutError, PeerLost
from raypipe.parallel.group import TensorGroup

__all__ = ["Trial", "compare"]

_Results = dict[str, Tensor]


class Trial:
    """Tries each kind of unit at its first call that can be trained on.

    Args:
        units: still whole, by name.

    Attributes: ``waiting``, names of the units that are still to be tried.
    """

    def __init__(self, units: Mapping[str, nn.Module]) -> None:
        kinds: dict[Any, str] = {}
        for name, unit in units.items():
            kinds.setdefault((type(unit).__module__, type(unit).__qualname__, repr(unit)), name)
        # Copies of the weights, of one unit of each kind, until it is tried.
        self._whole = {name: copy.deepcopy(units[name]) for name in kinds.values()}
        self._handles: dict[str, RemovableHandle] = {}

    @property
    def waiting(self) -> tuple[str, ...]:
        """Names of the units that are still to be tried."""
        return tuple(self._whole)

    def watch(self, units: Mapping[str, nn.Module], group: TensorGroup, summed: Collection[str] = ()) -> None:
        """Waits for the first calls of the units, which are split now.

        Args:
            units: by name.
            group: that shares them.
            summed: names, in the whole model, of parameters whose gradients are parts of a sum.
        """
        for name in self._whole:
            inside = {each.removeprefix(f"{name}.") for each in summed if each.startswith(f"{name}.")}
            hook = functools.partial(self._try, name, group, inside)
            self._handles[name] = units[name].register_forward_pre_hook(hook, prepend=True, with_kwargs=True)

    def stop(self) -> None:
        """Lets go of units that were never called here."""
        for handle in self._handles.values():
            handle.remove()
        self._whole, self._handles = {}, {}

    def _try(
        self,
        name: str,
        group: TensorGroup,
        summed: Collection[str],
        unit: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if not torch.is_grad_enabled() or name not in self._whole:
            return
        self._handles.pop(name).remove()
        whole = self._whole.pop(name)
        found = compare(unit, whole, args, kwargs, group, summed)
        if found:
            raise CutError(
                f"{name}, split among {group.size} ranks by tensor_parallel_plan, does not compute what it does whole: "
                f"{found}; leave what does not split so (a fused layer, sizes that its forward takes for whole, "
                "dropout between a ColwiseParallel and its RowwiseParallel) out of tensor_parallel_plan"
            )


def compare(
    split: nn.Module,
    whole: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    group: TensorGroup,
    summed: Collection[str] = (),
) -> str | None:
    """Runs both, forward and backward, from the same random state; says what differs, the same on all ranks.

    Differences count from the square root of the data type's precision on: rounding is far below it, a wrong slice
    far above.
    """
    wanted = _results(whole, args, kwargs, group, ())
    try:
        got = _results(split, args, kwargs, group, summed)
    except (PeerLost, CutError):
        raise
    except Exception as error:  # the same on all ranks, which run the same
        return f"its forward or backward fails ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    biggest = max((_rms(each) for name, each in wanted.items() if name.startswith("gradient")), default=0.0)
    wrong = [name for name in wanted if _differs(got.get(name), wanted[name], biggest)]
    first = torch.tensor([float(len(wanted) - list(wanted).index(wrong[0]) if wrong else 0)])
    group.most(first)
    return f"another {list(wanted)[len(wanted) - int(first)]}" if first else None


def _results(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], group: TensorGroup, summed: Collection[str]
) -> _Results:
    """Outputs, and gradients of inputs and parameters for a random gradient of the outputs; whole, by name."""
    args, kwargs = pytree.tree_map_only(Tensor, _leaf, (args, dict(kwargs)))
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    state = torch.default_generator.get_state()
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    try:
        # Modes of the caller (a backward in halves, a checkpoint) have no business here.
        with torch.enable_grad(), torch._C.DisableTorchFunction(), saved_tensors_hooks(_same, _same):
            outputs = nn.Module.__call__(module, *args, **kwargs)
            made = [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.is_floating_point()]
            # One that is a DTensor still cannot leave the unit: it counts as missing.
            results = {f"output {n}": o.detach() for n, o in enumerate(made) if not isinstance(o, DTensor)}
            roots = [o for o in made if o.requires_grad and not isinstance(o, DTensor)]
            noise = torch.Generator().manual_seed(0)
            shares = [torch.randn(r.shape, generator=noise, dtype=torch.float64).to(r.dtype) for r in roots]
            leaves = [*inputs, *named.values()]
            found = torch.autograd.grad(roots, leaves, shares, allow_unused=True) if roots and leaves else ()
    finally:
        torch.default_generator.set_state(state)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    names = [*(f"input {number}" for number in range(len(inputs))), *named]
    for name, gradient in zip(names, found, strict=False):
        if gradient is not None:
            gradient = _whole(gradient.detach()).clone()
            if name in summed:
                group.sum(gradient)
            results[f"gradient of {name}"] = gradient
    return results


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _leaf(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return copied.requires_grad_(tensor.requires_grad) if copied.is_floating_point() else copied


def _whole(tensor: Tensor) -> Tensor:
    return tensor.redistribute(placements=[Replicate()]).to_local() if isinstance(tensor, DTensor) else tensor


def _differs(got: Tensor | None, wanted: Tensor, biggest: float) -> bool:
    if got is None or got.shape != wanted.shape:
        return True
    both_nan = torch.isnan(got) & torch.isnan(wanted)
    difference = torch.where(both_nan, 0.0, (got - wanted).double())
    # A gradient that is zero but for rounding (a key's bias under softmax) has no size of its own to compare with.
    eps = torch.finfo(wanted.dtype).eps
    if torch.is_autocast_enabled(wanted.device.type):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(wanted.device.type)).eps)
    bound = eps**0.5 * max(_rms(wanted), 1e-2 * biggest, 1e-30)
    return not _rms(difference) <= bound


def _rms(tensor: Tensor) -> float:
    return float(torch.nan_to_num(tensor.double(), nan=0.0).square().mean().sqrt()) if tensor.numel() else 0.0
