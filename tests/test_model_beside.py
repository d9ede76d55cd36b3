"""What units give away without returning it, by hooks, attributes, lists: carried over every cut, or kept together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pipes import WIDTH, Pipe, Stack, assert_equal_cuts, assert_exact, batch, recorded
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raypipe.errors import CutError


def chain(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = torch.tanh(block(x))
    return x


class Inner(nn.Module):
    """A block with a module inside of it, for hooks to be set on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(x)))


class Collector:
    """Hooks as bound methods, so that they travel with the model."""

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        self.seen: list[Any] = []
        self.keep = keep

    def after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(self.keep(output))

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen.append(self.keep(args[0]))

    def scaled(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.seen.append(self.keep(output))
        return output * 2 + self.seen[0].mean()


def collecting(keep: Callable[[Tensor], Any], way: str) -> Stack:
    def setup(model: Any) -> None:
        model.collector = collector = Collector(keep)
        for block in model.blocks:
            if way == "inner":
                block.inner.register_forward_hook(collector.after)
            elif way == "own":
                block.register_forward_hook(collector.after)
            elif way == "inputs":
                block.register_forward_pre_hook(collector.before, with_kwargs=True)
            else:
                block.outer.register_forward_hook(collector.scaled)

    def run(model: Any, x: Tensor) -> Tensor:
        model.collector.seen.clear()
        x = chain(model, x)
        seen = model.collector.seen
        assert len(seen) == 4
        return x + seen[0] * seen[2] + sum(s.square().mean() for s in seen)

    return Stack(run, Inner, setup)


@pytest.mark.parametrize("way", ["inner", "own", "inputs", "changing"])
@pytest.mark.parametrize("keep", [lambda t: t, lambda t: t.float().mean(0), lambda t: t.detach()])
def test_what_hooks_collect_is_carried(keep: Any, way: str) -> None:
    assert_exact(collecting(keep, way), batch())


def test_a_hook_that_computes_does_so_once_for_all_stages() -> None:
    names = [event.name for event in recorded(collecting(lambda t: t.square(), "inner"), batch()).events]
    assert names[:3] == ["blocks.0", "square", "tanh"]


def test_a_hook_in_the_forward_and_a_list_emptied_at_its_end() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        handles = [block.register_forward_hook(lambda m, a, out: model.kept.append(out)) for block in model.blocks]
        x = chain(model, x)
        for handle in handles:
            handle.remove()
        skip = model.kept[0] + len(model.kept)
        model.kept.clear()
        return x * skip

    def setup(model: Any) -> None:
        model.kept = []

    model = Stack(run, Inner, setup)
    assert_exact(model, batch())
    pipe = Pipe(model, batch(), 3)
    first = pipe.train(batch())
    again = pipe.train(batch())  # the first stage's forward never came to where it removes them
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in first[1].items())


def test_a_list_that_the_end_of_the_forward_empties_is_as_it_was_on_the_other_stages() -> None:
    def setup(model: Any) -> None:
        model.kept = []
        model.blocks[0].register_forward_hook(Kept(model.kept))

    def run(model: Any, x: Tensor) -> Tensor:
        x = model.blocks[0](x)
        for block in model.blocks[1:]:
            x = torch.tanh(block(x)) + model.kept[0]
        model.kept.clear()
        return x

    pipe = Pipe(Stack(run, setup=setup), batch(), 4)
    for scale in (1.0, 2.0):
        given = {name: tensor * scale for name, tensor in batch().items()}
        assert pipe.train(given)[0] == Pipe(Stack(run, setup=setup), given, 1).train(given)[0]


class Kept:
    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output)


class Printing:
    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.last = output.mean().item()


class Noisy:
    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return F.dropout(output, 0.5)


def test_hooks_that_print_or_draw_belong_to_their_unit() -> None:
    def setup(model: Any) -> None:
        model.kept = []
        for block in model.blocks:
            block.inner.register_forward_hook(Printing())
            block.outer.register_forward_hook(Noisy())
            block.register_forward_hook(Kept(model.kept))

    def run(model: Any, x: Tensor) -> Tensor:
        model.kept.clear()
        return chain(model, x) + model.kept[1]

    assert_equal_cuts(Stack(run, Inner, setup), batch())


@pytest.mark.parametrize("reentrant", [False, True])
def test_hooks_inside_a_checkpoint_of_the_unit(reentrant: bool) -> None:
    class Checkpointed(Inner):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = checkpoint(super().forward, x, use_reentrant=reentrant)
            return made

    def setup(model: Any) -> None:
        model.kept = []
        model.blocks[1].inner.register_forward_hook(Kept(model.kept))

    def run(model: Any, x: Tensor) -> Tensor:
        model.kept.clear()
        return chain(model, x.requires_grad_()) + model.kept[0] * 0.5

    assert_exact(Stack(run, Checkpointed, setup), batch(), chunks=(1, 2))


class Leaving(nn.Linear):
    """Leaves its mean in an attribute, in a list of the root and in a dict that it is given."""

    losses: list[Tensor]

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: Any = None) -> Tensor:
        h = super().forward(x)
        self.auxiliary = {"mean": h.mean(), "times": 2}
        if hasattr(self, "losses"):
            self.losses.append(h.square().mean())
        if seen is not None:
            seen.append(h)
        return h


