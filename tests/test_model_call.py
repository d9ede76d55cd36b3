from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import cloudpickle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raypipe.errors import BatchError
from raypipe.model.call import Caller


class Recorder(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


def test_each_kind_of_batch_calls_the_model_in_its_way():
    model, x, y, t = Recorder(), torch.ones(2), torch.zeros(2), torch.arange(2)
    outputs = Caller().outputs
    assert outputs(model, {"a": x, "b": y}) == ((), {"a": x, "b": y})
    assert outputs(model, UserDict(a=x)) == ((), {"a": x})
    assert outputs(model, (x, t)) == ((x,), {})
    assert outputs(model, [x, t]) == ((x,), {})
    assert outputs(model, ((x, y), t)) == ((x, y), {})
    assert outputs(model, [[x, y], t]) == ((x, y), {})
    assert outputs(model, ([x, y], t)) == (([x, y],), {})
    assert outputs(model, ({"a": x}, t)) == (({"a": x},), {})
    assert Caller(forward=lambda m, b: m(b, flag=True)).outputs(model, x) == ((x,), {"flag": True})


@pytest.mark.parametrize("batch", [torch.ones(3), (torch.ones(3),), "text", None, [1, 2, 3]])
def test_a_batch_of_unknown_kind_needs_forward(batch):
    with pytest.raises(BatchError, match=r"give forward\(model, batch\)"):
        Caller().outputs(Recorder(), batch)


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"loss": v, "n": 1}, lambda v: SimpleNamespace(loss=v)])
def test_the_models_own_loss_is_found(wrap):
    loss = torch.tensor(1.5)
    assert Caller().loss_of(wrap(loss), {"a": 1}) is loss
    assert Caller().loss_of(wrap(loss), (1, 2)) is loss


def test_loss_gets_the_targets_of_a_pair_and_the_whole_of_anything_else():
    seen = []

    def loss(outputs, second):
        seen.append(second)
        return torch.tensor(0.0)

    for caller, batch in ((Caller(loss=loss), ("in", "out")), (Caller(loss=loss), {"a": 1})):
        caller.loss_of(None, batch)
    Caller(forward=lambda m, b: None, loss=loss).loss_of(None, ("in", "out"))
    assert seen == ["out", {"a": 1}, ("in", "out")]


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (torch.ones(2, 3), r"a tensor of shape \[2, 3\]"),
        ({"logits": torch.ones(2)}, r"a dict with keys \['logits'\]"),
        ({"loss": None}, "no loss"),
        ((torch.tensor(1.0), torch.ones(2)), "a tuple of 2"),
        (None, "None"),
    ],
)
def test_outputs_without_a_loss_say_what_they_are(outputs, words):
    with pytest.raises(ValueError, match=words):
        Caller().loss_of(outputs, {})


@pytest.mark.parametrize(
    ("loss", "words"),
    [(torch.ones(4), r"shape \[4\]"), (torch.ones(1), r"shape \[1\]"), (2.0, "a float"), (torch.tensor(1), "int64")],
)
def test_a_loss_must_be_a_floating_scalar(loss, words):
    with pytest.raises(ValueError, match=words):
        Caller(loss=lambda outputs, targets: loss).loss_of(None, (1, 2))


def test_it_survives_pickling_with_lambdas():
    caller = cloudpickle.loads(cloudpickle.dumps(Caller(loss=lambda o, t: F.mse_loss(o, t))))
    assert caller.loss_of(torch.ones(2), (None, torch.zeros(2))) == 1.0


def test_what_is_not_callable_is_refused_at_once():
    with pytest.raises(TypeError, match="loss is 'mse'"):
        Caller(loss="mse")  # type: ignore[arg-type]
