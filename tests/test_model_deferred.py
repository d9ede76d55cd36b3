from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy
import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from raypipe.model.deferred import Deferral
from raypipe.model.husk import names_of


class Odd(nn.Module):
    """Ways to make weights beside those of PyTorch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)]
        self.listed = torch.linspace(0, 0.5, 3).tolist()
        self.by_hand = nn.Parameter(torch.randn(64, 32) * self.rates[2])
        self.orthogonal = nn.Parameter(nn.init.orthogonal_(torch.empty(32, 64)))
        self.cut = nn.Parameter(nn.init.trunc_normal_(torch.empty(64, 64), std=0.02))
        self.padded = nn.Embedding(40, 64, padding_idx=3)
        self.tied = nn.Linear(64, 40, bias=False)
        self.tied.weight = self.padded.weight
        self.table = nn.Parameter(torch.from_numpy(numpy.arange(6.0)), requires_grad=False)
        self.half = nn.Linear(64, 64).bfloat16()
        self.normed = parametrizations.weight_norm(nn.Linear(64, 64))
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32), 2, enable_nested_tensor=False
        )  # deep copies of one layer
        self.rows = nn.Parameter(torch.zeros(8, 8))
        self.rows.data[2:4] = 1.0
        self.rows.data += torch.eye(8)
        self.register_buffer("mask", torch.ones(8, 8).tril(), persistent=False)
        self.register_buffer("angles", 10000.0 ** -(torch.arange(0, 8, 2) / 8), persistent=False)
        self.kept = self.angles


def spread(tensor: Tensor) -> float:
    return float(tensor.detach().double().std(correction=0))


@pytest.mark.parametrize("make", [Odd, *(family.build for family in FAMILIES.values())], ids=["odd", *FAMILIES])
def test_a_model_is_what_its_constructor_makes_but_for_its_random_numbers(
    make: Callable[[], nn.Module],
) -> None:
    deferral = Deferral(0)
    found, wanted = deferral.run(make), make()
    for named, real in zip(names_of(found), names_of(wanted), strict=True):
        assert list(named) == list(real)
        for name, tensor in real.items():
            made = deferral.make(named[name])
            assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype), name
            assert named[name].requires_grad == tensor.requires_grad
            if spread(tensor) == 0 or not isinstance(tensor, nn.Parameter) or name in ("rows", "table"):
                assert torch.equal(made, tensor.detach()), name
            elif tensor.numel() >= 384:
                assert spread(made) == pytest.approx(spread(tensor), rel=0.2), name


def test_ties_and_lists_are_the_constructors() -> None:
    model = Deferral(0).run(Odd)
    assert model.tied.weight is model.padded.weight
    assert model.kept is model.angles
    assert model.rates == model.listed == [0.0, 0.25, 0.5]


def test_padding_is_zero_and_an_orthogonal_matrix_is_one() -> None:
    deferral = Deferral(0)
    model = deferral.run(Odd)
    assert torch.equal(deferral.make(model.padded.weight)[3], torch.zeros(64))
    q = deferral.make(model.orthogonal)
    torch.testing.assert_close(q @ q.T, torch.eye(32))


def test_a_tensor_is_the_same_wherever_and_whenever_it_is_made() -> None:
    deferral = Deferral(5)
    model = deferral.run(Odd)
    recipe = deferral.recipe(model.by_hand)
    before = torch.get_rng_state()
    first = recipe.make()
    torch.rand(3)
    again = pickle.loads(pickle.dumps(recipe)).make()
    assert torch.equal(first, again)
    other = Deferral(6)
    assert not torch.equal(other.make(other.run(Odd).by_hand), first)
    torch.set_rng_state(before)
    recipe.make()
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_overwritten_is_not_made_again() -> None:
    def make() -> nn.Linear:
        layer = nn.Linear(8, 8)  # draws once by itself
        nn.init.normal_(layer.weight)
        return layer

    deferral = Deferral(0)
    assert [step.name[1] for step in deferral.recipe(deferral.run(make).weight).steps] == ["empty", "normal_"]


def test_what_nobody_fills_is_zero() -> None:
    deferral = Deferral(0)
    made = deferral.make(deferral.run(lambda: nn.Parameter(torch.empty(1000))))
    assert torch.equal(made, torch.zeros(1000))
