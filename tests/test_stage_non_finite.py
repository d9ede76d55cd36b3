from __future__ import annotations

import math
import pickle

import torch

from raypipe.errors import NonFiniteError
from raypipe.stage.non_finite import NonFinite, find_non_finite, gradient_error, loss_error, scale_error
from raypipe.stage.spec import Gradients

OWNED = Gradients(owned=(("a", "d"), ("b", "c")), order=("a", "b", "c", "d"))


def norms(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_last_parameter_in_model_order_is_where_it_arose() -> None:
    assert find_non_finite(OWNED, {0: norms(1, 2), 1: norms(3, 0)}) is None
    found = find_non_finite(OWNED, {0: norms(math.nan, 2), 1: norms(math.nan, math.inf)})
    assert found == NonFinite(1, "c", math.inf, 2)
    assert find_non_finite(OWNED, {0: norms(math.inf, 2)}) == NonFinite(0, "a", math.inf, 0)
    assert find_non_finite(Gradients(owned=((),), order=()), {0: norms()}) is None


def test_errors_say_where_and_survive_pickling() -> None:
    found = NonFinite(1, "c", math.inf, 2)
    for error in (
        gradient_error(found, 1, 7, agreed=True),
        gradient_error(found, 1, 7, agreed=False),
        scale_error(found, 1, 7, 2.0**-14, 30),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert isinstance(again, NonFiniteError)
        assert str(again) == str(error)
        assert str(again).startswith("stage 1, step 7: the gradient of c ")
        assert (again.step, again.stage, again.parameter, again.microbatch, again.position) == (7, 1, "c", None, 2)
    assert "no stage has updated" in str(gradient_error(found, 1, 7, agreed=True))
    assert "others may have" in str(gradient_error(found, 1, 7, agreed=False))
    assert "30 steps in a row, down to a loss scale of 6.1e-05" in str(scale_error(found, 1, 7, 2.0**-14, 30))
    loss = pickle.loads(pickle.dumps(loss_error(math.nan, 3, 2, 7)))
    assert "stage 2, step 7: the loss of microbatch 3 is nan; no stage has updated" in str(loss)
    assert (loss.microbatch, loss.parameter) == (3, None)
