from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from raypipe.errors import CutError
from raypipe.model.husk import Husk, husk_of, names_of, replace_tensors


def husked(module: nn.Module) -> nn.Module:
    return replace_tensors(module, {id(p): husk_of(p, name, True) for name, p in module.named_parameters()})


def test_a_husk_is_a_parameter_without_storage() -> None:
    husk = husk_of(torch.zeros(1000, 1000, dtype=torch.bfloat16), "head.weight", True)
    assert isinstance(husk, nn.Parameter)
    assert (husk.shape, husk.dtype, husk.requires_grad) == ((1000, 1000), torch.bfloat16, False)
    with pytest.raises(RuntimeError, match="invalid python storage"):
        husk.untyped_storage().data_ptr()
    assert repr(husk) == "Husk(head.weight, shape=(1000, 1000), dtype=torch.bfloat16)"


@pytest.mark.parametrize("use", [lambda w: w + 1, lambda w: w.sum(), lambda w: w[0], lambda w: w.float(), torch.clone])
def test_any_use_of_its_data_raises(use) -> None:  # type: ignore[no-untyped-def]
    husk = husk_of(torch.zeros(2, 2, dtype=torch.float64), "head.weight", True)
    with pytest.raises(CutError, match=r"reads head.weight, which another stage holds"):
        use(husk)


def test_copies_and_pickles_are_husks() -> None:
    husk = husk_of(torch.zeros(2, 3, requires_grad=True), "w", True)
    for other in (copy.deepcopy(husk), pickle.loads(pickle.dumps(husk)), husk.detach(), husk.data):
        assert isinstance(other, Husk)
        assert (other.husk_name, other.shape) == ("w", (2, 3))
    assert isinstance(pickle.loads(pickle.dumps(husk)), nn.Parameter)
    two = copy.deepcopy([husk, husk])
    assert two[0] is two[1]


def test_recurrent_layers_keep_no_weights_in_their_lists() -> None:
    lstm = nn.LSTM(4, 4)
    copied = husked(lstm)
    assert all(isinstance(w, Husk) for w in copied._flat_weights)
    with pytest.raises(CutError):
        copied(torch.zeros(2, 1, 4))
    assert not any(isinstance(w, Husk) for w in lstm._flat_weights)


def test_tied_weights_stay_tied_and_have_one_name() -> None:
    model = nn.ModuleList([nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    assert list(names_of(model)[0]) == ["0.weight"]
    copied = husked(model)
    assert copied[0].weight is copied[1].weight  # type: ignore[index]
