"""A replica's share of a batch: which samples are its own, and in which microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raypipe.errors import BatchError
from raypipe.model.microbatch import BatchLayout, Microbatch
from raypipe.model.weights import LossRule

__all__ = ["Share", "check_samples", "share_of", "share_sizes", "weights_of"]


@dataclass(frozen=True, slots=True)
class Share:
    """One replica's part of a batch.

    Attributes:
        microbatches: its pieces; their samples are counted within the share.
        first_sample: number of its first sample within the whole batch.
    """

    microbatches: tuple[Microbatch, ...]
    first_sample: int


def share_of(layout: BatchLayout, batch: Any, replica: int, replicas: int, microbatches: int) -> Share:
    """Splits a batch by sample, as evenly as possible and in order, and one of the shares into microbatches.

    Args:
        layout: of the batch.
        batch: the whole one.
        replica: whose share.
        replicas: how many shares.
        microbatches: of a share, at most.

    Raises:
        BatchError: there are fewer samples than replicas, or the batch is not of this layout.
    """
    check_samples(layout.samples(batch), replicas)
    part = layout.split(batch, replicas)[replica]
    return Share(tuple(layout.split(part.batch, microbatches)), part.first_sample)


def share_sizes(samples: int, replicas: int) -> tuple[int, ...]:
    """How many samples each replica's share has: they differ by one at most, the larger first."""
    small, larger = divmod(samples, replicas)
    return tuple(small + (number < larger) for number in range(replicas))


def check_samples(samples: int, replicas: int) -> None:
    """Refuses a batch that cannot give every replica a sample.

    Raises:
        BatchError: it has fewer samples than there are replicas.
    """
    if samples < replicas:
        raise BatchError(
            f"the batch has {samples} {'sample' if samples == 1 else 'samples'}, but data_parallel={replicas} replicas "
            f"need at least one each; give batches of {replicas} samples or more, or lower data_parallel"
        )


def weights_of(rule: LossRule, layout: BatchLayout, batch: Any, replicas: int, microbatches: int) -> Sequence[float]:
    """What every microbatch of the whole batch weighs, where the rule knows that before a forward."""
    # One share at a time: what all microbatches share whole is copied for each.
    each = (share_of(layout, batch, replica, replicas, microbatches) for replica in range(replicas))
    return [rule.weigh(microbatch) for share in each for microbatch in share.microbatches]
