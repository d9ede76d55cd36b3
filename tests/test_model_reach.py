"""Hooks that reach what is not copied with the model are refused; what is copied may be used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raypipe.errors import CutError
from raypipe.model.build import make_skeleton
from raypipe.model.reach import refuse_foreign_hooks

SEEN: list[Any] = []
calls = 0


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def of_a_list(net: Any) -> Callable[..., None]:
    seen: list[Any] = []
    net.seen = seen
    return lambda module, args, output: seen.append(output)


def of_an_object(net: Any) -> Callable[..., None]:
    net.collector = collector = Collector()
    return lambda module, args, output: collector.seen.append(output)


def of_a_default(net: Any) -> Callable[..., None]:
    net.seen = []

    def hook(module: Any, args: Any, output: Any, seen: Any = net.seen) -> None:
        seen.append(output)

    return hook


def of_a_global(net: Any) -> Callable[..., None]:
    return lambda module, args, output: next(SEEN.append(part) for part in output)


def fill(output: Tensor) -> None:
    SEEN.append(output)


def of_a_global_function(net: Any) -> Callable[..., None]:
    return lambda module, args, output: fill(output)


def of_a_global_object(net: Any) -> Callable[..., None]:
    net.collector = COLLECTOR
    return lambda module, args, output: COLLECTOR.after(module, args, output)


def of_a_function_inside(net: Any) -> Callable[..., None]:
    inner = of_a_list(net)
    return lambda module, args, output: inner(module, args, output)


def that_counts(net: Any) -> Callable[..., None]:
    count = 0

    def hook(module: Any, args: Any, output: Any) -> None:
        nonlocal count
        count += 1

    return hook


def that_counts_globally(net: Any) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        global calls
        calls += 1

    return hook


class Collector:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def after(self, module: Any, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def __call__(self, module: Any, args: Any, output: Tensor) -> None:
        self.seen.append(output)


COLLECTOR = Collector()


def append(seen: list[Tensor], module: Any, args: Any, output: Tensor) -> None:
    seen.append(output)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (of_a_list, r"on 1 uses the variable seen \(list\)"),
        (of_an_object, r"uses the variable collector \(Collector\)"),
        (of_a_default, r"uses the variable seen \(list\)"),
        (of_a_global, r"uses the variable SEEN \(list\)"),
        (of_a_global_function, r"uses the variable SEEN \(list\)"),
        (of_a_global_object, r"uses the variable COLLECTOR \(Collector\)"),
        (of_a_function_inside, r"uses the variable seen \(list\)"),
        (that_counts, "sets the variable count"),
        (that_counts_globally, "sets the variable calls"),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_what_is_not_copied_is_refused(make: Any, says: str, partial: bool) -> None:
    net = model()
    hook = make(net)
    net[1].register_forward_hook(functools.partial(hook) if partial else hook)
    with pytest.raises(CutError, match=says):
        make_skeleton(net)


def test_a_forward_set_on_an_instance_is_refused_where_it_reaches_the_old_one() -> None:
    net = model()
    old = net[1].forward
    net[1].forward = lambda x: old(x) * 2
    with pytest.raises(CutError, match=r"the forward .* on 1 uses the variable old \(method\)"):
        refuse_foreign_hooks(net)


@pytest.mark.parametrize("way", ["partial", "method", "object"])
def test_what_is_copied_fills_the_copys_list(way: str) -> None:
    net: Any = model()
    net.collector = collector = Collector()
    net.seen = collector.seen
    hook = {"partial": functools.partial(append, net.seen), "method": collector.after, "object": collector}[way]
    net[1].register_forward_hook(hook)
    copied = make_skeleton(net).model
    (its,) = copied[1]._forward_hooks.values()  # type: ignore[index, operator]
    its(None, None, torch.ones(1))
    assert len(copied.seen) == 1
    assert not net.seen


def test_what_cannot_change_may_be_used() -> None:
    net, scale, names, relu = model(), 2.0, ("a", "b"), nn.functional.relu
    net[0].register_forward_hook(lambda module, args, output: relu(output) * scale if names else torch.zeros(()))
    refuse_foreign_hooks(net)


@contextmanager
def registered(kind: str) -> Iterator[None]:
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda module, *given: None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_a_hook_of_all_modules_is_refused(kind: str) -> None:
    with registered(kind), pytest.raises(CutError, match="is registered for all modules of the process"):
        make_skeleton(model())
    make_skeleton(model())
