"""A unit call that runs again: the same bits, its arguments kept and nothing else, everything beside it done once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from raypipe.model.recompute import recomputed
from raypipe.model.seeds import Seeds, run_keyed
from raypipe.model.split_backward import SplitBackward
from raypipe.model.weight_queue import WeightQueue

W = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.runs = nn.Linear(W, 4 * W), nn.Linear(4 * W, W), 0
        self.norm, self.drop = nn.BatchNorm1d(W), nn.Dropout(0.3)

    def forward(self, x: Tensor, *, scale: Any = 1.0) -> Tensor:
        self.runs += 1
        scale = scale.pop() if hasattr(scale, "pop") else scale
        return x + self.drop(self.outer(torch.tanh(self.inner(self.norm(x) * scale))))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Bits = tuple[Tensor, list[Tensor], dict[str, Tensor]]


def bits(again: bool, split: bool = False, scale: Callable[[], Any] = lambda: 1.0) -> tuple[Bits, int]:
    """Output, gradients and buffers of a step of two microbatches whose backwards come late; and the block's runs."""
    torch.manual_seed(0)
    block = Block()
    inputs, results, queues = [], [], []
    Seeds(0, 1, 2).start()
    for seed in range(2):
        x = noise(4, W, seed=seed).requires_grad_()
        queue = WeightQueue()
        call = (lambda *a, **k: recomputed(block.__call__, a, k)) if again else block
        if split:
            with SplitBackward(queue):
                results.append(run_keyed(lambda call=call, x=x: call(x, scale=scale())))
        else:
            results.append(run_keyed(lambda call=call, x=x: call(x, scale=scale())))
        inputs.append(x)
        queues.append(queue)
    state = torch.get_rng_state()
    for result, queue in zip(results, queues, strict=True):
        if split:
            with SplitBackward(queue):
                result.square().sum().backward()
            assert len(queue) == 2  # the linear layers; batch norm is whole in I
        else:
            result.square().sum().backward()
    for queue in queues:
        queue.drain()
    assert torch.equal(torch.get_rng_state(), state)
    found = [x.grad for x in inputs] + [p.grad for p in block.parameters()]
    return (torch.stack(results), found, {n: b.clone() for n, b in block.named_buffers()}), block.runs


def assert_same(found: Bits, wanted: Bits) -> None:
    assert torch.equal(found[0], wanted[0])
    for one, other in zip(found[1], wanted[1], strict=True):
        assert torch.equal(one, other)
    for name, buffer in wanted[2].items():
        assert torch.equal(found[2][name], buffer), name


@pytest.mark.parametrize("split", [False, True])
def test_the_same_bits_with_dropout_and_batch_norm(split: bool) -> None:
    """Running statistics are counted once, in halves it runs once for I and not again for W."""
    (wanted, once), (found, twice) = bits(False), bits(True, split)
    assert_same(found, wanted)
    assert int(wanted[2]["norm.num_batches_tracked"]) == 2
    assert (once, twice) == (2, 4)


class Stock:
    """An object that its user empties."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def pop(self) -> float:
        return self.values.pop()


def test_an_object_is_given_as_it_was() -> None:
    wanted, _ = bits(False, scale=lambda: Stock([1.0, 3.0]))
    found, _ = bits(True, scale=lambda: Stock([1.0, 3.0]))
    assert_same(found, wanted)


def test_the_arguments_are_kept_and_nothing_else() -> None:
    block, x = Block(), noise(4, W).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        recomputed(block.__call__, (x,), {"scale": noise(W)})
    assert [tuple(tensor.shape) for tensor in kept] == [(4, W), (W,)]


def test_what_the_layers_make_is_freed() -> None:
    class Watched(Block):
        made: StorageWeakRef

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            hidden = torch.tanh(self.inner(x))
            self.made = StorageWeakRef(hidden.untyped_storage())
            return self.outer(hidden)

    for again in (False, True):
        block = Watched()
        call = (lambda x, block=block: recomputed(block.__call__, (x,), {})) if again else block
        result = call(noise(4, W))
        assert block.made.expired() == again
        result.sum().backward()


def test_one_tensor_given_twice_stays_one() -> None:
    class Attention(nn.MultiheadAttention):
        packed: list[bool]

        def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
            self.packed.append(query is key and key is value)
            return super().forward(query, key, value, **kwargs)

    attention, x = Attention(W, 2), noise(3, 4, W).requires_grad_()
    attention.packed = []
    made = recomputed(attention.__call__, (x, x), {"value": x})
    made[0].sum().backward()
    assert attention.packed == [True, True]


def test_the_second_run_has_no_fast_path_either() -> None:
    """A frozen ``nn.TransformerEncoderLayer`` in eval mode would come out differently by it."""
    seen: list[bool] = []

    class Asking(Block):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            seen.append(torch.backends.mha.get_fastpath_enabled())
            return super().forward(x)

    recomputed(Asking().__call__, (noise(4, W),), {}).sum().backward()
    assert len(seen) == 2
    assert seen[1] is False


def test_an_argument_changed_before_the_backward_is_an_error() -> None:
    block, x = Block(), noise(4, W)
    made = recomputed(block.__call__, (x,), {})
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.sum().backward()


def test_a_second_run_that_fails_leaves_everything_as_it_was() -> None:
    class Failing(Block):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            made = super().forward(x, **kwargs)
            if self.runs == 2:
                raise ArithmeticError("the second time")
            return made.exp()

    block = Failing()
    made = recomputed(block.__call__, (noise(4, W),), {})
    before, fast = copy.deepcopy(dict(block.named_buffers())), torch.backends.mha.get_fastpath_enabled()
    state = torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="the second time"):
        made.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert all(torch.equal(buffer, before[name]) for name, buffer in block.named_buffers())
