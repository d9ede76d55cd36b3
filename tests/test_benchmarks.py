"""The pure parts of the benchmarks, which are run by hand: rows, their judgement, the page; and the models' shapes."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.emulated import Floor, costs_of
from benchmarks.lengths import expected, shuffled
from benchmarks.machine import machine
from benchmarks.models import Sleeps, adamw, first_mean, gpt, gpt_batch, hoards, scales, sleepers, token_loss
from benchmarks.ours import Steps
from benchmarks.real_work import Side, best
from benchmarks.table import BEGIN, END, Row, Subject, counted, measured, page, render
from benchmarks.task import Task, Turn
from raypipe.observe.events import Trace
from raypipe.schedule import Action, Op


def test_the_median_is_judged() -> None:
    assert measured("w", [0.8, 0.9, 5.0], 0.9) == Row("w", "0.900 (0.800..5.000)", "at most 0.9", True)
    assert measured("w", [0.8, 0.91, 5.0], 0.9).met is False
    assert measured("w", [0.02], 0.05, "%") == Row("w", "2.00 % (2.00..2.00)", "at most 5 %", True)
    assert measured("w", [1.0]).met is None


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="run at least one round"):
        measured("w", [], 1.0)


def test_a_count_is_judged_by_equality() -> None:
    assert counted("w", (2, 1), (2, 1)).met is True
    assert counted("w", (2, 2), (2, 1)).met is False


def test_only_what_stands_between_the_markers_is_written(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    text = render([Subject("S", [counted("w", 1, 2)], [("profile", "body")])], "machine")
    page(file, text)
    page(file, text)
    written = file.read_text()
    assert written.startswith(f"before\n{BEGIN}\n\nmachine\n")
    assert written.endswith(f"body\n```\n\n{END}\nafter\n")
    assert "| w | 1 | exactly 2 | **no** |" in written
    assert "old" not in written


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(ValueError, match="marker lines"):
        page(tmp_path / "page.md", "text")


def test_the_page_has_its_markers() -> None:
    text = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1


def test_the_machine_is_named() -> None:
    assert f"PyTorch {torch.__version__}" in machine()


def test_periods_gaps_and_handovers_come_from_the_traces() -> None:
    """Two ranks, two steps of one microbatch: rank 1 waits for F, rank 0 for B; the gap is 1 on rank 0, 2 on rank 1."""

    def step(at: float, late: float) -> list[Trace]:
        one = Trace(
            (Action(0, Op.FORWARD, 0), Action(0, Op.BACKWARD, 0)), _times(at, [(0, 0, 2), (2, 7.5, 9)]), at, at + 9, 1
        )
        two = Trace(
            (Action(1, Op.FORWARD, 0), Action(1, Op.BACKWARD, 0)),
            _times(at, [(0, 2.5, 4), (4, 4, 7)]),
            at + late,
            at + 8,
            1,
        )
        return [one, two]

    steps = Steps([step(0.0, 0.0), step(10.0, 0.0)])
    assert steps.periods == [9.0, 10.0]
    assert steps.gaps == [1.0, 2.0]
    assert steps.handovers == [0.5, 0.5, 0.5, 0.5]
    assert steps.action_s(Op.FORWARD) == [2.0, 1.5, 2.0, 1.5]


def test_what_waits_for_no_message_hands_nothing_over() -> None:
    """Rank 1's W comes before rank 0's F has ended, but waits for nothing."""
    first, last = Action(0, Op.FORWARD, 0), Action(1, Op.FORWARD, 0)
    one = Trace((first, Action(0, Op.WEIGHT, 0)), _times(0, [(0, 0, 2), (2, 9, 10)]), 0, 10, 1)
    two = Trace((Action(1, Op.WEIGHT, 1), last), _times(0, [(0, 0, 1), (1, 3, 4)]), 0, 10, 1)
    assert Steps([[one, two]]).handovers == [1.0]


def test_many_lengths_are_as_many_tokens_as_one() -> None:
    lengths = shuffled(400)
    assert len(set(lengths)) == 200
    assert sum(lengths) == 400 * 200
    assert lengths[:200] == lengths[200:] != sorted(lengths[:200])
    assert expected([200]) == 1.0
    assert 1.0 < expected(lengths) < 1.05


def test_the_models_train() -> None:
    tokens, targets = gpt_batch(samples=2, length=8, vocabulary=32)
    token_loss(gpt(width=16, heads=2, blocks=1, vocabulary=32)(tokens), targets).backward()
    for model in (sleepers(2, Sleeps(0.0, 0.0, 0.0), width=4), scales(2, width=4), hoards(3, 1)):
        first_mean(model(torch.ones(1, 1)), torch.zeros(1)).backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def _task(counts: tuple[int, ...], chunks: int) -> Task:
    model = functools.partial(gpt, 16, 2, sum(counts) - 2, 32)
    return Task(model, functools.partial(gpt_batch, 4, 8, 32), token_loss, adamw, 4, counts, chunks)


def test_a_task_is_cut_in_the_models_order() -> None:
    task = _task((1, 2, 2, 1), 2)
    assert task.stages == 2
    layers = [layer for chunk in range(4) for layer in task.chunk(chunk)]
    assert [type(layer) for layer in layers] == [type(layer) for layer in task.model()]
    with pytest.raises(ValueError, match="counts has 3 numbers, but every stage holds 2 chunks"):
        _task((1, 2, 3), 2)


def test_a_turn_counts_from_end_to_end() -> None:
    assert Turn(1.0, [3.0, 6.0, 7.0], 9.0, 0.5).periods == [2.0, 3.0, 1.0]


def test_the_best_side_is_that_of_the_least_median() -> None:
    slow = Side("torch", "gpipe", lambda: (0.0, 0.0), [1.0, 5.0, 6.0])
    fast = Side("torch", "zbv", lambda: (0.0, 0.0), [4.0, 3.0, 9.0])
    assert best([slow, fast]) is fast


def test_costs_are_sleeps_with_their_lateness() -> None:
    sleeps, floor = Sleeps(0.010, 0.010, 0.020), Floor(0.002, 0.0002)
    bare = costs_of(sleeps)
    assert (bare.forward, bare.backward, bare.latency) == (0.010, pytest.approx(0.030), 0.0)
    late = costs_of(sleeps, floor)
    assert late.latency == 0.002
    assert (late.forward, late.input, late.weight) == tuple(map(pytest.approx, (0.0102, 0.0102, 0.0202)))
    assert late.backward == pytest.approx(0.0304)


def _times(at: float, rows: list[tuple[float, float, float]]) -> np.ndarray:
    return np.array(rows) + at
