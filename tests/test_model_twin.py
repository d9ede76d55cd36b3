from __future__ import annotations

import torch
from torch import nn

from raypipe.model.build import make_skeleton
from raypipe.model.husk import Husk
from raypipe.model.twin import Twin


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.LSTM(4, 4), nn.BatchNorm1d(4)])
        self.token = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("table", torch.arange(3.0))
        self.tied = self.blocks[1].weight


def test_weights_are_fake_and_loose_buffers_real() -> None:
    twin = Twin(make_skeleton(Model()).model)
    assert all(twin.is_fake(p) for p in twin.model.parameters())
    assert all(isinstance(p, nn.Parameter) for p in twin.model.parameters())
    assert twin.is_fake(twin.model.blocks[1].running_mean)
    assert torch.equal(twin.model.table, torch.arange(3.0))
    assert not twin.model.token.requires_grad
    assert all(twin.is_fake(w) for w in twin.model.blocks[0]._flat_weights)


def test_its_names() -> None:
    model = Model()
    twin = Twin(model)
    assert set(twin.parameters.values()) == set(dict(model.named_parameters()))
    # Registered twice: the first name counts, whichever module has it.
    assert twin.unit_parameters["blocks.1"] == ("tied", "blocks.1.bias")
    assert set(twin.buffers.values()) == set(dict(model.named_buffers()))
    assert not twin.is_fake(model.token)
    assert not isinstance(model.token, Husk)


def test_fakes_keep_strides_and_gradients() -> None:
    twin = Twin(nn.Linear(2, 2))
    real = torch.zeros(2, 3, 4, requires_grad=True).transpose(0, 2)
    fake = twin.fake(real.detach().requires_grad_())
    assert (fake.shape, fake.stride(), fake.requires_grad) == (real.shape, real.stride(), True)
