"""Finding the rule by which microbatches weigh: a few samples are run joined and apart, before the first step.

A rule is right if it makes the joined loss from the separate ones, in every trial:

1. The samples as they are, chosen so that their masks and labels differ in length where the batch has such. Where the
   two losses are too alike to tell rules apart (a head that starts at zero), the last parameters are shaken first.
2. With the loss functions of PyTorch silenced, where they were seen: what remains must follow the same rule. If
   nothing remains, the loss is theirs alone and their denominators are exact whatever comes later.
3. Else with masks, labels and numbers of one piece cut short, so that a mean made by hand over a mask does not pass
   for one over samples because the first batch happened to be full. A trial that the model cannot run is left out.

What cannot be known: a term that is smaller than the tolerance beside the others, or that shows in later batches only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from raypipe.errors import BatchError
from raypipe.model.call import Caller
from raypipe.model.microbatch import BatchLayout
from raypipe.model.quiet import quiet
from raypipe.model.shorten import shortened
from raypipe.model.weights import Denominators, LossRule, Rule

__all__ = ["Observe", "Observed", "find_rule", "probe"]

_ALIKE = 1e-2  # losses that differ by less, relatively, do not tell rules apart


@dataclass(frozen=True, slots=True)
class Observed:
    """A loss, and what each loss function on its way averaged over."""

    loss: float
    denominators: tuple[float, ...] = ()


class Observe(Protocol):
    """Runs a model's forward on a batch, without randomness, and leaves no trace."""

    def __call__(self, batch: Any, *, silenced: bool = False, shaken: bool = False) -> Observed:
        """``silenced``: loss functions return zero; ``shaken``: with noise on the last parameters."""


@dataclass(frozen=True, slots=True)
class _Trial:
    """Samples run joined, and apart as pieces of these numbers of samples."""

    joined: Observed
    pieces: tuple[Observed, ...]
    samples: tuple[int, ...]

    def losses(self) -> list[float]:
        return [self.joined.loss, *(piece.loss for piece in self.pieces)]

    def weights(self, rule: Rule) -> list[float] | None:
        """None where the rule does not apply."""
        if rule is not Rule.TARGETS:
            return [1.0 if rule is Rule.SUM else float(size) for size in self.samples]
        rows = [piece.denominators for piece in self.pieces]
        if not self.countable() or not math.isclose(
            sum(row[0] for row in rows), self.joined.denominators[0], rel_tol=1e-5
        ):
            return None
        return [row[0] for row in rows]

    def countable(self) -> bool:
        """Whether loss functions ran, as many in each piece as in the joined run (and not one for each sample)."""
        calls = len(self.joined.denominators)
        return calls > 0 and all(len(piece.denominators) == calls for piece in self.pieces)

    def fits(self, rule: Rule, tolerance: float) -> bool:
        weights = self.weights(rule)
        if weights is None or not any(weights):
            return False
        terms = [w * piece.loss for w, piece in zip(weights, self.pieces, strict=True) if w]
        predicted = math.fsum(terms) / (1.0 if rule is Rule.SUM else math.fsum(weights))
        scale = max(abs(loss) for loss in (*terms, self.joined.loss, predicted))
        return abs(predicted - self.joined.loss) <= tolerance * scale

    def finite(self) -> bool:
        return all(math.isfinite(loss) for loss in self.losses())

    def spread(self) -> float:
        """The largest difference among the losses, relatively."""
        losses = self.losses()
        return (max(losses) - min(losses)) / (max(map(abs, losses)) or 1.0)


def find_rule(
    model: nn.Module,
    caller: Caller,
    batch: Any,
    layout: BatchLayout,
    microbatch_weight: str | Callable[[Any], float] | None = None,
) -> LossRule:
    """The rule that reproduces the batch's loss; ``microbatch_weight``, where given, is taken at its word.

    Runs forwards of up to three samples on the model itself, and leaves its parameters, buffers, modes and the random
    states as they were. An exception of the model comes out as itself.

    Raises:
        BatchError: no rule makes the joined loss from the separate ones.
        ValueError: ``microbatch_weight`` is unknown, or there is no loss.
    """
    if microbatch_weight is not None:
        return LossRule.given(microbatch_weight)
    return probe(_in_process(model, caller), batch, layout, _tolerance(model))


def probe(observe: Observe, batch: Any, layout: BatchLayout, tolerance: float = 2e-5) -> LossRule:
    """As ``find_rule``, with a way of its own to run the model.

    Args:
        observe: runs the model's forward.
        batch: a batch; three of its samples are run, one twice where it has fewer.
        layout: the batch's.
        tolerance: relative difference of losses that counts as none.

    Raises:
        BatchError: no rule makes the joined loss from the separate ones.
    """
    chosen = layout.select(batch, _telling_samples(batch, layout))
    plain = _first_trial(observe, chosen, layout)
    rules = _fitting([Rule.TARGETS, Rule.SAMPLES, Rule.SUM], plain, tolerance, "")
    silenced = False
    if plain.countable():
        rest = _try(observe, chosen, layout, silenced=True)
        silenced = rest.losses() != _try(observe, chosen, layout).losses()
        if silenced:
            if Rule.TARGETS in rules and rest.finite() and rest.spread() <= tolerance:
                return LossRule(Rule.TARGETS)
            # A sum of what was averaged first follows no weight that later batches could be checked for.
            rules = [rule for rule in rules if rule is not Rule.SUM]
            rules = _fitting(rules, rest, tolerance, " without its loss functions", plain)
        else:
            rules = [rule for rule in rules if rule is not Rule.TARGETS] or rules
    for changed in shortened(chosen, layout):
        trial = _try_or_none(observe, changed, layout, silenced=silenced)
        if trial is not None:
            rules = _fitting(rules, trial, tolerance, " after a sample's masks and labels were cut short", trial)
    # Samples before targets: were both right so far, the samples are checked against the targets in every batch.
    best = next(rule for rule in (Rule.SAMPLES, Rule.TARGETS, Rule.SUM) if rule in rules)
    return LossRule(best, watched=silenced and best is Rule.SAMPLES)


