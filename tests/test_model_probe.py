from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raypipe.errors import BatchError
from raypipe.model.call import Caller
from raypipe.model.denominators import Denominators
from raypipe.model.microbatch import find_layout
from raypipe.model.probe import find_rule
from raypipe.model.weights import LossRule, Rule

VOCAB = 11
CLASS_WEIGHT = torch.rand(VOCAB, generator=torch.Generator().manual_seed(3)) + 0.2


class Toy(nn.Module):
    """A causal model with dropout whose loss is what ``term`` makes of (logits, labels, mask)."""

    def __init__(self, term, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 16)
        self.mix = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, VOCAB)
        self.term = term
        self.p = 0.3
        if head is not None:
            nn.init.constant_(self.head.weight, head)
            nn.init.constant_(self.head.bias, head)

    def forward(self, ids, labels, mask=None):
        hidden = F.dropout(self.mix(self.embed(ids))[0], self.p, self.training)
        return {"loss": self.term(self.head(hidden), labels, mask)}


def batch_of(samples: int, padded: bool = True, length: int = 9):
    generator = torch.Generator().manual_seed(samples)
    ids = torch.randint(1, VOCAB, (samples, length), generator=generator)
    lengths = torch.tensor([max(2, length - 3 * (i % 3)) for i in range(samples)]) if padded else length
    mask = torch.arange(length) < (lengths[:, None] if padded else length)
    mask = mask.expand(samples, length).clone()
    return {"ids": ids * mask, "labels": torch.where(mask, ids, -100), "mask": mask.long()}


def ce(logits, labels, reduction="mean", **kwargs):
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), reduction=reduction, **kwargs)


def rows(logits, labels):
    """Cross-entropies of shape [samples, length - 1], 0 where ignored."""
    return ce(logits, labels, "none").view(len(logits), -1)


def masked_mean(logits, labels, mask):
    return (rows(logits, labels.clamp(min=0)) * mask[:, 1:]).sum() / mask[:, 1:].sum()


def valid_mean(logits, labels, mask):
    return ce(logits, labels, "sum") / (labels[:, 1:] != -100).sum()


def one_by_one(logits, labels, mask):
    return sum(ce(logits[i : i + 1], labels[i : i + 1]) for i in range(len(logits))) / len(logits)


def contrastive(logits, labels, mask):
    pooled = F.normalize(logits.mean(1), dim=-1)
    return F.cross_entropy(pooled @ pooled.T * 5, torch.arange(len(pooled)))


def load_balance(logits, labels, mask):
    share = logits.softmax(-1).mean((0, 1))
    return ce(logits, labels) + 1e-3 * VOCAB * (share * share).sum()


ACCEPTED = {
    "mean": (lambda lo, la, m: ce(lo, la), Rule.TARGETS),
    "class weights": (lambda lo, la, m: ce(lo, la, weight=CLASS_WEIGHT), Rule.TARGETS),
    "smoothing": (lambda lo, la, m: ce(lo, la, label_smoothing=0.1), Rule.TARGETS),
    "weights and smoothing": (lambda lo, la, m: ce(lo, la, weight=CLASS_WEIGHT, label_smoothing=0.1), Rule.TARGETS),
    "own ignore_index": (lambda lo, la, m: ce(lo, la.clamp(min=0), ignore_index=0), Rule.TARGETS),
    "nll": (lambda lo, la, m: F.nll_loss(lo.log_softmax(-1).transpose(1, 2), la), Rule.TARGETS),
    "two of a kind": (lambda lo, la, m: ce(lo, la) + 0.1 * ce(2 * lo, la), Rule.TARGETS),
    "binary": (lambda lo, la, m: F.binary_cross_entropy_with_logits(lo[..., 0], m.float()), Rule.TARGETS),
    "masked squares": (lambda lo, la, m: F.mse_loss(lo[..., 0][m > 0], la[m > 0].float()), Rule.TARGETS),
    "regularised": (lambda lo, la, m: ce(lo, la) + 0.01 * CLASS_WEIGHT.sum(), Rule.TARGETS),
    "z-loss over valid": (
        lambda lo, la, m: ce(lo, la) + 0.1 * lo[:, :-1].logsumexp(-1)[la[:, 1:] != -100].square().mean(),
        Rule.TARGETS,
    ),
    "sum": (lambda lo, la, m: ce(lo, la, "sum"), Rule.SUM),
    "sum over a constant": (lambda lo, la, m: rows(lo, la).sum() / 4096, Rule.SUM),
    "mean by hand": (lambda lo, la, m: rows(lo, la).mean(), Rule.SAMPLES),
    "mean of means": (
        lambda lo, la, m: (rows(lo, la).sum(1) / (la[:, 1:] != -100).sum(1).clamp(min=1)).mean(),
        Rule.SAMPLES,
    ),
    "one by one": (one_by_one, Rule.SAMPLES),
    "a metric beside": (lambda lo, la, m: ce(lo, la) * 0 + rows(lo, la).mean(), Rule.SAMPLES),
}

