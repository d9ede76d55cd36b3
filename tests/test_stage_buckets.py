from __future__ import annotations

import pytest
import torch
from torch import nn

from raypipe.stage import buckets
from raypipe.stage.buckets import flat_gradients, flat_weights, make_buckets, set_gradients, set_weights


def parameter(*shape: int, dtype: torch.dtype = torch.float32, fill: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, fill, dtype=dtype))


def test_buckets_hold_one_dtype_and_a_bounded_size_and_know_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 100)
    held = {name: parameter(10) for name in "abcd"} | {"h": parameter(2, dtype=torch.bfloat16), "big": parameter(99)}
    shared = {(0, 2): ("a", "h", "b", "big", "c"), (1, 2): ("x",), (0, 1): ("d",)}
    owned = (("a", "big", "d"), ("x",), ("b", "c", "h"))
    made = make_buckets(0, held, shared, owned.__getitem__)
    named = {id(p): name for name, p in held.items()}
    assert [(b.ranks, [[named[id(p)] for p in part] for part in b.parts]) for b in made] == [
        ((0, 2), [["a"], ["b"]]),
        ((0, 2), [["big"], []]),
        ((0, 2), [[], ["c"]]),
        ((0, 2), [[], ["h"]]),
        ((0, 1), [["d"], []]),
    ]


def test_gradients_go_there_and_back() -> None:
    """Layouts and missing ones too; a parameter that nobody has a gradient for stays without."""
    turned = nn.Parameter(torch.zeros(2, 3).t())
    some = [parameter(2), turned, parameter(), parameter(0)]
    for number, p in enumerate(some[1:], start=1):
        p.grad = torch.arange(p.numel(), dtype=torch.float32).reshape(p.shape) + number
    flat = flat_gradients(some)
    assert flat.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 2, 0, 1, 1, 1]
    set_gradients(some, 2 * flat)
    assert some[0].grad is None
    assert turned.grad is not None
    assert turned.grad.tolist() == [[2, 4], [6, 8], [10, 12]]
    assert turned.grad.stride() == turned.stride()
    assert some[2].grad is not None
    assert some[2].grad.tolist() == 4


def test_weights_go_there_and_back() -> None:
    some = [parameter(2, fill=1.0), nn.Parameter(torch.arange(6.0).reshape(2, 3).t())]
    flat = flat_weights(some)
    others = [parameter(2), nn.Parameter(torch.zeros(2, 3).t())]
    set_weights(others, flat)
    assert all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        flat_gradients([embedding.weight])
