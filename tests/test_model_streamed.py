from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from training import batches_of_tokens, gpt

from raypipe.model.build import make_skeleton
from raypipe.model.call import Caller
from raypipe.model.origin import build_deferred
from raypipe.model.streamed import streamed, streaming
from raypipe.model.trial_run import in_process


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_streamed_model_computes_what_the_whole_one_does(tied: bool) -> None:
    origin = build_deferred(functools.partial(gpt, tied=tied), 0)
    skeleton = make_skeleton(origin.model, None, origin.tensor)
    whole, batch = gpt(tied=tied), batches_of_tokens(1)[0]
    whole.load_state_dict({name: origin.tensor(name) for name, _ in origin.model.named_parameters()}, strict=False)
    with torch.no_grad(), streamed(skeleton, origin.tensor) as model:
        found = model(**batch)
    assert torch.equal(found, whole.train()(**batch))
    caller = Caller(None, None)
    wanted = in_process(whole, caller)(batch)
    observe = streaming(skeleton, origin.tensor, None, caller)
    assert observe(batch) == wanted
    assert observe(batch, shaken=True).loss != wanted.loss
    assert observe(batch) == wanted


def test_a_tensor_is_dropped_when_its_unit_returns() -> None:
    origin = build_deferred(gpt, 0)
    made: list[str] = []

    def tensor(name: str) -> torch.Tensor:
        made.append(name)
        return origin.tensor(name)

    with torch.no_grad(), streamed(make_skeleton(origin.model, None, origin.tensor), tensor) as model:
        model(**batches_of_tokens(1)[0])
        assert len(made) == len(set(made)) == len(list(origin.model.parameters()))
        model(**batches_of_tokens(1)[0])
    assert len(made) == 2 * len(set(made))


def test_a_graph_holds_no_weights_and_goes_backward_all_the_same() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    origin = build_deferred(make, 0)
    made: list[StorageWeakRef] = []

    def tensor(name: str) -> torch.Tensor:
        values = origin.tensor(name)
        made.append(StorageWeakRef(values.untyped_storage()))
        return values

    whole, x = make(), torch.rand(2, 4, requires_grad=True)
    whole.load_state_dict({name: origin.tensor(name) for name, _ in origin.model.named_parameters()})
    with streamed(make_skeleton(origin.model, None, origin.tensor), tensor) as model:
        found = model(x)
        assert found.requires_grad
        assert len(made) == 4
        assert all(weight.expired() for weight in made)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.equal(gradient, torch.autograd.grad(whole(x).square().sum(), x)[0])