REFUSED = {
    "mean by hand over a mask": masked_mean,
    "mean by hand over valid labels": valid_mean,
    "contrastive": contrastive,
    "load balance": load_balance,
    "root": lambda lo, la, m: ce(lo, la).sqrt(),
    "in-batch ranking": lambda lo, la, m: (lo.mean((1, 2)) - lo.mean()).square().sum() + rows(lo, la).mean(),
}


def whole(model, caller, batch):
    model.zero_grad()
    loss = caller.loss_of(caller.outputs(model, batch), batch)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def in_microbatches(model, caller, batch, layout, rule: LossRule, count: int):
    """What an executor does: each loss by its weight, gradients normalised at the end."""
    model.zero_grad()
    losses, weights, denominators = [], [], []
    for piece in layout.split(batch, count):
        with Denominators() as seen:
            loss = caller.loss_of(caller.outputs(model, piece.batch), piece.batch)
        denominators.append(seen.values())
        weights.append(rule.weigh(piece, denominators[-1]))
        losses.append(loss.item() * weights[-1] if weights[-1] else 0.0)
        if weights[-1]:
            (loss * weights[-1]).backward()
    rule.check(weights, denominators)
    total = rule.total(weights)
    return math.fsum(losses) / total, [p.grad / total for p in model.parameters()]


def assert_exact(model, caller, batch, layout, rule, count):
    for module in model.modules():
        module.p = 0.0  # dropout is keyed by the executor, not here
    loss, gradients = whole(model, caller, batch)
    split_loss, split_gradients = in_microbatches(model, caller, batch, layout, rule, count)
    assert split_loss == pytest.approx(loss, rel=1e-6)
    for one, other in zip(gradients, split_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6 * float(one.abs().max()) + 1e-12)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_the_rule_found_gives_the_unsplit_loss_and_gradient(name, padded):
    term, expected = ACCEPTED[name]
    first = batch_of(7, padded)
    layout = find_layout(first)
    model = Toy(term)
    rule = find_rule(model, Caller(), first, layout)
    assert rule.weight is expected
    for count in (2, 3, 7):
        assert_exact(model, Caller(), first, layout, rule, count)
    assert_exact(model, Caller(), batch_of(5), layout, rule, 3)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_rule_splits_is_refused(name, padded):
    batch = batch_of(6, padded)
    with pytest.raises(BatchError, match="give microbatch_weight") as error:
        find_rule(Toy(REFUSED[name]), Caller(), batch, find_layout(batch))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_small_batches_are_probed_too(samples):
    batch = batch_of(samples)
    layout = find_layout(batch)
    for name in ("mean", "sum", "mean by hand"):
        term, expected = ACCEPTED[name]
        assert find_rule(Toy(term), Caller(), batch, layout).weight is expected
    for term in (contrastive, masked_mean):
        with pytest.raises(BatchError, match="give microbatch_weight"):
            find_rule(Toy(term), Caller(), batch, layout)


@pytest.mark.parametrize("head", [0.0, 0.3])
def test_a_head_that_starts_constant_hides_nothing(head):
    # Every sample has the same loss then, and any weighted mean of equal numbers would do.
    batch = batch_of(6)
    layout = find_layout(batch)
    assert find_rule(Toy(ACCEPTED["mean"][0], head), Caller(), batch, layout).weight is Rule.TARGETS
    for term in (masked_mean, valid_mean):
        model = Toy(term, head)
        with pytest.raises(BatchError, match="give microbatch_weight"):
            find_rule(model, Caller(), batch, layout)
        assert bool((model.head.weight == head).all())


def test_terms_with_different_denominators_are_watched():
    """Right while every batch is full, and an error as soon as one is not."""

    def term(logits, labels, mask):
        return ce(logits, labels) + (logits[..., 0] ** 2).mean()

    batch = batch_of(6, padded=False)
    layout = find_layout(batch)
    model = Toy(term)
    rule = find_rule(model, Caller(), batch, layout)
    assert rule == LossRule(Rule.SAMPLES, watched=True)
    assert_exact(model, Caller(), batch, layout, rule, 3)
    with pytest.raises(BatchError, match="give microbatch_weight"):
        in_microbatches(model, Caller(), batch_of(5), layout, rule, 3)
    with pytest.raises(BatchError, match="give microbatch_weight"):
        find_rule(model, Caller(), batch_of(6), layout)


