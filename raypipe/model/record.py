"""Records a forward on a model's fake twin.

Units run on fake tensors; the code between them runs for real as long as it touches no value, so that masks may be asked
for what they hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from raypipe.errors import CutError
from raypipe.model.intercept import Watch, at_path, tensors_in
from raypipe.model.recording import Constant, Event, Mutation, New, Path, Recording, Same, Value
from raypipe.model.twin import Twin
from raypipe.tensors import TensorSpec

__all__ = ["changes_in_place", "function_name", "record"]

READS = frozenset(
    ["__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__", "item", "tolist", "numpy", "equal", "allclose", "is_nonzero"]
)
CANNOT_BE_FAKED = (
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.UnsupportedOperatorException,
)


def record(twin: Twin, forward: Callable[[Any], Any], *, count_flops: bool = False) -> Recording:
    """Runs ``forward(twin.model)`` and returns its events.

    Args:
        twin: the fake model, in the modes (train, eval) that the run will have.
        forward: calls the model on one microbatch; it may change that microbatch in place.
        count_flops: also count each event's floating point operations (PyTorch's ``FlopCounterMode``).

    Raises:
        CutError: the model does something that no split reproduces: control flow on a value, a value that leaves a unit
            without being returned.
    """
    recorder = _Recorder(twin)
    with ExitStack() as stack:
        if count_flops:
            recorder.flops = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(twin.switch.on(recorder))
        outputs = forward(twin.model)
    return recorder.finish(outputs)


def function_name(func: Any) -> str:
    """A torch function's name; a property's (``Tensor.T``) is that of the property."""
    name: str = getattr(func, "__name__", type(func).__name__)
    return func.__self__.__name__ if name == "__get__" else name


class _Recorder(Watch):
    def __init__(self, twin: Twin) -> None:
        super().__init__(twin.parameters)
        self.twin = twin
        self.recording = Recording()
        self.flops: FlopCounterMode | None = None
        self.calls = 0
        self.nested: list[str] = []
        self.storages: dict[int, int] = {}
        self.keep: list[Tensor] = []  # storages are told apart by address: none may be freed meanwhile

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.off():
            return self._unit_call(name, call, args, kwargs)

    def _unit_call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = dict(tensors_in((args, kwargs)))
        uses, parameters = self._sources(found, name)
        fakes = {id(t): self.twin.fake(t) for t in found.values() if not self.twin.is_fake(t)}
        self.nested, before = [], self._total_flops()
        fake_args, fake_kwargs = pytree.tree_map_only(Tensor, lambda t: fakes.get(id(t), t), (args, kwargs))
        versions = {path: at_path((fake_args, fake_kwargs), path)._version for path in found}
        try:
            with self.twin.mode:
                result = call(*fake_args, **fake_kwargs)
        except CANNOT_BE_FAKED:
            result = self._like_first(name, list(found.values()))
        for path, tensor in found.items():  # a real argument that the unit changes is a value from now on
            if id(tensor) in fakes and fakes[id(tensor)]._version != versions[path]:
                torch.utils.swap_tensors(tensor, fakes[id(tensor)])
        real = {id(fakes[id(tensor)]): tensor for tensor in found.values() if id(tensor) in fakes}
        result = pytree.tree_map_only(Tensor, lambda t: real.get(id(t), t), result)
        nested = [parameter for unit in self.nested for parameter in self.twin.unit_parameters[unit]]
        self.calls += 1
        return self._add(
            name, self.calls - 1, uses, (*parameters, *nested), found, versions, result, self._total_flops() - before
        )

    def nested_call(self, name: str) -> None:
        self.nested.append(name)

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = function_name(func)
        found = dict(tensors_in((args, kwargs)))
        uses, parameters = self._sources(found, name)
        if name in READS:
            self._refuse_read(name, uses, parameters)
        if changes_in_place(name, kwargs):
            target = kwargs.get("out", args[0] if args else None)
            if isinstance(target, Tensor) and not self.twin.is_fake(target):
                torch.utils.swap_tensors(target, self.twin.fake(target))
        versions = {path: tensor._version for path, tensor in found.items()}
        before = self._total_flops()
        try:
            result = func(*args, **kwargs)
        except CANNOT_BE_FAKED as error:
            raise CutError(
                f"{name} at {_user_line()} needs the data of {self._describe(uses, parameters)} ({error}); put it into a "
                "module that is a unit (units=[...]), or compute it from the batch"
            ) from None
        if not any(True for _ in tensors_in(result)) and not changes_in_place(name, kwargs):
            return result  # a shape, a dtype: no value
        return self._add(name, None, uses, parameters, found, versions, result, self._total_flops() - before)

    def finish(self, outputs: Any) -> Recording:
        returned = []
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                number = self.tag(leaf)
                if number is not None:
                    returned.append(number)
                elif self.twin.is_fake(leaf) and id(leaf) not in self.parameters:
                    self._refuse_hidden(leaf, "the model's outputs")
        self.recording.returned = tuple(returned)
        return self.recording

    def _sources(self, found: Mapping[Path, Tensor], name: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        uses, parameters = [], []
        for tensor in found.values():
            number = self.tag(tensor)
            if number is not None:
                uses.append(number)
            elif id(tensor) in self.parameters:
                parameters.append(self.parameters[id(tensor)])
            elif self.twin.is_fake(tensor):
                self._refuse_hidden(tensor, name)
        return tuple(dict.fromkeys(uses)), tuple(dict.fromkeys(parameters))

    def _add(
        self,
        name: str,
        call: int | None,
        uses: tuple[int, ...],
        parameters: tuple[str, ...],
        found: Mapping[Path, Tensor],
        versions: Mapping[Path, int],
        result: Any,
        flops: int,
    ) -> Any:
        """Adds the event, with a new value for each tensor that it made or changed."""
        paths = {id(tensor): path for path, tensor in found.items()}
        mutations = []
        for path, tensor in found.items():
            if tensor._version != versions[path] and paths[id(tensor)] == path:
                mutations.append(Mutation(path, self._value(tensor, self._thing(tensor))))
        leaves, tree = pytree.tree_flatten(result)
        described: list[New | Same | Constant] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                described.append(Constant(leaf))
            elif id(leaf) in paths:
                described.append(Same(paths[id(leaf)]))
            else:
                described.append(New(self._value(leaf, None)))
                paths[id(leaf)] = ()
        where = _user_line() if call is None else ""
        self.recording.events.append(
            Event(name, call, uses, parameters, tuple(described), tree, tuple(mutations), flops, where)
        )
        return result

    def _value(self, tensor: Tensor, thing: int | None) -> int:
        values = self.recording.values
        number = len(values)
        storage = self.storages.setdefault(tensor.untyped_storage()._cdata, number)
        spec = TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device)
        values.append(
            Value(
                number,
                len(self.recording.events),
                spec,
                tuple(tensor.stride()),
                tensor.requires_grad,
                number if thing is None else thing,
                storage,
            )
        )
        self.recording.placeholders.append(tensor.detach().requires_grad_(tensor.requires_grad))
        self.keep.append(tensor)
        self.set_tag(tensor, number)
        return number

    def _thing(self, tensor: Tensor) -> int | None:
        number = self.tag(tensor)
        return None if number is None else self.recording.values[number].thing

    def _like_first(self, name: str, tensors: list[Tensor]) -> Tensor:
        """What a unit that cannot be faked most likely returns; its owner checks that when it runs."""
        first = next((t for t in tensors if t.is_floating_point()), None)
        if first is None:
            raise CutError(
                f"{name} cannot run on fake tensors and takes no floating point tensor whose shape its result may have"
            )
        return self.twin.fake(first).requires_grad_(torch.is_grad_enabled()).clone()

    def _total_flops(self) -> int:
        return self.flops.get_total_flops() if self.flops is not None else 0

    def _describe(self, uses: tuple[int, ...], parameters: tuple[str, ...]) -> str:
        return self.recording.describe(uses[0]) if uses else f"the parameter {parameters[0]}"

    def _refuse_read(self, name: str, uses: tuple[int, ...], parameters: tuple[str, ...]) -> None:
        raise CutError(
            f"{_user_line()} asks {self._describe(uses, parameters)} for its data ({name}), but only one stage has that; "
            "put the code into a module that is a unit (units=[...]), or decide on the batch instead"
        )

    def _refuse_hidden(self, tensor: Tensor, user: str) -> None:
        last = next((event.name for event in reversed(self.recording.events) if event.call is not None), "a unit")
        raise CutError(
            f"{user} at {_user_line()} uses a {tensor.dtype} tensor {tuple(tensor.shape)} that was made inside a unit "
            f"(at or before {last}) and not returned by it, so another stage cannot have it; return it from the unit, "
            "or make both ends one unit with units=[...]"
        )


def changes_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a torch function changes its first argument (or ``out``), by its name."""
    dunder = name.startswith("__")
    return (
        name == "__setitem__"
        or (name.endswith("_") and not dunder)
        or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
        or kwargs.get("out") is not None
    )


def _user_line() -> str:
    """The innermost line of code that is neither PyTorch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "raypipe", "contextlib"):
            return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"
