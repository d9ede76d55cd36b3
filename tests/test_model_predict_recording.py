"""A predicted recording is the one that would have been made, field by field; or there is none."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import fields
from pipes import Stack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import GPT

from raypipe.model.build import make_skeleton
from raypipe.model.call import Caller
from raypipe.model.predict_recording import Predictor, family_of, sizes_of
from raypipe.model.record import record
from raypipe.model.recording import Recording
from raypipe.model.twin import Twin
from raypipe.stage.boundary import boundaries

WIDTH = 16
Make = Callable[[int, int], dict[str, Tensor]]


def hidden(samples: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.zeros(samples, length, WIDTH), "y": torch.zeros(samples, length, WIDTH)}


def tokens(samples: int, length: int) -> dict[str, Tensor]:
    ids = torch.ones(samples, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


class Recorder:
    """Records microbatches of a model as a rank does, and counts."""

    def __init__(self, model: nn.Module) -> None:
        self.twin = Twin(make_skeleton(model).model)
        self.predictor = Predictor(self.twin.empty)
        self.made = 0

    def record(self, batch: Any) -> Recording:
        return record(self.twin, lambda fake: Caller().outputs(fake, copy.deepcopy(batch)))

    def planned(self, batch: Any) -> Recording:
        found = self.predictor.predict(family_of(batch), sizes_of(batch))
        if found is None:
            self.made += 1
            found = self.record(batch)
            self.predictor.learn(family_of(batch), sizes_of(batch), found)
        return found


def assert_as_recorded(found: Recording, wanted: Recording) -> None:
    assert found.predicted
    assert not wanted.predicted
    for name in (each.name for each in fields(Recording)):
        if not name.startswith("_") and name not in ("events", "placeholders", "make"):
            assert getattr(found, name) == getattr(wanted, name), name
    for one, other in zip(found.events, wanted.events, strict=True):
        assert all(getattr(one, f.name) == getattr(other, f.name) for f in fields(one) if "flops" not in f.name)
    for number, other in enumerate(wanted.placeholders):
        made = found.placeholder(number)
        assert (made.shape, made.stride(), made.dtype) == (other.shape, other.stride(), other.dtype)
        assert made.requires_grad == other.requires_grad
        assert found.placeholder(number) is made
    cuts = tuple(range(1, len(wanted.calls)))
    assert found.windows(cuts) == wanted.windows(cuts)
    for one, other in zip(boundaries(found, cuts), boundaries(wanted, cuts), strict=True):
        assert (one.specs, one.gradient_specs) == (other.specs, other.gradient_specs)


def chain(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return x


def flattened(model: Any, x: Tensor) -> Tensor:
    """Tokens as rows, a mask of [length, length] made of values, a transposed residual."""
    rows = model.blocks[0](x.reshape(-1, WIDTH))
    grid = rows.view(x.shape)
    scores = (grid @ grid.transpose(1, 2)).tril() * torch.ones(x.shape[1], x.shape[1])
    turned = model.blocks[1](scores @ grid).transpose(1, 2)
    part = model.blocks[2](turned.transpose(1, 2).contiguous())[:, :, : WIDTH // 2]
    return model.blocks[3](torch.cat([part, part], -1)) + turned.transpose(1, 2)


class Padded(nn.Module):
    """Returns as many rows as the next multiple of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.inner(x), (0, 0, 0, -x.shape[1] % 8))


def padded_inside(model: Any, x: Tensor) -> Tensor:
    length = x.shape[1]
    return chain(model, x)[:, :length]


def padded_outside(model: Any, x: Tensor) -> Tensor:
    first = model.blocks[0](x)
    return chain(model, F.pad(first, (0, 0, 0, -x.shape[1] % 8)))[:, : x.shape[1]]


class Halved(nn.Module):
    """A convolution over time that skips every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


def halved(model: Any, x: Tensor) -> Tensor:
    return x + chain(model, x).mean(1, keepdim=True)


def window(model: Any, x: Tensor) -> Tensor:
    first = model.blocks[0](x)
    return x + chain(model, first[:, -20:]).mean(1, keepdim=True)


def hugging_face(name: str) -> nn.Module:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "use_cache": False,
    }
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    made: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**llama, **small)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(head_dim=8, sliding_window=20, **llama, **small)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(use_cache=False, **t5, **small)),
    }
    return made[name]().train()


def visited(recorder: Recorder, make: Make, shapes: Sequence[tuple[int, int]]) -> int:
    """How many of these were predicted; each as it would have been recorded."""
    predicted = 0
    for samples, length in shapes:
        batch = make(samples, length)
        found = recorder.planned(batch)
        if found.predicted:
            predicted += 1
            assert_as_recorded(found, recorder.record(batch))
    return predicted


def example_gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(vocabulary=61, width=16, layers=2, heads=2, length=48, dropout=0.1, tied=True)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Make]] = {
    "gpt": (example_gpt, lambda b, s: dict.fromkeys(("tokens", "targets"), torch.zeros(b, s, dtype=torch.long))),
    "flattened": (lambda: Stack(flattened, lambda: nn.Linear(WIDTH, WIDTH)), hidden),
    "llama": (lambda: hugging_face("llama"), tokens),
    "gemma2": (lambda: hugging_face("gemma2"), tokens),
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_is_predicted_is_what_would_be_recorded(name: str) -> None:
    model, make = FAMILIES[name]
    shapes = [(3, 9), (3, 40), (3, 18), (3, 21), (2, 9), (2, 40), (2, 22), (3, 35), (2, 33), (3, 10)]
    assert visited(Recorder(model()), make, shapes) == 5  # from (2, 22) on, two sizes explain all


def test_two_lengths_of_an_encoder_and_a_decoder() -> None:
    recorder, noise = Recorder(hugging_face("t5")), random.Random(0)
    predicted = 0
    for _ in range(16):
        ids = torch.ones(2, noise.randrange(8, 40), dtype=torch.long)
        batch = {"input_ids": ids, "labels": torch.ones(2, noise.randrange(8, 40), dtype=torch.long)}
        found = recorder.planned(batch)
        if found.predicted:
            predicted += 1
            assert_as_recorded(found, recorder.record(batch))
    assert predicted >= 2


@pytest.mark.parametrize(
    ("run", "unit", "most"),
    [(halved, Halved, 0), (padded_inside, Padded, 0), (padded_outside, None, 0), (window, None, 4)],
    ids=["stride of 2", "padded inside", "padded outside", "window"],
)
def test_sizes_by_rounding_are_recorded(run: Any, unit: Any, most: int) -> None:
    recorder = Recorder(Stack(run, unit or (lambda: nn.Linear(WIDTH, WIDTH)), blocks=1 if unit else 3))
    shapes = [(2, s) for s in (9, 35, 18, 13, 24, 31, 17, 26, 11, 30)]
    assert visited(recorder, hidden, shapes) <= most


def test_a_size_of_one_is_another_family() -> None:
    recorder = Recorder(Stack(flattened, lambda: nn.Linear(WIDTH, WIDTH)))
    assert visited(recorder, hidden, [(1, 9), (3, 9), (2, 9), (4, 9), (1, 20), (1, 13), (1, 11)]) == 1


def test_another_way_between_is_recorded() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        made = chain(model, x)
        return made.tanh() if x.shape[1] < 20 else made

    recorder = Recorder(Stack(run, lambda: nn.Linear(WIDTH, WIDTH)))
    # 15 lies between lengths of one way; 21 lies between the ways.
    assert visited(recorder, hidden, [(2, s) for s in (9, 12, 16, 24, 33, 21)]) == 0
    assert visited(recorder, hidden, [(2, 15)]) == 1
