"""What a recording on fakes says of the memory between forward and backward, against what a real forward keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training import batches_of_tokens, gpt

from raypipe.accounting import observed
from raypipe.model.build import make_skeleton
from raypipe.model.call import Caller
from raypipe.model.intercept import Watch, install
from raypipe.model.twin import Twin
from raypipe.model.units import find_units


class Kept(Watch):
    """The bytes that each real unit call saves, by storage, without parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__({})
        self.resident = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.calls: list[dict[int, int]] = []
        self.alive: list[Any] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.resident:
            self.alive.append(storage)
            self.calls[-1][storage._cdata] = storage.nbytes()
        return tensor

    def unit_call(self, name: str, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append({})
        with self.off(), saved_tensors_hooks(self.pack, lambda tensor: tensor):
            return call(*args, **kwargs)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    made: nn.Module = transformers.LlamaForCausalLM(config)
    return made.train()


@pytest.mark.parametrize("family", ["gpt", "gpt with dropout", "llama"])
def test_as_many_bytes_as_a_real_forward_keeps(family: str) -> None:
    if family == "llama":
        model = llama()
        tokens = batches_of_tokens(1)[0]["tokens"]
        batch = {"input_ids": tokens, "labels": tokens}
    else:
        model, batch = gpt(dropout=0.1 if "dropout" in family else 0.0), batches_of_tokens(1)[0]
    twin = Twin(make_skeleton(model).model)
    recording, saved = observed(twin, Caller(), batch, training=True)
    assert saved is not None
    counted = [sum(saved.by_event.get(event, {}).values()) for event in recording.calls]

    kept = Kept(model)
    with install(find_units(model)).on(kept):
        model(**batch)
    assert counted == [sum(call.values()) for call in kept.calls]
    assert max(counted) > 10_000


def test_a_loss_outside_of_the_model_counts_with_its_last_event() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 32))
    twin = Twin(make_skeleton(model).model)
    batch = (torch.rand(4, 8), torch.randint(0, 32, (4,)))
    _, without = observed(twin, Caller(None, lambda outputs, targets: outputs.sum()), batch, training=True)
    _, with_loss = observed(twin, Caller(None, nn.functional.cross_entropy), batch, training=True)
    assert without is not None
    assert with_loss is not None
    logits, labels, weight = 4 * 32 * 4, 4 * 8, 4
    assert sum(with_loss.by_event[1].values()) - sum(without.by_event[1].values()) == logits + labels + weight


def test_a_mask_that_all_units_get_counts_once() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(4, 8)
            for block in self.blocks:
                x = block(x, mask)
            return x.sum()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x + self.scale) * mask

    recording, saved = observed(Twin(make_skeleton(Masked()).model), Caller(), {"x": torch.rand(4, 8)}, training=True)
    assert saved is not None
    pieces: dict[int, int] = {}
    for event in range(len(recording.events)):
        pieces.update(saved.by_event.get(event, {}))
    assert pieces == {next(iter(pieces)): 4 * 8 * 4}


def test_what_a_unit_is_given_is_told_from_what_it_makes() -> None:
    model = gpt()
    recording, saved = observed(Twin(make_skeleton(model).model), Caller(), batches_of_tokens(1)[0], training=True)
    assert saved is not None
    tokens, position, *blocks, norm, head = recording.calls
    x = 8 * 12 * 16 * 4
    assert sum(saved.arguments[tokens].values()) == 8 * 12 * 8
    assert sum(saved.arguments[position].values()) == 12 * 8
    assert [sum(saved.arguments[number].values()) for number in (*blocks, norm, head)] == [x] * 5
    assert [saved.beside_arguments(number) for number in (tokens, position, head)] == [0, 0, 0]
    assert saved.beside_arguments(norm) == 2 * 8 * 12 * 4  # means and deviations
    assert len({saved.beside_arguments(number) for number in blocks}) == 1


def test_a_model_whose_transforms_refuse_hooks_can_still_be_planned() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.func.grad(lambda y: self.inner(y).square().sum())(x)

    twin = Twin(make_skeleton(nn.Sequential(Slope(), Slope())).model)
    batch = (torch.rand(4, 8), torch.rand(4, 8))
    recording, saved = observed(twin, Caller(None, nn.functional.mse_loss), batch, training=True)
    assert len(recording.calls) == 2
    assert saved is not None
    assert not saved.by_event
