from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import trainer_of

from raypipe.errors import BatchError
from raypipe.model.build import make_skeleton
from raypipe.model.call import Caller
from raypipe.model.gradient_check import in_process
from raypipe.model.husk import names_of
from raypipe.model.streamed_gradients import streaming_gradients


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_the_images_tell_the_gradients(name: str) -> None:
    model = FAMILIES[name].build().train()
    batch = FAMILIES[name].batch(3)
    _, wanted = in_process(copy.deepcopy(model), Caller())(batch)
    tensors: dict[str, Tensor] = {**names_of(model)[0], **names_of(model)[1]}
    made: list[str] = []

    def tensor(name: str) -> Tensor:
        made.append(name)
        return tensors[name].detach().clone()

    _, images = streaming_gradients(make_skeleton(model), tensor, None, Caller())(batch)
    assert images.keys() == wanted.keys()
    assert len(made) > len(set(made))  # weights are made again in the backward, not kept
    for key, gradient in wanted.items():
        assert 0.2 < float(images[key].norm()) / max(float(gradient.norm()), 1e-12) < 3 or gradient.norm() < 1e-6, key
    _, again = streaming_gradients(make_skeleton(model), tensor, None, Caller())(batch)
    assert all(torch.equal(again[key], image) for key, image in images.items())


class Balanced(nn.Module):
    """A loss by hand with a small term that compares samples with each other."""

    def __init__(self, coefficient: float, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.side, self.coefficient = nn.Linear(4, 3), coefficient

    def forward(self, x: Tensor) -> Tensor:
        share = self.side(x).softmax(-1).mean(0)
        for layer in self.layers:
            x = (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)).tanh()
        return x.square().mean() + self.coefficient * share.square().sum()


@pytest.mark.parametrize("coefficient", [0.0, 1e-4])
def test_a_small_term_is_refused_whether_the_model_is_built_or_not(coefficient: float) -> None:
    batch = {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))}
    torch.manual_seed(0)
    given: list[Any] = [Balanced(coefficient), lambda: Balanced(coefficient)]
    for model in given:
        with trainer_of(model, 2, microbatches=2) as trainer:
            if coefficient:
                with pytest.raises(BatchError, match=r"the gradient of side\..* give microbatch_weight"):
                    trainer.train_step(batch)
            else:
                trainer.train_step(batch)


def test_checkpoints_of_a_callable_are_refused_where_the_loss_is_made_by_hand() -> None:
    batch = {"x": torch.randn(4, 4)}
    options = {"microbatches": 2, "microbatch_weight": None}
    refused = pytest.raises(BatchError, match=r"torch\.utils\.checkpoint .* give microbatch_weight")
    with trainer_of(lambda: Balanced(0.0, True), 2, **options) as trainer, refused:
        trainer.train_step(batch)
    with trainer_of(lambda: Balanced(0.0, True), 2, **{**options, "microbatch_weight": "samples"}) as trainer:
        trainer.train_step(batch)
