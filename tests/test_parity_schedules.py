"""Every schedule trains the same: several chunks a stage, V placements, input and weight gradients apart."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import nn
from training import Run, batches_of_tokens, gpt, piped, trainer_of, unsplit

from raypipe.driver.cluster import Session
from raypipe.errors import ScheduleError
from raypipe.schedule import Schedule, build, chunks_of, names

NAMES = names()
QUICK = ("interleaved_1f1b", "zb_h2", "zbv")
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
SIZES = [(2, 4), (3, 4), (2, 3), (4, 8), (4, 2)]
"""(stages, microbatches): divisible and not, more and fewer microbatches than stages."""

adamw = functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-4)
sgd = functools.partial(torch.optim.SGD, lr=0.1)


def a_gpt(*, tied: bool = False) -> nn.Module:
    return gpt(tied=tied, dropout=0.1, layers=6)


def run(model: nn.Module, batches: list[Any], stages: int, **options: Any) -> Run:
    return piped(model, batches, stages, optimizer=adamw, max_grad_norm=0.05, **options)


@functools.cache
def in_one_stage(microbatches: int) -> Run:
    return run(a_gpt(), batches_of_tokens(3), 1, schedule="gpipe", microbatches=microbatches)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [SIZES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SIZES[1:])], ids=str)
def test_a_schedule_does_not_change_a_bit(name: str, size: tuple[int, int]) -> None:
    """With dropout, clipping and AdamW, over three steps."""
    stages, microbatches = size
    found = run(a_gpt(), batches_of_tokens(3), stages, schedule=name, microbatches=microbatches)
    wanted = in_one_stage(microbatches)
    assert (found.losses, found.norms) == (wanted.losses, wanted.norms)
    for key, tensor in wanted.state.items():
        assert torch.equal(found.state[key], tensor), key


def assert_shared_weights(name: str, backend: str) -> None:
    """A tied GPT and T5, whose shared weights lie in several chunks, of one stage or of two."""
    for model, batches in (
        (gpt(tied=True, layers=6), batches_of_tokens(2)),
        (FAMILIES["t5"].build(), [FAMILIES["t5"].batch(8, seed=seed) for seed in range(2)]),
    ):
        loss = (lambda m, b: m(**b)) if "tokens" in batches[0] else (lambda m, b: m(**b).loss)
        wanted = unsplit(model, batches, sgd, loss=loss)
        found = piped(model, batches, 2, schedule=name, microbatches=4, optimizer=sgd, backend=backend)
        assert found.losses == pytest.approx(wanted.losses, rel=1e-6)
        assert found.norms == pytest.approx(wanted.norms, rel=1e-5)
        for key, tensor in wanted.state.items():
            torch.testing.assert_close(found.state[key], tensor, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.ray
@pytest.mark.parametrize("name", SOME)
def test_over_ray(ray_session: Session, name: str) -> None:
    found = run(a_gpt(), batches_of_tokens(3), 2, schedule=name, microbatches=4, backend="ray")
    wanted = in_one_stage(4)
    assert (found.losses, found.norms) == (wanted.losses, wanted.norms)
    assert all(torch.equal(found.state[key], tensor) for key, tensor in wanted.state.items())


@pytest.mark.parametrize("name", SOME)
def test_a_tied_gpt_and_t5_are_the_unsplit_models(name: str) -> None:
    assert_shared_weights(name, "local")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_tied_gpt_and_t5_over_ray(ray_session: Session, name: str) -> None:
    assert_shared_weights(name, "ray")


@pytest.mark.parametrize("name", SOME)
def test_evaluation_and_prediction(name: str) -> None:
    """The last chunk may be on any stage."""
    model, batch = a_gpt().eval(), batches_of_tokens(1, 6)[0]
    with trainer_of(model, 2, schedule=name, microbatches=4) as trainer:
        trainer.train_step(batches_of_tokens(1)[0])
        model.load_state_dict(trainer.state_dict())
        wanted = model(**batch).detach()
        assert trainer.evaluate([batch])["loss"] == pytest.approx(wanted.item(), rel=1e-6)
        assert next(iter(trainer.predict([{"tokens": batch["tokens"]}]))).shape[:2] == batch["tokens"].shape


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", ["interleaved_1f1b", "looped_bfs", "interleaved_zb"])
def test_other_numbers_of_chunks(name: str, chunks: int) -> None:
    found = run(a_gpt(), batches_of_tokens(3), 2, schedule=name, chunks=chunks, microbatches=4)
    wanted = in_one_stage(4)
    assert found.losses == wanted.losses
    assert all(torch.equal(found.state[key], tensor) for key, tensor in wanted.state.items())


def both_ways(stages: int, microbatches: int) -> Schedule:
    """A user's own: a chunk's gradient and another's activations go between the same two ranks, out of step."""
    mirrored = build("zbv", stages, microbatches).programs
    return Schedule("mine", mirrored, microbatches)


def test_a_users_own_schedule_and_one_read_from_csv() -> None:
    wanted = in_one_stage(4)
    text = build("interleaved_zb", 2, 4).to_csv()
    for schedule in (both_ways, Schedule.from_csv(text, "from a file")):
        found = run(a_gpt(), batches_of_tokens(3), 2, schedule=schedule, microbatches=4)
        assert found.losses == wanted.losses
        assert all(torch.equal(found.state[key], tensor) for key, tensor in wanted.state.items())


def test_a_schedule_that_moves_chunks_with_the_number_of_microbatches_is_refused() -> None:
    """Before the batch goes to the ranks, which hold their chunks by then; and what was trained stays."""

    def moving(stages: int, microbatches: int) -> Schedule:
        return build("zbv" if microbatches == 4 else "1f1b", stages, microbatches)

    whole, other = batches_of_tokens(2)
    with trainer_of(a_gpt(), 2, schedule=moving, microbatches=4, optimizer=sgd) as trainer:
        trainer.train_step(whole)
        sentence = r"schedule '1f1b' of 3 microbatches .* stages \(0, 1\), but the model was cut for \(0, 1, 1, 0\)"
        with pytest.raises(ScheduleError, match=sentence):
            trainer.train_step({name: tensor[:3] for name, tensor in whole.items()})
        assert trainer.train_step(other)["step"] == 1


def test_chunks_that_do_not_fit_are_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="chunks is 3, but the schedule 'zbv' holds two chunks a stage"):
        trainer_of(a_gpt(), 2, schedule="zbv", chunks=3)
    with pytest.raises(ValueError, match="chunks=1, but schedule 'mine' has 4 chunks on 2 stages; leave chunks out"):
        trainer_of(a_gpt(), 2, schedule=both_ways(2, 4), chunks=1)
    with pytest.raises(ValueError, match=r"stages=6 with 2 chunks each is more than the 10 units .* at most 5 stages"):
        trainer_of(a_gpt(), 6, schedule="zbv", example=batches_of_tokens(1)[0])
    assert chunks_of("zbv") == 2
