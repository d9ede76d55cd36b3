"""Whether a rule that fits the losses also fits the gradients.

A term that is small beside the others hides in the rounding of the loss: a balance of experts with a coefficient of
0.001 moves it by a few parts in a million. The gradient of what that term alone trains (the router) does not hide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raypipe.errors import BatchError
from raypipe.model.call import Caller
from raypipe.model.denominators import Denominators
from raypipe.model.microbatch import BatchLayout, Microbatch
from raypipe.model.quiet import quiet
from raypipe.model.weights import LossRule

__all__ = ["check_gradients"]

_OF_OWN, _OF_ALL = 1e-4, 1e-6
"""Differences that count, relative to the parameter's gradient and to that of all together: rounding is far below."""


def check_gradients(model: nn.Module, caller: Caller, batch: Any, layout: BatchLayout, rule: LossRule) -> None:
    """Runs forwards and backwards of a few samples joined and apart; parameters and their gradients stay as they are.

    It needs memory for the model's gradients twice. A model whose backward fails here is not refused: the losses have
    agreed.

    Args:
        model: in the modes of training, in float32 or finer.
        caller: finds its loss.
        batch: of samples that tell rules apart.
        layout: the batch's.
        rule: to check.

    Raises:
        BatchError: a parameter's gradient is not what the rule makes of the separate ones.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pieces = layout.split(batch, 2)
    try:
        total, joined = _weighted([Microbatch(batch, 0, layout.samples(batch))], model, caller, rule, named)
        whole, summed = _weighted(pieces, model, caller, rule, named)
    except Exception:
        return
    sizes = {name: float(g.norm()) / total for name, g in joined.items()}
    everything = sum(size**2 for size in sizes.values()) ** 0.5
    for name, gradient in joined.items():
        difference = float((summed[name] / whole - gradient / total).norm())
        if difference > max(_OF_OWN * sizes[name], _OF_ALL * everything):
            raise BatchError(
                f"the gradient of {name} for {layout.samples(batch)} samples at once has the norm {sizes[name]:.3g}, "
                f"apart it differs by {difference:.3g}, so a small term of the loss compares samples with each other "
                "or averages over something else: give microbatch_weight ('samples', 'targets', 'sum' or a callable) "
                "if you know better, or use microbatches=1"
            )


def _weighted(
    microbatches: Sequence[Microbatch], model: nn.Module, caller: Caller, rule: LossRule, named: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The total of the weights, and the sum of the weighted gradients by name; zeros where there is none."""
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    weights = []
    for microbatch in microbatches:
        own = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, microbatch.batch)
        with quiet(model), torch.enable_grad():
            with Denominators() as seen:
                loss = caller.loss_of(caller.outputs(model, own), own)
            weights.append(rule.weigh(microbatch, seen.values()))
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None and weights[-1]:
                sums[name].add_(gradient, alpha=weights[-1])
    return rule.total(weights), sums
