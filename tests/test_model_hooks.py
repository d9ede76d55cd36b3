"""Which hooks there are, how they are heard, and that those which a forward leaves behind are removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raypipe.model.hooks import has_hooks_since, heard, hook_name, hooks_of, next_hook, remove_hooks_since


def double(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def before(module: nn.Module, args: Any) -> None:
    pass


def test_places_say_module_kind_and_number() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net[0].register_forward_pre_hook(before)
    net[1].register_forward_hook(before)
    net[1].register_forward_hook(double)
    wanted = {("0", "_forward_pre_hooks", 0): before, ("1", "_forward_hooks", 0): before}
    assert hooks_of(net) == wanted | {("1", "_forward_hooks", 1): double}
    assert hooks_of(net, {hook_name(double)}) == wanted


def test_heard_hooks_are_called_by_the_listener_and_come_back() -> None:
    net = nn.Sequential(nn.Identity())
    net[0].register_forward_hook(double)
    heard_at = []

    def hear(place: Any, hook: Any, module: nn.Module, given: Any) -> Any:
        heard_at.append(place)
        return hook(module, *given) + 1

    with heard(net, hear):
        assert net(torch.ones(())) == 3
    assert net(torch.ones(())) == 2
    assert heard_at == [("0", "_forward_hooks", 0)]


def test_hooks_that_are_left_behind_are_removed_and_older_ones_stay() -> None:
    net = nn.Sequential(nn.Identity())
    net[0].register_forward_hook(double)
    number = next_hook()
    net[0].register_forward_hook(lambda module, args, kwargs, output: output * 5, with_kwargs=True, always_call=True)
    net[0].register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    assert net(torch.ones(())) == 10
    assert has_hooks_since(net, number)
    remove_hooks_since(net, number)
    assert not has_hooks_since(net, number)
    assert net(torch.ones(())) == 2
    assert not net[0]._forward_hooks_with_kwargs
    assert not net[0]._forward_pre_hooks_with_kwargs
    assert not net[0]._forward_hooks_always_called
