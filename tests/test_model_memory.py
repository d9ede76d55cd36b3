from __future__ import annotations

import itertools

import pytest
import torch
from training import batches_of_tokens, gpt

from raypipe.accounting import in_flight, observed, sizes_of
from raypipe.model.build import make_skeleton
from raypipe.model.call import Caller
from raypipe.model.memory import Bytes, windows_from, worst_case
from raypipe.model.partition import partition
from raypipe.model.twin import Twin
from raypipe.options import Options
from raypipe.schedule import build


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_no_other_cut_needs_less_memory(tied: bool, schedule: str) -> None:
    """Tried against every contiguous split, each summed up for itself."""
    model = gpt(layers=5, tied=tied)
    skeleton = make_skeleton(model)
    twin = Twin(skeleton.model)
    recording, saved = observed(twin, Caller(), batches_of_tokens(1, samples=2)[0], training=True)
    sizes, _ = sizes_of(skeleton, twin, recording, saved, Options(3))
    counts = {name: p.numel() for name, p in model.named_parameters()}
    flight = in_flight(build(schedule, 3, 6))
    table = worst_case(sizes, flight, 2)
    cut = partition(recording, twin.unit_parameters, counts, 3, "memory", memory=table)
    length = len(recording.calls)
    chunks = {
        (start, start + n): size for start in range(length) for n, size in enumerate(windows_from(sizes, start), 1)
    }

    def peak(cuts: tuple[int, ...]) -> int:
        edges = itertools.pairwise((0, *cuts, length))
        return max(chunks[edge].total(count, 2) for edge, count in zip(edges, flight, strict=True))

    assert peak(cut.cuts) == min(map(peak, itertools.combinations(range(1, length), 2)))


def test_what_is_received_and_sent_is_kept_for_the_backward() -> None:
    """A unit that saves nothing still holds the two ends of its backward, and receives posted ahead."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.bias

    skeleton = make_skeleton(torch.nn.Sequential(*(Plain() for _ in range(3))))
    twin = Twin(skeleton.model)
    caller = Caller(None, lambda outputs, targets: outputs.sum())
    recording, saved = observed(twin, caller, (torch.rand(4, 8), torch.rand(4, 8)), training=True)
    sizes, known = sizes_of(skeleton, twin, recording, saved, Options(3))
    assert known
    message = 4 * 8 * 4
    assert next(windows_from(sizes, 1)) == Bytes(32, 32, 2 * 32 + 4, 2 * message, 2 * message)


def test_a_unit_that_runs_again_keeps_its_arguments() -> None:
    """And what it saves counts once, for the largest."""
    skeleton = make_skeleton(gpt(layers=3))
    twin = Twin(skeleton.model)
    recording, saved = observed(twin, Caller(), batches_of_tokens(1, samples=2)[0], training=True)
    assert saved is not None
    blocks = [number for number in recording.calls if recording.events[number].name.startswith("blocks")]
    whole, _ = sizes_of(skeleton, twin, recording, saved, Options(3))
    again, _ = sizes_of(skeleton, twin, recording, saved, Options(3), frozenset(blocks))
    # From the first block on, one, two and three of them; the next one's argument is what a chunk sends.
    x, own = 2 * 12 * 16 * 4, saved.beside_arguments(blocks[0])
    for count, (one, other) in enumerate(zip(windows_from(again, 2), windows_from(whole, 2), strict=False), 1):
        if count <= 3:
            assert (one.again, one.redone) == (own, count * own)
            assert one.activations == (count + 1) * x
            assert one.total(5, 2) == one.total(4, 2) + one.activations
        assert one.activations < other.activations
        assert (other.again, other.redone) == (0, 0)
    assert own > 10 * x


def test_in_flight() -> None:
    assert in_flight(build("1f1b", 3, 8)) == (3, 2, 1)
    assert in_flight(build("gpipe", 3, 8)) == (8, 8, 8)