def test_two_loss_functions_that_part_ways_later_are_refused_then():
    def term(logits, labels, mask):
        return ce(logits, labels) + F.mse_loss(logits[..., 0], torch.zeros_like(logits[..., 0]))

    batch = batch_of(6, padded=False)
    layout = find_layout(batch)
    model = Toy(term)
    rule = find_rule(model, Caller(), batch, layout)
    assert_exact(model, Caller(), batch, layout, rule, 4)
    with pytest.raises(BatchError, match="a loss function averages over"):
        in_microbatches(model, Caller(), batch_of(5), layout, rule, 3)


def test_a_microbatch_without_targets_weighs_nothing():
    batch = batch_of(4)
    batch["labels"][2:] = -100
    layout = find_layout(batch)
    model = Toy(ACCEPTED["mean"][0])
    rule = find_rule(model, Caller(), batch, layout)
    assert_exact(model, Caller(), batch, layout, rule, 2)


def test_pairs_with_a_loss_and_a_model_that_cuts_on_the_wrong_dimension():
    torch.manual_seed(0)
    pair = (torch.randn(6, 5), torch.randint(0, 3, (6,)))
    model, caller = nn.Linear(5, 3), Caller(loss=nn.CrossEntropyLoss(weight=CLASS_WEIGHT[:3]))
    rule = find_rule(model, caller, pair, find_layout(pair))
    assert rule.weight is Rule.TARGETS
    assert_exact(model, caller, pair, find_layout(pair), rule, 4)
    wrong = {"x": torch.randn(6, 4), "table": torch.randn(4, 6)}
    forward = Caller(forward=lambda m, b: (b["x"] @ b["table"][:, : len(b["x"])]).square().mean())
    with pytest.raises(BatchError, match="batch_dims if a tensor is cut on the wrong dimension"):
        find_rule(model, forward, wrong, find_layout(wrong, {"table": None}))


def test_what_the_user_gives_is_taken_at_its_word_without_a_forward():
    batch = batch_of(3)

    def weight(microbatch):
        return float(microbatch["mask"][:, 1:].sum())

    model = Toy(masked_mean)
    rule = find_rule(model, Caller(), batch, find_layout(batch), weight)
    assert_exact(model, Caller(), batch, find_layout(batch), rule, 2)
    assert find_rule(Toy(None), Caller(), batch, find_layout(batch), "sum") == LossRule(Rule.SUM)
    with pytest.raises(ValueError, match="microbatch_weight is 'token'"):
        find_rule(model, Caller(), batch, find_layout(batch), "token")


def test_the_users_exception_comes_out_as_itself():
    def term(logits, labels, mask):
        raise KeyError("mine")

    batch = batch_of(3)
    with pytest.raises(KeyError, match="mine"):
        find_rule(Toy(term), Caller(), batch, find_layout(batch))


def test_a_loss_that_is_not_finite_is_said_to_be_so():
    batch = batch_of(3)
    with pytest.raises(BatchError, match="the loss of the first samples is nan"):
        find_rule(Toy(lambda lo, la, m: ce(lo, la) * math.nan), Caller(), batch, find_layout(batch))


def test_the_model_its_batch_and_the_random_state_are_left_alone():
    def term(logits, labels, mask):
        labels[:, 0] = -100
        return ce(logits, labels)

    batch = batch_of(4)
    before = {k: v.clone() for k, v in batch.items()}
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    find_rule(Toy(term), Caller(), batch, find_layout(batch))
    torch.set_rng_state(rng)
    pair = (torch.randn(6, 4), torch.randn(6, 4))
    rng = torch.get_rng_state()
    assert find_rule(model, Caller(loss=F.mse_loss), pair, find_layout(pair, (0, 0))).weight is Rule.TARGETS
    assert all(torch.equal(batch[k], v) for k, v in before.items())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_bfloat16_is_probed_within_its_rounding():
    batch = batch_of(6)
    model = Toy(ACCEPTED["mean"][0]).to(torch.bfloat16)
    assert find_rule(model, Caller(), batch, find_layout(batch)).weight is Rule.TARGETS
    with pytest.raises(BatchError, match="give microbatch_weight"):
        find_rule(Toy(contrastive).to(torch.bfloat16), Caller(), batch, find_layout(batch))
