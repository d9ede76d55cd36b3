"""The end of a step on one rank: shared weights, the batch's divisor, the global norm, the update.

With G_p the sum of a parameter's microbatch gradients and T the batch's divisor, the gradient is G_p / T and the global
norm that of all G_p / T together, each parameter once, summed in model order so that it does not depend on the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raypipe.stage.protocol import RankWork
from raypipe.stage.spec import Gradients, OptimizerMaker, SchedulerMaker
from raypipe.transport.base import Handle, Transport

__all__ = ["StageOptimizer", "Update", "global_norm"]


@dataclass(frozen=True, slots=True)
class Update:
    """What a step's end tells.

    Attributes: ``norms``, float64 of shape [owned], each owned parameter's gradient norm before clipping; ``lr`` of
    each parameter group in this step, none where the batch was refused.
    """

    norms: Tensor
    lr: tuple[float, ...]


class StageOptimizer:
    """The optimizer of the parameters that one rank holds.

    Args:
        rank: this one.
        parameters: held by it, by name.
        gradients: whose gradients are whose.
        make: the user's ``optimizer``; not called where nothing is trainable.
        make_scheduler: the user's ``lr_scheduler``.
        max_grad_norm: bound of the global norm, or None.
        divisor_rank: the rank that knows what gradients are divided by, or None where each backward did that.
        norms: gives the gradients' norms of the parameters named, float64 of shape [names]; None: they are whole here.
        leader: the rank of its tensor group that counts them, where it is another.

    Raises:
        TypeError: ``make`` returned no optimizer, or one that needs the whole model; ``make_scheduler`` one that needs
            a metric.
    """

    def __init__(
        self,
        rank: int,
        parameters: Mapping[str, nn.Parameter],
        gradients: Gradients,
        make: OptimizerMaker,
        make_scheduler: SchedulerMaker | None,
        max_grad_norm: float | None,
        divisor_rank: int | None,
        norms: Callable[[Sequence[str]], Tensor] | None = None,
        leader: int | None = None,
    ) -> None:
        self._rank, self._gradients, self._max_norm = rank, gradients, max_grad_norm
        self._divisor_rank = divisor_rank
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._counted = gradients.owned[rank if leader is None else leader]
        self._norms_of = norms or self._own_norms
        self._lengths = [
            (rank_ == divisor_rank) + (len(owned) if max_grad_norm is not None else 0)
            for rank_, owned in enumerate(gradients.owned)
        ]
        # Without norms to gather, the divisor is all that is told; it is known long before the step's end.
        self._early = max_grad_norm is None and divisor_rank is not None
        self._told: Handle[list[Tensor]] | None = None
        self.optimizer = _checked_optimizer(make(list(self._parameters.items()))) if self._parameters else None
        self.scheduler = None
        if self.optimizer is not None and make_scheduler is not None:
            self.scheduler = _checked_scheduler(make_scheduler(self.optimizer))

    def begin(self, transport: Transport) -> None:
        """At a step's begin, before any other collective of it: gets ready to be told the divisor, where it is early.

        So no rank waits for another's last backward: each updates its weights as soon as its own gradients are there.
        """
        self._told = None
        if self._early and self._rank != self._divisor_rank:
            self._told = self._tell(transport, [])

    def tell(self, transport: Transport, divisor: float) -> None:
        """On the rank that knows the divisor, as soon as it does: tells the others where that can be early.

        Args:
            transport: of this rank.
            divisor: as ``finish`` takes it.
        """
        if self._early and self._told is None:
            self._told = self._tell(transport, [float(divisor)])

    def _tell(self, transport: Transport, numbers: list[float]) -> Handle[list[Tensor]]:
        return transport.all_gather(torch.tensor(numbers, dtype=torch.float64), self._lengths)

    def finish(self, transport: Transport, divisor: float) -> RankWork[Update]:
        """Reduces, clips and steps.

        Args:
            transport: of this rank.
            divisor: what the gradients are still to be divided by, on the rank that knows it; 0 for a batch that is
                refused: its gradients are thrown away. Where no rank is to tell it, all ranks know that alike.
        """
        yield from self._reduce_shared(transport)
        norms = self._norms_of(self._counted)[: len(self._gradients.owned[self._rank])]
        scale: float | None = 1.0
        told = [float(divisor)] if self._rank == self._divisor_rank else []
        if self._early:
            handle = self._told or self._tell(transport, told)
            self._told = None
            yield handle
            scale = self._scale(handle.result())
        elif any(self._lengths):
            vector = torch.cat([torch.tensor(told, dtype=torch.float64), norms])
            handle = transport.all_gather(vector, self._lengths)
            yield handle
            scale = self._scale(handle.result())
        if scale is None or not divisor:
            self._drop_gradients()
            return Update(norms, ())
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)
        lr = self._step()
        return Update(norms, lr)

    def _scale(self, gathered: list[Tensor]) -> float | None:
        """What every gradient is multiplied by: 1 / T, and the clip coefficient of ``clip_grad_norm_``.

        None where the batch was refused.
        """
        divisor = 1.0
        if self._divisor_rank is not None:
            divisor = float(gathered[self._divisor_rank][0])
            if not divisor:
                return None
            gathered = [v[1:] if rank == self._divisor_rank else v for rank, v in enumerate(gathered)]
        if self._max_norm is None:
            return 1.0 / divisor
        coefficient = self._max_norm / (global_norm(self._gradients, gathered) / divisor + 1e-6)
        # Not min(1, ...): a NaN must reach every stage's gradients, as clip_grad_norm_ has it.
        return (1.0 if coefficient >= 1.0 else coefficient) / divisor

    def _reduce_shared(self, transport: Transport) -> RankWork[None]:
        for ranks, names in self._gradients.shared.items():
            if self._rank not in ranks:
                continue
            held = [self._parameters[name] for name in names]
            # A parameter that got no gradient on any holder must stay without one: optimizers skip it then.
            there = torch.tensor([float(p.grad is not None) for p in held])
            sums = [p.grad if p.grad is not None else torch.zeros_like(p) for p in held]
            handle = transport.all_reduce([*sums, there], ranks)
            yield handle
            for parameter, total, count in zip(held, sums, there.tolist(), strict=True):
                parameter.grad = total if count else None

    def _own_norms(self, names: Sequence[str]) -> Tensor:
        owned = [_norm(self._parameters[name]) for name in names]
        return torch.stack(owned).double() if owned else torch.zeros(0).double()

    def _drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _step(self) -> tuple[float, ...]:
        if self.optimizer is None:
            return ()
        lr = tuple(float(group["lr"]) for group in self.optimizer.param_groups)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        return lr


def global_norm(gradients: Gradients, norms: list[Tensor]) -> float:
    """The norm of all parameters' norms, float64 of shape [owned] by rank, taken in model order."""
    by_name = {
        name: norm
        for owned, vector in zip(gradients.owned, norms, strict=True)
        for name, norm in zip(owned, vector.tolist(), strict=True)
    }
    ordered = torch.tensor([by_name[name] for name in gradients.order], dtype=torch.float64)
    return float(torch.linalg.vector_norm(ordered)) if len(ordered) else 0.0


def _norm(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(parameter.grad)
    return norm


def _checked_optimizer(made: object) -> torch.optim.Optimizer:
    if isinstance(made, torch.optim.LBFGS):
        raise TypeError(
            "optimizer gave an LBFGS, which needs the whole model's gradient at once; use AdamW, SGD or the like"
        )
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer gave a {type(made).__name__}; it must return a torch.optim.Optimizer")
    return made


def _checked_scheduler(made: object) -> torch.optim.lr_scheduler.LRScheduler:
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "lr_scheduler gave a ReduceLROnPlateau, which needs a metric; use one that is stepped by steps alone"
        )
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler):
        raise TypeError(
            f"lr_scheduler gave a {type(made).__name__}; it must return a torch.optim.lr_scheduler.LRScheduler"
        )
    return made
