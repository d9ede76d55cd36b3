from __future__ import annotations

import pytest
import torch

from raypipe.errors import CutError
from raypipe.parallel.elementwise import refuse_coupled

DIMS = {"embedding.weight": 2, "norm.weight": 1, "scale": 0}


def by_groups(parameters):
    wide = [p for name, p in parameters if p.dim() > 1]
    rest = [p for name, p in parameters if p.dim() <= 1]
    return torch.optim.AdamW([{"params": wide, "weight_decay": 0.1}, {"params": rest}], lr=1e-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.Adagrad(p),
        by_groups,
    ],
)
def test_elementwise_optimizers_pass(make) -> None:
    refuse_coupled(make, DIMS, "tensor_parallel")


class Normalised(torch.optim.SGD):
    """Divides a gradient by its norm, as LARS does."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= p.grad.norm()
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adafactor(p),
        lambda p: Normalised(p, lr=1e-2),
        lambda p: torch.optim.Muon([each for each in p if each[1].dim() == 2]),
    ],
    ids=["adafactor", "normalised", "muon"],
)
def test_optimizers_that_need_whole_parameters_are_refused(make) -> None:
    with pytest.raises(CutError, match="by other elements of it, but tensor_parallel leaves each rank with a slice"):
        refuse_coupled(make, DIMS, "tensor_parallel")


def test_what_the_users_code_refuses_is_not_ours() -> None:
    refuse_coupled(lambda p: 1 / 0, DIMS, "tensor_parallel")
