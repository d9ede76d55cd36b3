from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from raypipe.model.call import Caller
from raypipe.model.trial_run import Observed, in_process, tolerance_of


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels):
        ids.clamp_(max=3)
        return F.cross_entropy(self.head(F.dropout(self.embed(ids))), labels)


def test_it_observes_the_loss_and_what_it_averaged_over():
    model, batch = Tied(), {"ids": torch.tensor([1, 4, 2]), "labels": torch.tensor([1, -100, 2])}
    observe = in_process(model, Caller())
    with torch.no_grad():
        hidden = model.embed(torch.tensor([1, 3, 2]))
        loss = F.cross_entropy(model.head(hidden), batch["labels"])
    first = observe(batch)
    assert first.denominators == (2.0,)
    torch.testing.assert_close(first.loss, loss.item())
    assert observe(batch) == first
    assert observe(batch, faked=0.25) == Observed(0.25, (2.0,))
    assert batch["ids"].tolist() == [1, 4, 2]


def test_shaking_changes_the_loss_for_one_run_and_keeps_ties():
    model, batch = Tied(), {"ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}
    weight, values = model.embed.weight, model.embed.weight.detach().clone()
    observe = in_process(model, Caller())
    first = observe(batch)
    assert observe(batch, shaken=True) != first
    assert observe(batch, shaken=True) == observe(batch, shaken=True)
    assert observe(batch) == first
    assert model.embed.weight is weight
    assert model.head.weight is weight
    assert torch.equal(weight, values)


def test_tolerance_follows_the_coarsest_dtype():
    model = Tied()
    assert tolerance_of(model) == 2e-5
    model.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16))
    assert tolerance_of(model) > 1e-2
