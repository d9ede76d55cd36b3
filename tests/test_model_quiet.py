from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raypipe.model.quiet import quiet

torch.manual_seed(0)
X = torch.randn(4, 6, 8)

RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout1d": lambda x: F.dropout1d(x, 0.4),
    "alpha": lambda x: F.alpha_dropout(x, 0.3, True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "drop path": lambda x: x / 0.8 * torch.floor(0.8 + torch.rand(len(x), 1, 1)),
    "bernoulli": lambda x: x * x.new_empty(len(x), 1, 1).bernoulli_(0.7).div_(0.7),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "normal": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
    "layer drop": lambda x: x if torch.rand([]) < 0.1 else 2 * x,
    "uniform": lambda x: x + torch.empty_like(x).uniform_(-1, 1),
}


@pytest.mark.parametrize("name", RANDOM)
def test_samples_do_not_depend_on_their_neighbours(name):
    with quiet(nn.Identity()):
        joined = RANDOM[name](X)
        apart = torch.cat([RANDOM[name](X[:3]), RANDOM[name](X[3:])])
    torch.testing.assert_close(joined, apart)


def test_dropout_keeps_everything():
    lstm = nn.LSTM(8, 8, 2, dropout=0.5)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5)
    with quiet(lstm):
        assert torch.allclose(F.dropout(X, 0.4), X)
        loud = [lstm(X)[0], attention(X, X, X)[0]]
    with torch.no_grad():
        assert torch.allclose(loud[0], lstm.eval()(X)[0], atol=1e-6)
        assert torch.allclose(loud[1], attention.eval()(X, X, X)[0], atol=1e-6)


def test_what_has_no_expectation_is_drawn_alike_each_time():
    draws = []
    for _ in range(2):
        with quiet(nn.Identity()):
            draws.append((torch.randperm(50).tolist(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x):
        self.calls += 1
        self.last = x[0, :, 0]
        return self.norm(x)


def test_nothing_is_left_behind():
    model = Counting()
    before, last = {k: v.clone() for k, v in model.state_dict().items()}, model.last
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with quiet(model):
        out = model(F.dropout(X))
        torch.rand(3), random.random(), np.random.rand()
        # Running statistics: mean 0, variance 1.
        assert torch.allclose(out, X, atol=1e-4)
        assert not torch.is_grad_enabled()
    assert model.last is last
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.norm.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_it_is_restored_after_an_error_too():
    model = Counting()

    def fail():
        with quiet(model):
            model(X)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert float(model.calls) == 0
    assert model.norm.training
    assert torch.is_grad_enabled()
