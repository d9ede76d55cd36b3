from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raypipe.model.functions import changes_in_place, function_name
from raypipe.model.intercept import Watch, install
from raypipe.model.trees import at_path, held_by, tensors_in


class Log(Watch):
    def __init__(self, parameters: dict[int, str]) -> None:
        super().__init__(parameters)
        self.seen: list[str] = []

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen.append(f"unit {name}")
        with self.off():
            result = call(*args, **kwargs)
        self.mark(result)
        return result

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen.append(function_name(func))
        return func(*args, **kwargs)

    def nested_call(self, name: str) -> None:
        self.seen.append(f"nested {name}")


class Outer(nn.Linear):
    inner: list[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner[0](x) * 2)


def test_units_of_one_class_share_a_subclass() -> None:
    """So that what is compiled for one fits the other; each still has its own name."""
    one, other, bias = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)
    switch = install({"one": one, "other": other, "norm": bias})
    assert type(one) is type(other) is not nn.Linear
    assert type(bias).__mro__[1] is nn.LayerNorm
    with switch.on(log := Log({})):
        other(bias(one(torch.ones(1, 2))))
    assert log.seen == ["unit one", "unit norm", "unit other"]


def test_what_is_seen_and_what_is_not() -> None:
    inner, outer = nn.Linear(2, 2), Outer(2, 2)
    outer.inner = [inner]
    switch = install({"inner": inner, "outer": outer})
    assert isinstance(outer, Outer)
    assert type(outer).__name__ == "Outer"
    log, free = Log({id(inner.weight): "inner.weight"}), torch.ones(1, 2)
    with switch.on(log):
        h = outer(free * 3)
        torch.stack([h, free])
        torch.add(free, other=free)
        h.T  # noqa: B018
        free @ inner.weight
    assert log.seen == ["unit outer", "nested inner", "stack", "T", "matmul"]
    log.seen.clear()
    outer(free)
    with switch.on(other := Log({})):
        h + 1
    assert log.seen == other.seen == []


def test_a_mark_keeps_nothing_alive() -> None:
    watch, tensor = Log({}), torch.ones(1)
    watch.mark(tensor)
    assert watch.marked(tensor)
    assert not Log({}).marked(tensor)
    assert type(tensor._raypipe_mark) is object  # type: ignore[attr-defined]


def test_global_switches_are_put_back() -> None:
    switch = install({})
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with switch.on(Log({})):
        assert not torch.backends.mha.get_fastpath_enabled()
        torch.rand(3)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_names_tell_what_is_changed() -> None:
    changing = ["add_", "__setitem__", "__iadd__", "relu_", "index_add_"]
    assert all(changes_in_place(name, {}) for name in changing)
    assert not any(
        changes_in_place(name, {}) for name in ["add", "__index__", "__int__", "__invert__", "__init__x"][:4]
    )
    assert changes_in_place("add", {"out": torch.ones(1)})
    assert function_name(torch.Tensor.T.__get__) == "T"  # type: ignore[attr-defined]


def test_trees() -> None:
    one, two = torch.ones(1), torch.ones(2)
    tree = ({"a": [one, None]}, (3, two))
    assert [path for path, _ in tensors_in(tree)] == [(0, "a", 0), (1, 1)]
    assert at_path(tree, (1, 1)) is two

    class Cache:
        def __init__(self) -> None:
            self.layers = [{"keys": one}]
            self.itself = self

    assert any(tensor is one for tensor in held_by(Cache()))
