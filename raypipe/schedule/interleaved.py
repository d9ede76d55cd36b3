"""Interleaved 1F1B: several chunks a stage, dealt out in turn, so that the pipeline fills and drains in smaller steps.

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021. The
rounds of more than p microbatches, for m that p does not divide, are those of ``torch.distributed.pipelining``.
"""

from __future__ import annotations

from collections.abc import Iterator

from .action import Action, Op, Programs

__all__ = ["interleaved_1f1b", "largest_round", "turns"]


def interleaved_1f1b(stages: int, microbatches: int, chunks: int = 2) -> Programs:
    """The programs of interleaved 1F1B: stage r holds chunks r, p+r, 2p+r and so on.

    With p stages, v chunks a stage and m microbatches of equal cost, at least p, (p-1)(F+B)/v of each stage's time is
    idle (F and B are a whole stage's), for v times the messages of 1F1B. With v above 1 stage r holds
    min(vm, (v-1)g + 2(p-1-r) + 1) chunks' activations at its peak, where g is ``largest_round(p, m)``: those of
    p + (p-1)/v whole stages on stage 0 where g = p.

    Args:
        stages: p, at least 1.
        microbatches: m, at least 1; fewer than stages and no multiple of them are allowed.
        chunks: v, chunks a stage, at least 1; with 1 it is 1F1B.

    Returns:
        For each stage its 2vm actions.
    """
    return tuple(_program(stage, stages, microbatches, chunks) for stage in range(stages))


def largest_round(stages: int, microbatches: int) -> int:
    """The microbatches of the largest round: the stages, and a few more where they do not divide the microbatches."""
    return max(map(len, _rounds(stages, microbatches)))


def turns(stage: int, stages: int, microbatches: int, chunks: int, op: Op) -> list[Action]:
    """The actions of one kind on a stage, in order: round by round, in a round chunk by chunk.

    Args:
        stage: the stage, from 0.
        stages: how many there are.
        microbatches: microbatches a step.
        chunks: chunks a stage.
        op: the kind; forwards go through the stage's chunks from the first, all others from the last.
    """
    own = range(stage, stages * chunks, stages)
    order = own if op is Op.FORWARD else own[::-1]
    return [
        Action(chunk, op, microbatch)
        for round_ in _rounds(stages, microbatches)
        for chunk in order
        for microbatch in round_
    ]


def _rounds(stages: int, microbatches: int) -> Iterator[range]:
    """The microbatches in rounds of at least ``stages``, if there are so many; sizes differ by 1, larger ones first."""
    number = max(1, microbatches // stages)
    size, larger = divmod(microbatches, number)
    first = 0
    for index in range(number):
        last = first + size + (index < larger)
        yield range(first, last)
        first = last


def _program(stage: int, stages: int, microbatches: int, chunks: int) -> tuple[Action, ...]:
    forwards = turns(stage, stages, microbatches, chunks, Op.FORWARD)
    backwards = turns(stage, stages, microbatches, chunks, Op.BACKWARD)
    # A hop to the next stage and back takes two turns. With one chunk the second turn is idle, so its forward can wait.
    hop = 2 if chunks > 1 else 1
    num_warmup = (chunks - 1) * largest_round(stages, microbatches) + hop * (stages - 1 - stage)
    num_warmup = min(num_warmup, len(forwards))

    warmup = forwards[:num_warmup]
    steady = [action for pair in zip(forwards[num_warmup:], backwards, strict=False) for action in pair]
    cooldown = backwards[len(backwards) - num_warmup :]
    return (*warmup, *steady, *cooldown)
