from __future__ import annotations

import pytest
import torch
from torch import nn

from raypipe.model.precision import Precision, refuse_low_weights


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_matrix_products_run_in_the_low_type_and_weights_stay(name: str) -> None:
    precision, layer = Precision(name), nn.Linear(4, 4)
    with precision.autocast():
        made = layer(torch.rand(2, 4))
        assert torch.is_autocast_enabled("cpu") == (name != "fp32")
    assert made.dtype is (precision.dtype or torch.float32)
    made.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_a_cast_is_not_kept_for_others() -> None:
    """Neither is a weight's new value missed, nor are gradients of two uses summed in the low type."""
    layer = nn.Linear(2, 2, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.ones(1, 2)
    with Precision("bf16").autocast():
        before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1.0)
        assert (layer(x) - before).tolist() == [[2.0, 2.0]]
    one, other = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0**-9, 2.0**-9]])
    with Precision("bf16").autocast():
        (layer(one) + layer(other)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.unique().tolist() == [1 + 2.0**-9]  # in bfloat16: 1


def test_only_bfloat16_has_the_range_for_what_crosses_stages() -> None:
    assert [Precision(name).boundary for name in ("fp32", "bf16", "fp16")] == [None, torch.bfloat16, None]
    assert [Precision(name).scales_loss for name in ("fp32", "bf16", "fp16")] == [False, False, True]


@pytest.mark.parametrize("name", ["fp8", "float16", None, torch.bfloat16])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"precision is .*, but must be 'fp32', 'bf16', 'fp16'"):
        Precision(name)  # type: ignore[arg-type]


def test_weights_to_train_must_be_in_float32() -> None:
    model = nn.Sequential(nn.Linear(2, 2).bfloat16().requires_grad_(False), nn.Linear(2, 2))
    refuse_low_weights(model, Precision("bf16"))
    model[0].weight.requires_grad_()
    refuse_low_weights(model, Precision())
    with pytest.raises(ValueError, match=r"precision='fp16' trains .* 0\.weight is torch\.bfloat16; call model\.float"):
        refuse_low_weights(model, Precision("fp16"))