def _first_trial(observe: Observe, chosen: Any, layout: BatchLayout) -> _Trial:
    """The samples as they are, with the last parameters shaken where the losses are too alike."""
    plain = _try(observe, chosen, layout)
    if plain.finite() and plain.spread() < _ALIKE:
        shaken = _try(observe, chosen, layout, shaken=True)
        if shaken.finite():
            return shaken
    if not math.isfinite(plain.joined.loss):
        raise BatchError(f"the loss of the first samples is {plain.joined.loss}, so nothing can be trained on it")
    return plain


def _fitting(
    rules: Sequence[Rule], trial: _Trial, tolerance: float, when: str, shown: _Trial | None = None
) -> list[Rule]:
    fitting = [rule for rule in rules if trial.fits(rule, tolerance)]
    if fitting:
        return fitting
    trial = shown or trial
    apart = " and ".join(f"{p.loss:.7g} ({n})" for p, n in zip(trial.pieces, trial.samples, strict=True))
    raise BatchError(
        f"the loss of {sum(trial.samples)} samples at once is {trial.joined.loss:.7g}, but apart it is {apart}, and no "
        f"rule makes the one from the others{when}: give microbatch_weight ('samples', 'targets', 'sum' or a "
        "callable) if you know the rule, batch_dims if a tensor was cut on the wrong dimension, or use microbatches=1 "
        "for a loss that compares samples with each other"
    )


def _try(observe: Observe, chosen: Any, layout: BatchLayout, *, silenced: bool = False, shaken: bool = False) -> _Trial:
    pieces = layout.split(chosen, 2)
    seen = [observe(piece.batch, silenced=silenced, shaken=shaken) for piece in pieces]
    joined = observe(chosen, silenced=silenced, shaken=shaken)
    return _Trial(joined, tuple(seen), tuple(piece.samples for piece in pieces))


def _try_or_none(observe: Observe, changed: Any, layout: BatchLayout, *, silenced: bool) -> _Trial | None:
    """None where the model cannot run this batch, which was never the user's."""
    try:
        trial = _try(observe, changed, layout, silenced=silenced)
    except Exception:
        return None
    return trial if trial.finite() else None


def _telling_samples(batch: Any, layout: BatchLayout) -> list[int]:
    """Two full samples and one that is short, by the entries of masks and labels that are neither 0 nor -100."""
    count = layout.samples(batch)
    score, empty = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
    for leaf, dim in layout.batched(batch):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
            leaf = torch.as_tensor(leaf)
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < 2 or leaf.is_complex():
            continue
        filled = ((leaf != 0) & (leaf != -100)).movedim(dim, 0).reshape(count, -1).sum(1).cpu()
        if not torch.all(filled == filled[0]):
            score += filled / filled.max()
            empty |= filled == 0
    order = [i for i in torch.argsort(score, descending=True, stable=True).tolist() if not empty[i]]
    order = order or list(range(count))
    return [order[0], order[1 % len(order)], order[-1]]


def _in_process(model: nn.Module, caller: Caller) -> Observe:
    def observe(batch: Any, *, silenced: bool = False, shaken: bool = False) -> Observed:
        # The model may write into its batch, and the pieces are views of the joined one.
        own = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, batch)
        with quiet(model), _shaken(model, shaken), Denominators(silenced) as seen:
            try:
                loss = caller.loss_of(caller.outputs(model, own), own)
            except Exception as error:
                error.add_note(
                    "raised while up to three samples were run to find how microbatches weigh; "
                    "give microbatch_weight to do without that"
                )
                raise
            return Observed(float(loss), seen.values())

    return observe


@contextmanager
def _shaken(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Swaps the last two parameters for noisy copies, so that the outputs differ from sample to sample."""
    floating = [p for p in model.parameters() if p.is_floating_point()] if wanted else []
    noise = torch.Generator().manual_seed(0)
    noisy = {}
    for parameter in floating[-2:]:
        step = (
            torch.randn(parameter.shape, generator=noise)
            * 2
            / math.sqrt(max(1, parameter.shape[-1] if parameter.dim() else 1))
        )
        noisy[id(parameter)] = nn.Parameter(parameter.detach() + step.to(parameter), requires_grad=False)
    swapped = [
        (module, name, parameter)
        for module in (model.modules() if noisy else ())
        for name, parameter in module._parameters.items()
        if id(parameter) in noisy
    ]
    try:
        for module, name, parameter in swapped:
            module._parameters[name] = noisy[id(parameter)]
        yield
    finally:
        for module, name, parameter in swapped:
            module._parameters[name] = parameter


def _tolerance(model: nn.Module) -> float:
    """Relative differences that rounding makes between two batch sizes, for the model's coarsest dtype."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    coarsest = max((torch.finfo(t.dtype).eps for t in tensors), default=torch.finfo(torch.float32).eps)
    if coarsest > torch.finfo(torch.float32).eps:
        return 2 * coarsest
    # TensorFloat-32, on by default for convolutions.
    return 1e-3 if any(t.is_cuda for t in tensors) else 2e-5
