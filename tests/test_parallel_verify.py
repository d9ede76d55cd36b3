from __future__ import annotations

import copy

import pytest
import torch
from tensor_models import WIDTH, llama, loss_of, pairs, small, split, tokens
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional as F

from raypipe.errors import CutError
from raypipe.parallel.apply import split_layers, summed_parameters
from raypipe.parallel.heads import split_heads
from raypipe.parallel.tensor_plan import find_styles
from raypipe.parallel.verify import Trial


def tried(group, model, plan, ids, units="blocks"):
    """Trains one step under a trial; what is still waiting afterwards, or the refusal."""
    model = copy.deepcopy(model).train()
    inside = model.get_submodule(units)
    modules = {f"{units}.{name}": module for name, module in inside.named_children()}
    trial = Trial(modules)
    styles, local = split_heads(model, find_styles(model, plan, group.size), group.size)
    summed = summed_parameters(model, styles)
    split_layers(model, group, styles, local)
    trial.watch(modules, group, summed)
    first = len(trial.waiting)
    try:
        loss_of(model, ids).backward()
    except CutError as error:
        return str(error)
    return first, trial.waiting


def test_a_right_plan_passes_and_one_unit_of_a_kind_is_tried(tensor_team) -> None:
    assert tensor_team(2).run(tried, small(dropout=0.1), pairs(), tokens()[0]) == [(1, ())] * 2


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_plans_of_hugging_face_pass(tensor_team, kind) -> None:
    assert tensor_team(2).run(tried, llama(kind=kind), None, tokens()[0], "model.layers") == [(1, ())] * 2


def test_few_key_value_heads_pass(tensor_team) -> None:
    assert tensor_team(4).run(tried, llama(4, 2), None, tokens()[0], "model.layers") == [(1, ())] * 4


def test_dropout_between_a_column_and_its_row_is_refused(tensor_team) -> None:
    for found in tensor_team(2).run(tried, small(attention_dropout=0.5), pairs(), tokens()[0]):
        assert "blocks.0, split among 2 ranks" in found
        assert "dropout" in found


class Fused(nn.Module):
    """Queries, keys and values in one layer: its first columns are all queries."""

    def __init__(self):
        super().__init__()
        self.heads, self.head_dim = 4, 4
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Rescaled(nn.Module):
    """Divides by its own width, which is smaller on a rank."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x):
        y = self.up(x)
        return self.down(y / y.shape[-1])


def with_own_gradients_only(group, model, ids):
    """Keys and values whose gradients are those of a rank's own queries: the loss is right."""
    from raypipe.parallel import styles

    def pick(own, module, args, output):
        return output.redistribute(placements=[Replicate()]).to_local()[..., own]

    right, styles._pick = styles._pick, pick
    try:
        whole = float(loss_of(copy.deepcopy(model), ids).detach())
        naive = copy.deepcopy(model)
        split(naive, group)
        return whole - float(loss_of(naive, ids).detach()), tried(group, model, None, ids, "model.layers")
    finally:
        styles._pick = right


def test_wrong_gradients_under_a_right_loss_are_refused(tensor_team) -> None:
    for difference, found in tensor_team(4).run(with_own_gradients_only, llama(4, 2), tokens()[0]):
        assert abs(difference) < 1e-6
        assert "another gradient of " in found


def in_small(block):
    model = small(layers=1)
    model.blocks[0] = block
    return model


@pytest.mark.parametrize(
    ("block", "columns", "row"), [(Fused(), "qkv", "out"), (Rescaled(), "up", "down")], ids=["fused", "rescaled"]
)
def test_what_would_be_wrong_in_silence_is_refused(tensor_team, block, columns, row) -> None:
    plan = {f"blocks.*.{columns}": ColwiseParallel(), f"blocks.*.{row}": RowwiseParallel()}
    for found in tensor_team(2).run(tried, in_small(block), plan, tokens()[0]):
        assert "does not compute what it does whole: another output 0" in found


def test_an_output_that_stays_split_is_refused(tensor_team) -> None:
    plan = {"blocks.*.attention.[qkv]*": ColwiseParallel(), "blocks.*.attention.out": ColwiseParallel()}
    for found in tensor_team(2).run(tried, small(), plan, tokens()[0]):
        assert "does not compute what it does whole" in found


def random_state(group, model, plan, ids):
    model = copy.deepcopy(model).train()
    modules = {f"blocks.{name}": module for name, module in model.blocks.named_children()}
    trial = Trial(modules)
    split(model, group, plan)
    trial.watch(modules, group)
    states = []
    for _ in range(2):  # the first call is tried, the second is not
        torch.manual_seed(3)
        states.append((float(loss_of(model, ids).detach()), torch.get_rng_state().tolist()))
    return states[0] == states[1], all(p.grad is None for p in model.parameters())


def test_a_trial_leaves_no_trace(tensor_team) -> None:
    assert tensor_team(2).run(random_state, small(dropout=0.5), pairs(), tokens()[0]) == [(True, True)] * 2


def checkpointed(group, model, plan, ids):
    from torch.utils.checkpoint import checkpoint

    plain = copy.deepcopy(model)
    loss_of(plain, ids).backward()
    model = copy.deepcopy(model)
    modules = {f"blocks.{name}": module for name, module in model.blocks.named_children()}
    trial = Trial(modules)
    shards = split(model, group, plan)
    trial.watch(modules, group)
    x = model.embedding(ids[:, :-1])
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    logits = model.head(model.norm(x))
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    shards.collect()
    found, wanted = model.embedding.weight.grad, plain.embedding.weight.grad
    return trial.waiting, float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_a_checkpoint_around_a_unit_does_not_see_its_trial(tensor_team) -> None:
    assert tensor_team(2).run(checkpointed, small(), pairs(), tokens()[0]) == [((), True)] * 2


def test_no_trial_without_gradients(tensor_team) -> None:
    assert tensor_team(2).run(evaluated, small(), pairs(), tokens()[0]) == [("blocks.0",)] * 2


def evaluated(group, model, plan, ids):
    modules = {f"blocks.{name}": module for name, module in model.blocks.named_children()}
    trial = Trial(modules)
    split(model, group, plan)
    trial.watch(modules, group)
    with torch.no_grad():
        loss_of(model, ids)
    return trial.waiting
