"""Finding the rule by which microbatches weigh: a few samples are run joined and apart, before the first step.

A rule is right if it makes the joined loss from the separate ones, in every trial:

1. The samples as they are, chosen so that their masks and labels differ in length where the batch has such. Where the
   two losses are too alike to tell rules apart (a head that starts at zero), the last parameters are shaken first.
2. With numbers in the place of what PyTorch's loss functions return, where they were seen: the loss must be linear in
   them, and what remains at zero must follow the same rule. If nothing remains, the loss is theirs alone, and their
   denominators are exact whatever comes later.
3. Else with masks, labels and numbers of one piece cut short, so that a mean made by hand over a mask does not pass
   for one over samples because the first batch happened to be full. A trial that the model cannot run is left out.

A term may be smaller than the tolerance beside the others. Where PyTorch's loss functions are the main part, the second
trial shows it at its own size; where all is made by hand, the gradients are compared too (``gradient_check``).

What cannot be known: a term that shows in later batches only, or below 1e-4 of every gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from raypipe.errors import BatchError
from raypipe.model import gradient_check
from raypipe.model.call import Caller
from raypipe.model.gradient_check import GradientsOf, check_gradients
from raypipe.model.microbatch import BatchLayout
from raypipe.model.shorten import shortened, telling_samples
from raypipe.model.trial_run import Observe, Observed, in_process, tolerance_of
from raypipe.model.weights import LossRule, Rule

__all__ = ["confirm", "find_rule", "probe"]

_FINE = 1e-4  # rounding of losses under which gradients are worth comparing
_ALIKE = 1e-2  # losses that differ by less, relatively, do not tell rules apart


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
        counted = [(w, piece.loss) for w, piece in zip(weights, self.pieces, strict=True) if w]
        predicted = math.fsum(w * loss for w, loss in counted) / (1.0 if rule is Rule.SUM else math.fsum(weights))
        scale = max(abs(loss) for loss in (self.joined.loss, predicted, *(loss for _, loss in counted)))
        return abs(predicted - self.joined.loss) <= tolerance * scale

    def finite(self) -> bool:
        return all(math.isfinite(loss) for loss in self.losses())

    def spread(self) -> float:
        """The largest difference among the losses, relatively."""
        losses = self.losses()
        return (max(losses) - min(losses)) / (max(map(abs, losses)) or 1.0)


_Try = Callable[..., _Trial]


def find_rule(
    model: nn.Module,
    caller: Caller,
    batch: Any,
    layout: BatchLayout,
    microbatch_weight: str | Callable[[Any], float] | None = None,
) -> LossRule:
    """The rule that reproduces the batch's loss; ``microbatch_weight``, where given, is taken at its word.

    Runs forwards (for a loss made by hand backwards too) of up to three samples on the model itself, and leaves its
    parameters, buffers, modes and the random states as they were. An exception of the model comes out as itself.

    Raises:
        BatchError: no rule makes the joined loss from the separate ones.
        ValueError: ``microbatch_weight`` is unknown, or there is no loss.
    """
    if microbatch_weight is not None:
        return LossRule.given(microbatch_weight)
    tolerance = tolerance_of(model, caller.precision.dtype)
    rule = probe(in_process(model, caller), batch, layout, tolerance)
    confirm(rule, gradient_check.in_process(model, caller), batch, layout, tolerance)
    return rule


def confirm(
    rule: LossRule, gradients_of: GradientsOf, batch: Any, layout: BatchLayout, tolerance: float = 2e-5
) -> None:
    """Checks the rule of a loss made by hand against its gradients, where they are finer than ``tolerance`` can hide.

    Raises:
        BatchError: a parameter's gradient is not what the rule makes of the separate ones.
    """
    if rule.weight is not Rule.TARGETS and not rule.watched and tolerance <= _FINE:
        chosen = layout.select(batch, telling_samples(batch, layout))
        for samples in (chosen, *shortened(chosen, layout)):
            check_gradients(gradients_of, samples, layout, rule)


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
    chosen = layout.select(batch, telling_samples(batch, layout))
    try_once = functools.partial(_try, observe, layout)
    plain, shaken = _first_trial(try_once, chosen, tolerance)
    rules = _fitting([Rule.TARGETS, Rule.SAMPLES, Rule.SUM], plain, tolerance)
    used = False
    if plain.countable():
        rest = try_once(chosen, faked=0.0, shaken=shaken)
        used = rest.losses() != plain.losses()
        # Loss functions that the loss does not use say nothing; and a sum of what was averaged first follows no weight
        # that later batches could be checked for.
        rules = [rule for rule in rules if rule is not (Rule.SUM if used else Rule.TARGETS)]
        if used:
            ones = try_once(chosen, faked=1.0, shaken=shaken)
            _check_linear(rest, ones, observe(chosen, faked=2.0, shaken=shaken).loss, plain, tolerance)
            if Rule.TARGETS in rules and rest.spread() <= tolerance:
                return _by_targets(plain)
        rules = _fitting(rules, rest, tolerance, "with zero in the place of PyTorch's loss functions")
    for changed in shortened(chosen, layout):
        trial = _try_or_none(try_once, changed, faked=0.0 if used else None, shaken=shaken)
        if trial is not None:
            rules = _fitting(rules, trial, tolerance, "with a sample's masks, labels or numbers cut short")
    # Samples before targets: were both right so far, the samples are checked against the targets in every batch.
    best = next(rule for rule in (Rule.SAMPLES, Rule.TARGETS, Rule.SUM) if rule in rules)
    return _by_targets(plain) if best is Rule.TARGETS else LossRule(best, watched=used and best is Rule.SAMPLES)


def _by_targets(plain: _Trial) -> LossRule:
    """That rule; refused where it already shows that loss functions average over different things."""
    rule = LossRule(Rule.TARGETS)
    rows = [piece.denominators for piece in plain.pieces]
    rule.check([row[0] for row in rows], rows)
    return rule


def _first_trial(try_once: _Try, chosen: Any, tolerance: float) -> tuple[_Trial, bool]:
    """The samples as they are, or with the last parameters shaken (then True) where the losses are too alike."""
    plain = try_once(chosen)
    if not math.isfinite(plain.joined.loss):
        raise BatchError(f"the loss of the first samples is {plain.joined.loss}, so nothing can be trained on it")
    if plain.finite() and plain.spread() < max(_ALIKE, 10 * tolerance):
        shaken = try_once(chosen, shaken=True)
        if shaken.finite():
            return shaken, True
    return plain, False


def _check_linear(rest: _Trial, ones: _Trial, two: float, plain: _Trial, tolerance: float) -> None:
    """The loss is a + b x in what its loss functions return, with the same b joined and apart.

    Args:
        rest: with 0 in their place.
        ones: with 1 in their place.
        two: the joined loss with 2 in their place.
        plain: the trial to name where it is not.
    """
    slopes = [one - zero for one, zero in zip(ones.losses(), rest.losses(), strict=True)]
    slopes.append(two - ones.joined.loss)
    scale = max(abs(loss) for loss in (two, *ones.losses(), *rest.losses()))
    if not max(slopes) - min(slopes) <= tolerance * scale:
        raise _refusal(plain, "it is not linear in its loss functions")


def _fitting(rules: Sequence[Rule], trial: _Trial, tolerance: float, where: str = "samples as they are") -> list[Rule]:
    """Those of the rules that a trial bears out, of which there must be one."""
    fitting = [rule for rule in rules if trial.fits(rule, tolerance)]
    if not fitting:
        raise _refusal(trial, f"no rule makes the one from the others ({where})")
    return fitting


def _refusal(trial: _Trial, why: str) -> BatchError:
    apart = " and ".join(f"{p.loss:.7g} ({n})" for p, n in zip(trial.pieces, trial.samples, strict=True))
    return BatchError(
        f"the loss of {sum(trial.samples)} samples at once is {trial.joined.loss:.7g}, apart it is {apart}, and {why}: "
        "give microbatch_weight ('samples', 'targets', 'sum' or a callable) if you know the rule, batch_dims if a "
        "tensor is cut on the wrong dimension, or use microbatches=1 for a loss that compares samples with each other"
    )


def _try(
    observe: Observe, layout: BatchLayout, chosen: Any, *, faked: float | None = None, shaken: bool = False
) -> _Trial:
    joined = observe(chosen, faked=faked, shaken=shaken)
    pieces = layout.split(chosen, 2)
    apart = tuple(observe(piece.batch, faked=faked, shaken=shaken) for piece in pieces)
    return _Trial(joined, apart, tuple(piece.samples for piece in pieces))


def _try_or_none(try_once: _Try, changed: Any, *, faked: float | None, shaken: bool) -> _Trial | None:
    """None where the model cannot run this batch, which was never the user's."""
    try:
        trial = try_once(changed, faked=faked, shaken=shaken)
    except Exception:
        return None
    return trial if trial.finite() else None
