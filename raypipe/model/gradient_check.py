"""Whether a rule that fits the losses also fits the gradients.

A term that is small beside the others hides in the rounding of the loss: a balance of experts with a coefficient of
0.001 moves it by a few parts in a million. The gradient of what that term alone trains (the router) does not hide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raypipe.errors import BatchError, CutError
from raypipe.model.call import Caller
from raypipe.model.denominators import Denominators
from raypipe.model.microbatch import BatchLayout, Microbatch
from raypipe.model.quiet import quiet
from raypipe.model.weights import LossRule

__all__ = ["GradientsOf", "check_gradients", "in_process"]

GradientsOf = Callable[[Any], tuple[tuple[float, ...], dict[str, Tensor]]]
"""From a batch to what its loss functions averaged over, and its gradients by name (or linear images of them)."""

_OF_OWN, _OF_ALL = 1e-4, 1e-6
"""Differences that count, relative to the parameter's gradient and to that of all together: rounding is far below."""


def check_gradients(gradients_of: GradientsOf, batch: Any, layout: BatchLayout, rule: LossRule) -> None:
    """Runs forwards and backwards of a few samples joined and apart.

    A model whose backward fails here is not refused: the losses have agreed.

    Args:
        gradients_of: runs the model.
        batch: of samples that tell rules apart.
        layout: the batch's.
        rule: to check.

    Raises:
        BatchError: a parameter's gradient is not what the rule makes of the separate ones.
    """
    try:
        total, joined = _weighted([Microbatch(batch, 0, layout.samples(batch))], gradients_of, rule)
        whole, summed = _weighted(layout.split(batch, 2), gradients_of, rule)
    except CutError as error:  # a checkpoint runs its part again where weights that are nowhere cannot be made
        raise BatchError(
            "the loss is made by hand, and the gradients of a model given as a callable cannot be compared where it "
            f"uses torch.utils.checkpoint ({error.args[0].split(',')[0]}): give microbatch_weight ('samples', 'sum' or "
            "a callable), or turn the checkpoints on in the built model and give that"
        ) from None
    except Exception:
        return
    sizes = {name: float(g.norm()) / total for name, g in joined.items()}
    everything = sum(size**2 for size in sizes.values()) ** 0.5
    for name in joined.keys() | summed.keys():
        parts = [sums[name] / by for sums, by in ((summed, whole), (joined, -total)) if name in sums]
        difference, size = float(sum(parts[1:], parts[0]).norm()), sizes.get(name, 0.0)
        if difference > max(_OF_OWN * size, _OF_ALL * everything):
            raise BatchError(
                f"the gradient of {name} for {layout.samples(batch)} samples at once has the norm {size:.3g}, "
                f"apart it differs by {difference:.3g}, so a small term of the loss compares samples with each other "
                "or averages over something else: give microbatch_weight ('samples', 'targets', 'sum' or a callable) "
                "if you know better, or use microbatches=1"
            )


def in_process(model: nn.Module, caller: Caller) -> GradientsOf:
    """Runs the model in this process; parameters and their gradients stay as they are.

    Args:
        model: in the modes of training, in float32 or finer.
        caller: finds its loss.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients_of(batch: Any) -> tuple[tuple[float, ...], dict[str, Tensor]]:
        own = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        with quiet(model), torch.enable_grad():
            with Denominators() as seen:
                loss = caller.loss_of(caller.outputs(model, own), own)
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return seen.values(), {n: g for n, g in zip(named, gradients, strict=True) if g is not None}

    return gradients_of


def _weighted(
    microbatches: Sequence[Microbatch], gradients_of: GradientsOf, rule: LossRule
) -> tuple[float, dict[str, Tensor]]:
    """The total of the weights, and the sum of the weighted gradients by name."""
    sums: dict[str, Tensor] = {}
    weights = []
    for microbatch in microbatches:
        denominators, gradients = gradients_of(microbatch.batch)
        weights.append(rule.weigh(microbatch, denominators))
        if weights[-1]:
            for name, gradient in gradients.items():
                sums[name] = sums[name] + gradient * weights[-1] if name in sums else gradient * weights[-1]
    return rule.total(weights), sums
