from __future__ import annotations

import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

from raypipe.errors import CutError
from raypipe.model.build import dump, held_state, make_skeleton, materialise, whole_state
from raypipe.model.husk import Husk


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.blocks[0][0].weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.table  # type: ignore[no-any-return]


def test_a_skeleton_holds_no_weights_and_the_model_stays_as_it_is() -> None:
    model = Model()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    skeleton = make_skeleton(model)
    assert all(isinstance(p, Husk) for p in skeleton.model.parameters())
    assert isinstance(skeleton.model.blocks[0][1].running_mean, Husk)
    assert torch.equal(skeleton.model.table, model.table)
    assert skeleton.unit_buffers["blocks.1"] == tuple(
        f"blocks.1.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    assert all(
        id(t) == before[n][0] and torch.equal(t, before[n][1]) for n, t in model.state_dict(keep_vars=True).items()
    )
    assert len(dump(skeleton)) < 20_000 + sum(p.numel() for p in model.parameters())


def test_a_stage_gets_its_own_tensors_and_no_others() -> None:
    model = Model()
    skeleton = pickle.loads(dump(make_skeleton(model)))
    held = {name: t.detach().clone() for name, t in model.named_parameters() if name.startswith("blocks.0")}
    held |= {name: t.clone() for name, t in model.named_buffers() if name.startswith("blocks.0")}
    stage = materialise(skeleton, held)
    torch.testing.assert_close(stage.blocks[0](torch.ones(2, 4)), model.blocks[0](torch.ones(2, 4)))
    assert stage.head.weight is stage.blocks[0][0].weight
    with pytest.raises(CutError, match=r"reads blocks\.1\.0\.(weight|bias)"):
        stage.blocks[1](torch.ones(2, 4))
    assert set(held_state(stage)) == {*held, "table"}


def test_a_parametrized_module_travels() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    skeleton = pickle.loads(dump(make_skeleton(model)))
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.ones(2, 4)
    torch.testing.assert_close(materialise(skeleton, held)(x), model(x))
    assert set(dict(materialise(skeleton, held).named_parameters())) == set(held)


def test_the_whole_state_is_put_together_again() -> None:
    model = Model()
    changed = {"blocks.1.0.weight": torch.ones(4, 4), "blocks.0.0.weight": torch.full((4, 4), 2.0)}
    state = whole_state(model, [{"blocks.0.0.weight": changed["blocks.0.0.weight"]}, changed])
    assert state.keys() == model.state_dict().keys()
    assert torch.equal(state["head.weight"], changed["blocks.0.0.weight"])
    assert torch.equal(state["blocks.1.0.weight"], torch.ones(4, 4))
    assert torch.equal(state["blocks.1.0.bias"], model.blocks[1][0].bias)
    model.load_state_dict(state)


def test_what_cannot_travel_is_named() -> None:
    model = Model()
    model.blocks[1].lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"attribute 'blocks\.1\.lock' \(lock: "):
        make_skeleton(model)
    copied = make_skeleton(Model())
    copied.model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"attribute 'lock' \(lock: "):
        dump(copied)


def test_a_tensor_that_a_forward_left_behind_is_named() -> None:
    """It has a history of gradients, and no copy; a detached one would lose them in silence."""
    model = Model()
    model.blocks[1].state = model.head(torch.ones(2, 4))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^blocks\.1\.state is a tensor that was computed.*the attribute to None$"):
        make_skeleton(model)
    model.blocks[1].state = None  # type: ignore[assignment]
    make_skeleton(model)
