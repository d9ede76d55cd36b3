from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raypipe.model.denominators import Denominators

torch.manual_seed(0)
LOGITS, CLASSES = torch.randn(6, 5), torch.tensor([1, -100, 3, 0, -100, 2])
WEIGHT = torch.rand(5) + 0.1
HALF = torch.randn(6, 5)


def linear(**kwargs):
    return F.linear_cross_entropy(torch.eye(6, 5), torch.randn(5, 5), CLASSES, **kwargs)


CASES = [
    (lambda **k: F.cross_entropy(LOGITS, CLASSES, **k), 4),
    (lambda **k: F.cross_entropy(LOGITS, CLASSES, WEIGHT, **k), float(WEIGHT[[1, 3, 0, 2]].sum())),
    (lambda **k: F.cross_entropy(LOGITS, CLASSES, WEIGHT, label_smoothing=0.2, **k), float(WEIGHT[[1, 3, 0, 2]].sum())),
    (lambda **k: F.cross_entropy(LOGITS, CLASSES.clamp(min=0), ignore_index=0, **k), 3),
    (lambda **k: F.cross_entropy(LOGITS, HALF.softmax(1), WEIGHT, **k), 6),
    (lambda **k: F.cross_entropy(LOGITS[0], CLASSES[0], **k), 1),
    (lambda **k: F.cross_entropy(LOGITS.view(2, 5, 3), CLASSES.view(2, 3), **k), 4),
    (lambda **k: F.nll_loss(LOGITS.log_softmax(1), CLASSES, **k), 4),
    (lambda **k: F.mse_loss(LOGITS, HALF, **k), 30),
    (lambda **k: F.mse_loss(LOGITS, HALF, weight=HALF.abs(), **k), float(HALF.abs().sum())),
    (lambda **k: F.huber_loss(LOGITS, HALF, **k), 30),
    (lambda **k: F.binary_cross_entropy_with_logits(LOGITS, HALF.sigmoid(), pos_weight=WEIGHT, **k), 30),
]


@pytest.mark.parametrize(("loss", "count"), CASES, ids=range(len(CASES)))
def test_the_mean_is_the_sum_over_the_denominator(loss, count):
    with Denominators() as seen:
        mean, total = loss(), loss(reduction="sum")
    assert seen.values() == pytest.approx((count,))
    assert float(mean) == pytest.approx(float(total) / count, rel=1e-5)
    assert float(mean) == float(loss())


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has none")
def test_the_fused_linear_cross_entropy_is_seen_once():
    with Denominators() as seen:
        linear()
        linear(reduction="sum")
    assert seen.values() == (4.0,)


def test_modules_and_old_words_and_other_divergences():
    with Denominators() as seen:
        nn.CrossEntropyLoss()(LOGITS, CLASSES)
        F.kl_div(LOGITS.log_softmax(1), HALF.softmax(1), reduction="batchmean")
        F.cross_entropy(LOGITS, CLASSES, reduction="none")
        with pytest.warns(UserWarning, match="reduction"):
            F.cross_entropy(LOGITS, CLASSES, size_average=False)
        F.cross_entropy(LOGITS, torch.full((6,), -100))
    assert seen.values() == (4.0, 6.0, 0.0)


def test_faked_functions_return_the_number_and_are_still_counted():
    with Denominators(faked=0.5) as seen:
        fake = F.cross_entropy(LOGITS, CLASSES)
        loud = F.cross_entropy(LOGITS, CLASSES, reduction="sum")
    assert float(fake) == 0.5
    assert float(loud) > 0
    assert seen.values() == (4.0,)


def test_nothing_of_it_is_seen_by_other_modes_or_the_gradient():
    functions = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            functions.append(func)
            return func(*args, **(kwargs or {}))

    leaf = LOGITS.clone().requires_grad_()
    with Spy(), Denominators():
        loss = F.cross_entropy(leaf, CLASSES)
    assert functions == [F.cross_entropy]
    loss.backward()
    other = LOGITS.clone().requires_grad_()
    F.cross_entropy(other, CLASSES).backward()
    assert torch.equal(leaf.grad, other.grad)


def test_the_users_error_is_his_own():
    with Denominators() as seen, pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(LOGITS, CLASSES + 200)
    assert seen.values() == ()