def test_attributes_of_units_are_carried() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        x = chain(model, x)
        return x + sum(block.auxiliary["mean"] * block.auxiliary["times"] for block in model.blocks)

    assert_exact(Stack(run, Leaving), batch())


def test_lists_that_units_share_with_the_model_are_carried() -> None:
    def setup(model: Any) -> None:
        model.losses = []
        for block in model.blocks:
            block.losses = model.losses

    def run(model: Any, x: Tensor) -> Tensor:
        model.losses.clear()
        x = chain(model, x)
        return x + sum(model.losses) / len(model.losses)

    assert_exact(Stack(run, Leaving, setup), batch())


def test_lists_that_units_are_given_are_carried() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for block in model.blocks:
            x = block(x, seen)
            assert seen[-1] is x
        return x + seen[0] * seen[1]

    assert_exact(Stack(run, Leaving), batch())


def test_a_hook_that_reaches_the_model_by_a_closure_is_refused() -> None:
    def setup(model: Any) -> None:
        model.features = []
        model.blocks[2].register_forward_hook(lambda m, a, out: model.features.append(out))

    with pytest.raises(CutError, match=r"on blocks.2 uses the variable model \(Stack\)"):
        Pipe(Stack(chain, setup=setup), batch(), 1)


# What cannot be carried stays in one chunk.


class Context:
    aux: Any = None


class Sharing(nn.Linear):
    """Writes to an object that it shares with others, or reads from it."""

    context: Any
    writes = reads = False

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        if self.writes:
            self.context.aux = h.mean()
        return h * self.context.aux if self.reads else h


def sharing(reader: int | None) -> Stack:
    def setup(model: Any) -> None:
        model.context = Context()
        for block in model.blocks:
            block.context = model.context
        model.blocks[1].writes = True
        if reader is not None:
            model.blocks[reader].reads = True

    def run(model: Any, x: Tensor) -> Tensor:
        x = chain(model, x)
        return x if reader is not None else x + model.context.aux * 2.0

    return Stack(run, Sharing, setup)


def test_what_one_unit_keeps_for_another_stays_in_one_chunk() -> None:
    model = sharing(2)
    assert_exact(model, batch(), chunks=(1, 2, 3))
    wanted = (
        r"a cut before blocks.2 would part a torch.float32 tensor \(\), made inside blocks.1 and not returned by it .*"
        r"from blocks.2 at test_model_beside.py:\d+, .* can be cut before blocks.1, blocks.3 .*"
        r"balance=\[1, 3\]"
    )
    with pytest.raises(CutError, match=wanted):
        Pipe(model, batch(), 2, balance=[2, 2])
    with pytest.raises(CutError, match=r"4 chunks are wanted, but this model can be cut before blocks.1, blocks.3"):
        Pipe(model, batch(), 4)


def test_what_a_unit_keeps_for_the_code_between_units_stays_in_the_last_chunk() -> None:
    model = sharing(None)
    assert_exact(model, batch(), chunks=(1, 2))
    for balance in ([2, 2], [3, 1]):
        with pytest.raises(
            CutError, match=r"from mul at .*this model can be cut before blocks.1 into at most 2 chunks"
        ):
            Pipe(model, batch(), 2, balance=balance)


@dataclasses.dataclass
class Opaque:
    h: Tensor


class Returning(nn.Linear):
    def forward(self, x: Any) -> Any:
        return Opaque(super().forward(getattr(x, "h", x)))


def test_objects_that_hold_tensors_stay_in_one_chunk() -> None:
    def run(model: Any, x: Any) -> Tensor:
        for block in model.blocks:
            x = block(x)
        return x.h  # type: ignore[no-any-return]

    model = Stack(run, lambda: Returning(WIDTH, WIDTH))
    assert_exact(model, batch(), chunks=(1,))
    with pytest.raises(CutError, match=r"2 chunks are wanted, but this model cannot be cut anywhere \(use stages=1\)"):
        Pipe(model, batch(), 2)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


def applies_a_function(model: Any, x: Tensor) -> Tensor:
    x = Reversed.apply(model.blocks[1](model.blocks[0](x)))  # type: ignore[no-untyped-call]
    return model.blocks[3](model.blocks[2](x))  # type: ignore[no-any-return]


def checkpoints_reentrantly(model: Any, x: Tensor) -> Tensor:
    x = model.blocks[1](model.blocks[0](x))
    return checkpoint(lambda x: model.blocks[3](model.blocks[2](x)), x, use_reentrant=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("run", [applies_a_function, checkpoints_reentrantly])
def test_a_backward_in_one_piece_stays_in_the_last_chunk(run: Any) -> None:
    assert_exact(Stack(run), batch(), chunks=(1, 2), balance=None)
    with pytest.raises(CutError, match=r"blocks.3 would part .* from what follows it: it runs inside"):
        Pipe(Stack(run), batch(), 2, balance=[3, 1])
