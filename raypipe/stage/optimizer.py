"""The end of a step on one rank: shared weights and replicas, the batch's divisor, the global norm, the update.

With G_p the sum of a parameter's microbatch gradients and T the batch's divisor, the gradient is G_p / T and the global
norm that of all G_p / T together, each parameter once, summed in model order so that it does not depend on the cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raypipe.stage.non_finite import NonFinite, find_non_finite
from raypipe.stage.protocol import RankWork
from raypipe.stage.reduction import Reduction
from raypipe.stage.spec import Gradients, OptimizerMaker, SchedulerMaker
from raypipe.stage.tally import Tellers
from raypipe.transport.base import Handle, Transport

__all__ = ["StageOptimizer", "Update", "global_norm"]


@dataclass(frozen=True, slots=True)
class Update:
    """What a step's end tells.

    Attributes: ``norms``, float64 of shape [owned], each owned parameter's gradient norm before clipping; ``lr`` of
    each parameter group in this step, none where the batch was refused; ``told``, what each teller told;
    ``non_finite``, why this rank has not stepped; ``refused``, whether the batch was.
    """

    norms: Tensor
    lr: tuple[float, ...]
    told: tuple[tuple[float, ...], ...] = ()
    non_finite: NonFinite | None = None
    refused: bool = False


class StageOptimizer:
    """The optimizer of the parameters that one rank holds.

    Args:
        rank: this one.
        parameters: held by it, by name.
        gradients: whose gradients are whose.
        make: the user's ``optimizer``; not called where nothing is trainable.
        make_scheduler: the user's ``lr_scheduler``.
        max_grad_norm: bound of the global norm, or None.
        divisor_rank: the rank that knows what gradients are divided by, or the several that know it together; None
            where each backward did that.
        sharded: whether this rank steps what it owns alone, and then sends it to the other holders.
        agree: whether no rank may step before all know that every gradient is finite; as it is where they are clipped.
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
        divisor_rank: int | Tellers | None,
        *,
        sharded: bool = False,
        agree: bool = False,
        norms: Callable[[Sequence[str]], Tensor] | None = None,
        leader: int | None = None,
    ) -> None:
        self._rank, self._gradients, self._max_norm = rank, gradients, max_grad_norm
        self._tellers = Tellers.of(divisor_rank)
        self.agrees = max_grad_norm is not None or agree
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._counted = gradients.owned[rank if leader is None else leader]
        self._norms_of = norms or self._own_norms
        self._lengths = [
            (self._tellers.length if rank_ in self._tellers.ranks else 0) + (len(owned) if self.agrees else 0)
            for rank_, owned in enumerate(gradients.owned)
        ]
        # Without norms to gather, the divisor is all that is told; it is known long before the step's end.
        self._early = not self.agrees and bool(self._tellers.ranks)
        self._told: Handle[list[Tensor]] | None = None
        self._reduction = Reduction(rank, self._parameters, gradients, sharded=sharded)
        stepped = {name: self._parameters[name] for name in gradients.stepped_by(rank)} if sharded else self._parameters
        self.optimizer = _checked_optimizer(make(list(stepped.items()))) if stepped else None
        self.scheduler = None
        if self.optimizer is not None and make_scheduler is not None:
            self.scheduler = _checked_scheduler(make_scheduler(self.optimizer))

    def begin(self, transport: Transport) -> None:
        """At a step's begin, before any other collective of it: gets ready to be told the divisor, where it is early.

        So no rank waits for another's last backward: each updates its weights as soon as its own gradients are there.
        """
        self._told = None
        if self._early and self._rank not in self._tellers.ranks:
            self._told = self._tell(transport, [])

    def tell(self, transport: Transport, divisor: float | Sequence[float]) -> None:
        """On the rank that knows the divisor, as soon as it does: tells the others where that can be early.

        Args:
            transport: of this rank.
            divisor: as ``finish`` takes it.
        """
        if self._early and self._told is None:
            self._told = self._tell(transport, _numbers(divisor))

    def _tell(self, transport: Transport, numbers: Sequence[float]) -> Handle[list[Tensor]]:
        return transport.all_gather(torch.tensor(numbers, dtype=torch.float64), self._lengths)

    def finish(
        self, transport: Transport, divisor: float | Sequence[float], loss_scale: float = 1.0
    ) -> RankWork[Update]:
        """Reduces, clips and steps; drops gradients of which one is not finite, as far as this rank knows.

        Args:
            transport: of this rank.
            divisor: what the gradients are still to be divided by, on the rank that knows it; 0 for a batch that is
                refused: its gradients are thrown away. Where no rank is to tell it, all ranks know that alike. Where
                several know it together, what this one tells. NaN where the loss is not finite.
            loss_scale: what else they are to be divided by; 1 where ranks do not agree.
        """
        told = _numbers(divisor) if self._rank in self._tellers.ranks else []
        if self._early and self._told is None:  # before the sums, which may go the same way
            self._told = self._tell(transport, told)
        yield from self._reduction.sum(transport)
        norms = self._norms_of(self._counted)[: len(self._gradients.owned[self._rank])]
        scale: float | None = 1.0
        numbers: tuple[tuple[float, ...], ...] = ()
        seen = {self._rank: norms}
        if any(self._lengths):
            handle, self._told = self._told, None
            if handle is None:
                handle = self._tell(transport, [*told, *norms.tolist()])
            yield handle
            numbers, vectors = self._apart(handle.result())
            scale = self._scale(numbers, vectors, loss_scale)
            seen = dict(enumerate(vectors)) if self.agrees else seen
        if scale is None or not divisor:
            self._drop_gradients()
            return Update(norms, (), numbers, refused=True)
        found = find_non_finite(self._gradients, seen)
        if found is None and math.isnan(scale) and self._tellers.ranks:
            found = NonFinite(self._tellers.ranks[0])
        if found is not None:
            self._drop_gradients()
            return Update(norms, self._rates(), numbers, found)
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)
        lr = self._step()
        yield from self._reduction.spread(transport)
        return Update(norms, lr, numbers)

    def _apart(self, gathered: Sequence[Tensor]) -> tuple[tuple[tuple[float, ...], ...], list[Tensor]]:
        """What the tellers told, and every rank's norms."""
        ranks, length = self._tellers.ranks, self._tellers.length
        numbers = tuple(tuple(gathered[rank][:length].tolist()) for rank in ranks)
        return numbers, [v[length:] if rank in ranks else v for rank, v in enumerate(gathered)]

    def _scale(self, told: Sequence[Sequence[float]], norms: list[Tensor], loss_scale: float) -> float | None:
        """What every gradient is multiplied by: 1 / T / loss_scale, and the clip coefficient of ``clip_grad_norm_``.

        None where the batch was refused.
        """
        divisor = self._tellers.divisor(told)
        if not divisor:
            return None
        divisor *= loss_scale
        if self._max_norm is None:
            return 1.0 / divisor
        coefficient = self._max_norm / (global_norm(self._gradients, norms) / divisor + 1e-6)
        return min(1.0, coefficient) / divisor

    def _own_norms(self, names: Sequence[str]) -> Tensor:
        owned = [_norm(self._parameters[name]) for name in names]
        return torch.stack(owned).double() if owned else torch.zeros(0).double()

    def _drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _step(self) -> tuple[float, ...]:
        if self.optimizer is None:
            return ()
        lr = self._rates()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        return lr

    def _rates(self) -> tuple[float, ...]:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return tuple(float(group["lr"]) for group in groups)


def global_norm(gradients: Gradients, norms: list[Tensor]) -> float:
    """The norm of all parameters' norms, float64 of shape [owned] by rank, taken in model order."""
    by_name = {
        name: norm
        for owned, vector in zip(gradients.owned, norms, strict=True)
        for name, norm in zip(owned, vector.tolist(), strict=True)
    }
    ordered = torch.tensor([by_name[name] for name in gradients.order], dtype=torch.float64)
    return float(torch.linalg.vector_norm(ordered)) if len(ordered) else 0.0


def _numbers(told: float | Sequence[float]) -> list[float]:
    return [float(number) for number in told] if isinstance(told, Sequence) else [float(told)]


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
