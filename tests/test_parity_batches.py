"""Batches as users have them: the unsplit model's loss and gradients, or one sentence before anything starts."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from home_made import SAMPLES, WIDTH, chain, mse
from parity import EVERY, Case, assert_exact, assert_same_step, batch_step, cuts_of, split_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from training import batches_of_tokens, gpt, piped, trainer_of, unsplit

from raypipe import BatchError


class Net(nn.Module):
    """Four layers; what the batch holds beside x and y is used by ``use``."""

    def __init__(self, use: Callable[..., Tensor] = lambda h, **more: h) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.use = use

    def forward(self, x: Tensor, y: Tensor | None = None, **more: Any) -> Tensor:
        h = self.use(chain(self, x).tanh(), **more)
        return h if y is None else F.mse_loss(h, y)


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    def seeded() -> Case:
        torch.manual_seed(4)
        return make()

    CASES[make.__name__] = seeded
    return seeded


def xy(samples: int = SAMPLES, **more: Any) -> dict[str, Any]:
    return {"x": torch.randn(samples, WIDTH), "y": torch.randn(samples, WIDTH), **more}


def rotated(h: Tensor, position_ids: Tensor) -> Tensor:
    """Uses [3, B, S] as models of images and text do."""
    return h * position_ids.sum(0).cos() + h.roll(1, -1) * position_ids[0].sin()


@case
def positions_in_three_kinds() -> Case:
    batch = xy(position_ids=torch.randint(0, 9, (3, SAMPLES, WIDTH)))
    return Case(Net(rotated), batch, {"batch_dims": {"position_ids": 1}})


@case
def positions_in_three_kinds_for_three_samples() -> Case:
    batch = xy(3, position_ids=torch.randint(0, 9, (3, 3, WIDTH)))
    return Case(Net(rotated), batch, {"batch_dims": {"position_ids": 1}})


@case
def a_mask_that_all_share() -> Case:
    mask = torch.ones(WIDTH, WIDTH).tril()
    return Case(Net(lambda h, mask, scale: h @ mask * scale), xy(mask=mask, scale=torch.tensor(2.0)))


@case
def a_mask_that_all_share_in_a_batch_of_its_size() -> Case:
    mask = torch.ones(WIDTH, WIDTH).tril()
    return Case(Net(lambda h, mask: h @ mask), xy(WIDTH, mask=mask), {"batch_dims": {"mask": None}})


@case
def class_weights() -> Case:
    def loss(h: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(h, batch["labels"], weight=batch["weights"])

    def forward(model: nn.Module, batch: Any) -> Any:
        return model(batch["x"])

    labels, weights = torch.randint(0, WIDTH, (5,)), torch.rand(WIDTH) + 0.1
    batch = {"x": torch.randn(5, WIDTH), "labels": labels, "weights": weights}
    return Case(Net(), batch, {"forward": forward, "loss": loss})


def mixed(h: Tensor, number: int, factor: float, word: str, names: list[str], nothing: None, deep: Any) -> Tensor:
    assert number == 3
    assert nothing is None
    lengths = torch.tensor([float(len(name)) for name in names])
    h = h * lengths[:, None] if word == "long" else h
    return h * factor + deep["more"]["shift"] + deep["pair"][0][:, None] * deep["pair"][1]


@case
def values_of_every_kind_deeply_nested() -> Case:
    deep = {"more": UserDict(shift=torch.randn(5, WIDTH)), "pair": (torch.randn(5), 2.0)}
    names = ["a", "bb", "ccc", "dddd", "e"]
    return Case(Net(mixed), xy(5, number=3, factor=0.5, word="long", names=names, nothing=None, deep=deep))


@case
def a_tokenizers_mapping() -> Case:
    return Case(Net(), UserDict(xy()))


@dataclasses.dataclass
class Record:
    x: Tensor
    y: Tensor
    name: str


pytree.register_dataclass(Record)  # type: ignore[no-untyped-call]


def of_record(model: nn.Module, record: Record) -> Any:
    assert isinstance(record, Record)
    return model(record.x, record.y)


@case
def a_registered_dataclass() -> Case:
    return Case(Net(), Record(**xy(), name="one"), {"forward": of_record})


class Taking(Net):
    """Is given one dict as its only argument."""

    def forward(self, given: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(given["x"]) * given["scale"]


@case
def a_dict_of_inputs_and_targets() -> Case:
    batch = {"x": torch.randn(SAMPLES, WIDTH), "scale": torch.rand(SAMPLES, 1)}, torch.randn(SAMPLES, WIDTH)
    return Case(Taking(), batch, {"loss": mse})


class Two(Net):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * other


@case
def a_tuple_of_inputs_and_targets() -> Case:
    return Case(Two(), ((torch.randn(5, WIDTH), torch.rand(5, 1)), torch.randn(5, WIDTH)), {"loss": mse})


def of_many_dtypes(h: Tensor, **given: Tensor) -> Tensor:
    h = torch.where(given["bools"], h, -h) + given["bytes"].float() / 255
    h = h * given["half"].float() + given["bfloat"].to(h.dtype)
    return h + given["complex"].abs() + given["double"].float() + given["short"] * 0.1


@case
def tensors_of_many_dtypes() -> Case:
    shape = (SAMPLES, WIDTH)
    given = {
        "bools": torch.rand(shape) > 0.5,
        "bytes": torch.randint(0, 255, shape, dtype=torch.uint8),
        "half": torch.randn(shape).half(),
        "bfloat": torch.randn(shape).bfloat16(),
        "complex": torch.randn(shape, dtype=torch.complex64),
        "double": torch.randn(shape, dtype=torch.float64),
        "short": torch.randint(-9, 9, shape, dtype=torch.int16),
    }
    return Case(Net(of_many_dtypes), xy(**given))


@case
def tensors_in_memory_of_every_kind() -> Case:
    batch = xy(
        turned=torch.randn(WIDTH, SAMPLES).T, wide=torch.randn(1, WIDTH).expand(SAMPLES, WIDTH), empty=torch.zeros(4, 0)
    )
    batch["x"] = torch.randn(SAMPLES, 2 * WIDTH)[:, ::2]

    def use(h: Tensor, turned: Tensor, wide: Tensor, empty: Tensor) -> Tensor:
        assert empty.numel() == 0
        return torch.cat([h * turned + wide, empty], 1)

    return Case(Net(use), batch)


@case
def one_sample() -> Case:
    return Case(Net(), xy(1))


@case
def one_object_twice() -> Case:
    batch = xy()
    return Case(Net(), {"x": batch["x"], "y": batch["x"]})


@pytest.mark.parametrize("name", CASES)
def test_batches_of_many_kinds(name: str) -> None:
    assert_exact(CASES[name], cuts_of(list(CASES).index(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_batches_of_many_kinds_in_every_cut(name: str) -> None:
    assert_exact(CASES[name], EVERY)


def test_arrays_are_tensors_to_the_model() -> None:
    torch.manual_seed(0)
    model = Net(lambda h, shift, labels: h + shift + labels[:, None])
    batch = xy(shift=torch.randn(SAMPLES, 1), labels=torch.arange(SAMPLES))
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    arrays["shift"] = np.asfortranarray(arrays["shift"].astype(">f4"))
    wanted = batch_step(Case(model, batch))
    assert_same_step(split_step(Case(model, arrays), 3, "1f1b", 2), wanted)


# One batch after another.


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def assert_same_training(found: Any, wanted: Any) -> None:
    assert found.losses == pytest.approx(wanted.losses, rel=1e-6)
    for name, tensor in wanted.state.items():
        assert float((found.state[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name


def test_every_batch_is_of_another_length_and_the_last_is_small() -> None:
    sizes = ((8, 12), (8, 5), (6, 9), (8, 1), (7, 11), (2, 3))
    batches = [batches_of_tokens(1, samples, length=length, seed=length)[0] for samples, length in sizes]
    wanted = unsplit(gpt(), batches, sgd)
    for stages, schedule in ((2, "gpipe"), (3, "1f1b")):
        assert_same_training(piped(gpt(), batches, stages, schedule=schedule, optimizer=sgd, microbatches=4), wanted)


def test_what_the_first_batch_says_of_positions_holds_for_one_of_three_samples() -> None:
    torch.manual_seed(0)
    model = Net(rotated)
    batches = [xy(n, position_ids=torch.randint(0, 9, (3, n, WIDTH))) for n in (4, 3, 1)]
    wanted = unsplit(model, batches, sgd)
    options = {"batch_dims": {"position_ids": 1}, "optimizer": sgd, "microbatches": 2}
    assert_same_training(piped(model, batches, 3, **options), wanted)


def test_a_mask_that_all_share_is_one_in_every_later_batch() -> None:
    """A later batch has as many samples as the mask has rows; the first one said what the mask is."""
    torch.manual_seed(0)
    model = Net(lambda h, mask: h @ mask)
    batches = [xy(n, mask=torch.ones(WIDTH, WIDTH).tril()) for n in (4, WIDTH, 3)]
    assert_same_training(piped(model, batches, 2, optimizer=sgd, microbatches=4), unsplit(model, batches, sgd))


# What is refused, with what to do.


@dataclasses.dataclass
class Unknown:
    x: Tensor


POSITIONS = torch.zeros(3, 3, WIDTH, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (
            xy(3, position_ids=POSITIONS),
            r"position_ids, of shape \[3, 3, 8\], is uncertain .*batch_dims=.*position_ids",
        ),
        (xy(4, position_ids=torch.zeros(3, 4, WIDTH)), r"position_ids, of shape \[3, 4, 8\], is uncertain"),
        (xy(0), r"the batch has no samples, but a step needs at least one"),
        (xy(4, y=torch.zeros(3, WIDTH)), r"number of samples in the batch is uncertain.*\(x 4, y 3\)"),
        (xy(4, rows=[1, 2, 3, 4]), r"rows, of shape \[4\], is uncertain in a batch of 4 samples"),
        (xy(4, boxes=[torch.zeros(n, 4) for n in (1, 2, 3, 1)]), r"batch dimension of \['boxes'\]\[0\]"),
        (xy(4, boxes=[torch.zeros(n, 2) for n in (1, 2, 3, 1)]), r"boxes is a list of 4 tensors, .*padded tensor"),
        (xy(4, boxes=[{"label": torch.zeros(n)} for n in (1, 2, 3, 1)]), r"boxes is a list of 4 dicts"),
        (xy(4, words=[["a"], ["b", "c"], ["d"], ["e"]]), r"words is a list of 4 lists, .*flat list of strings"),
        (xy(4, other=Unknown(torch.zeros(4))), r"other is a Unknown, .*register Unknown with .*register_dataclass"),
        (xy(4, other=object()), r"other is a object, which cannot be cut .*batch_dims=\{'other': None\}"),
        ({"x": torch.tensor(1.0), "y": 2}, r"the batch has no tensor with a batch dimension"),
        ([torch.zeros(4, WIDTH)] * 3, r"the batch is a list of 3, but must be a dict .* give forward"),
        (torch.zeros(4, WIDTH), r"the batch is a tensor of shape \[4, 8\], but must be a dict"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_starts(batch: Any, sentence: str) -> None:
    with (
        trainer_of(Net(lambda h, **more: h), 2, microbatches=2) as trainer,
        pytest.raises(BatchError, match=sentence) as error,
    ):
        trainer.train_step(batch)
    assert "\n" not in str(error.value)
    assert trainer._gang is None


def test_a_bad_batch_among_good_ones_leaves_the_trainer_alive() -> None:
    torch.manual_seed(0)
    model, good = Net(), xy()
    with trainer_of(model, 2, microbatches=2, optimizer=sgd) as trainer:
        first = trainer.train_step(good)["loss"]
        for bad in (xy(0), xy(4, y=torch.zeros(3, WIDTH)), good["x"], [good["x"]]):
            with pytest.raises(BatchError):
                trainer.train_step(bad)
        assert trainer.train_step(good)["loss"] < first
