"""Builds a model without its weights: the user's callable runs once on fake tensors, and what it does to them is kept.

Every operation that makes or changes a tensor is logged, so that any one tensor can be made later, anywhere, from the
operations that it depends on (``recipes``). The idea is that of torchdistx's ``deferred_init``. Here each operation
that draws has a seed of its own, so that weights do not depend on which process makes them, nor in which order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from raypipe.model.functions import function_name
from raypipe.model.recipes import Constant, Recipe, Step, View, seed_of

__all__ = ["Deferral"]

_OVERWRITES = frozenset(["copy_", "exponential_", "fill_", "log_normal_", "normal_", "uniform_", "zero_"])
"""They leave nothing of what was there before."""

_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


class Deferral(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Logs what is done to tensors, which are fake.

    Args:
        seed: of all that is drawn.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._drawn = seed, 0
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._steps: list[Step] = []
        self._writers: dict[int, list[int]] = {}
        # Memories are told apart by address: none may be freed meanwhile. They are fake and hold no data.
        self._numbers: dict[int, int] = {}
        self._kept: list[torch.UntypedStorage] = []

    def run(self, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns, with fake tensors."""
        with self, _Functions(self):
            return make()

    def recipe(self, tensor: Tensor) -> Recipe:
        """What makes a tensor as it is now.

        Raises:
            ValueError: its values came from somewhere that was not seen.
        """
        if not isinstance(tensor, FakeTensor):
            return Recipe((), Constant(tensor.detach().clone()))
        target = self._view(tensor)
        needed, there = {target.memory}, {target.memory}  # with its values; or only as memory to be overwritten
        steps: list[Step] = []
        waiting = set(self._writers.get(target.memory, ()))
        while waiting:
            number = max(waiting)
            waiting.discard(number)
            step = self._steps[number]
            if not ((step.makes | step.writes) & needed or step.makes & there):
                continue  # what it wrote was overwritten before anything read it
            steps.append(step)
            needed = (needed - step.makes - (step.writes - step.reads)) | step.reads
            there = (there - step.makes) | step.reads | step.writes
            for memory in step.reads | step.writes:
                waiting.update(n for n in self._writers.get(memory, ()) if n < number)
        if there:
            raise ValueError(
                "the model's callable makes a tensor whose values do not come from PyTorch's functions (torch.load?); "
                "build the model without weights, and load them by raypipe.from_pretrained"
            )
        return Recipe(tuple(reversed(steps)), target)

    def make(self, tensor: Tensor) -> Tensor:
        """The real tensor."""
        return self.recipe(tensor).make()

    def copy_without(self, model: nn.Module, replaced: dict[int, Tensor]) -> nn.Module:
        """A copy of the model with some tensors replaced, by ``id``, and every other fake made real."""
        with _Copies(self):
            return copy.deepcopy(model, dict(replaced))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in _written(func, args, kwargs) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default or any(not isinstance(t, FakeTensor) for t in written):
            return self._real(func, args, kwargs)
        views = {id(t): self._view(t) if isinstance(t, FakeTensor) else Constant(t.detach().clone()) for t in given}
        try:
            with self._fakes:
                result = func(*args, **kwargs)
        except _NEEDS_DATA:
            result = pytree.tree_map_only(Tensor, self._faked, self._real(func, args, kwargs))
        # The converter's weak references would forbid Module.to(dtype), which swaps tensors.
        self._fakes.fake_tensor_converter.meta_converter.tensor_memo.clear()
        if func.overloadpacket.__name__ not in ("set_", "resize_"):
            self._log(func, args, kwargs, views, written, result)
        return result

    def _log(
        self, func: Any, args: Any, kwargs: Any, views: dict[int, View | Constant], written: list[Tensor], result: Any
    ) -> None:
        sources = {view.memory for view in views.values() if isinstance(view, View)}
        outputs = tuple(self._view(t) if isinstance(t, FakeTensor) else None for t in pytree.tree_leaves(result))
        makes = frozenset(view.memory for view in outputs if view is not None) - sources
        writes = frozenset(self._view(t).memory for t in written)
        if not makes and not writes:
            return  # a view, or a question
        name, seed, reads = func.overloadpacket.__name__, None, frozenset(sources)
        if torch.Tag.nondeterministic_seeded in func.tags:
            seed, self._drawn = seed_of(self._seed, self._drawn), self._drawn + 1
        if name in _OVERWRITES and _is_whole(written[0]):
            others = {views[id(t)].memory for t in pytree.tree_leaves((args[1:], kwargs)) if isinstance(t, FakeTensor)}  # type: ignore[union-attr]
            reads = frozenset(others)
        own = pytree.tree_map(lambda leaf: _plain(leaf, views), (args, kwargs))
        for memory in makes | writes:
            self._writers.setdefault(memory, []).append(len(self._steps))
        self._steps.append(
            Step((func.namespace, name, func._overloadname), own[0], own[1], outputs, makes, writes, reads, seed)
        )

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation that must be known now on real tensors."""
        own = pytree.tree_map_only(FakeTensor, self.make, (args, kwargs))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self._seed, self._drawn))
            self._drawn += torch.Tag.nondeterministic_seeded in func.tags
            return func(*own[0], **own[1])

    def _faked(self, tensor: Tensor) -> Tensor:
        with self._fakes:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def _view(self, tensor: Tensor) -> View:
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage._cdata)
        if number is None:
            number = self._numbers[storage._cdata] = len(self._kept)
            self._kept.append(storage)
        return View(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


class _Functions(TorchFunctionMode):
    """What PyTorch cannot do with a fake tensor."""

    def __init__(self, deferral: Deferral) -> None:
        super().__init__()
        self._deferral = deferral

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if func is Tensor.__deepcopy__:
                return _copied(args[0], args[1])
            if func is Tensor.tolist:
                return self._deferral.make(args[0]).tolist()
            if function_name(func) in ("numpy", "__array__"):
                array = self._deferral.make(args[0]).numpy()
                array.flags.writeable = False  # a change would not reach the tensor
                return array
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """A deep copy of a fake tensor is the real one."""

    def __init__(self, deferral: Deferral) -> None:
        super().__init__()
        self._deferral = deferral

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and isinstance(args[0], FakeTensor) and args[0].is_leaf:
            fake, memo = args
            if id(fake) not in memo:
                memo[id(fake)] = self._deferral.make(fake).requires_grad_(fake.requires_grad)
            return memo[id(fake)]
        return func(*args, **(kwargs or {}))


def _copied(fake: FakeTensor, memo: dict[int, Any]) -> Tensor:
    if id(fake) not in memo:
        with torch.no_grad():
            new: Tensor = fake.detach().clone()
        if isinstance(fake, nn.Parameter):
            new = nn.Parameter(new, requires_grad=fake.requires_grad)
        memo[id(fake)] = new.requires_grad_(fake.requires_grad)
    return memo[id(fake)]  # type: ignore[no-any-return]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation changes."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += pytree.tree_leaves(value)
    return found


def _is_whole(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _plain(leaf: Any, views: dict[int, View | Constant]) -> Any:
    if isinstance(leaf, Tensor):
        return views[id(leaf)]
    return None if isinstance(leaf, torch.Generator) else leaf
