from __future__ import annotations

import copy

import pytest
import torch
from tensor_models import WIDTH, ends, llama, pairs, small, split, train_split, train_whole
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)


def assert_same_training(found, wanted, tolerance):
    """Losses, norms and every weight, by its size."""
    losses, norms, state = found
    assert losses == pytest.approx(wanted[0], rel=tolerance)
    assert norms == pytest.approx(wanted[1], rel=tolerance)
    for name, value in wanted[2].items():
        if name in state:
            assert float((state[name] - value).norm() / value.norm().clamp_min(1e-30)) < tolerance, name
    assert set(state) <= set(wanted[2])


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tied", [False, True])
def test_pairs_train_as_the_unsplit_model(tensor_team, size, tied) -> None:
    model = small(tied=tied).double()
    plan = {**pairs(), **ends()}  # 61 tokens: the ranks' parts of the vocabulary differ in length
    wanted = train_whole(model)
    for found in tensor_team(size).run(train_split, model, plan):
        assert_same_training(found, wanted, 1e-9)


def sequence_parallel():
    """Norms on a part of the sequence each; the units' ends are whole."""
    whole, part = Replicate(), Shard(1)
    return {
        "blocks.*": PrepareModuleInput(input_layouts=whole, desired_input_layouts=part),
        "blocks.*.norm*": SequenceParallel(),
        "blocks.*.attention": PrepareModuleInput(input_layouts=part, desired_input_layouts=whole),
        "blocks.*.attention.[qkv]*": ColwiseParallel(),
        "blocks.*.attention.out": RowwiseParallel(output_layouts=part, use_local_output=False),
        "blocks.*.up": ColwiseParallel(input_layouts=part),
        "blocks.*.down": RowwiseParallel(output_layouts=part, use_local_output=False),
    }


def with_whole_outputs(group, model, plan):
    """``train_split`` where each block also ends whole, which is a second style of the same module."""
    for block in model.blocks:
        PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())._apply(block, group.mesh)
    return train_split(group, model, plan)


def test_sequence_parallel_norms_train_as_the_unsplit_model(tensor_team) -> None:
    model = small().double()
    wanted = train_whole(model)
    for found in tensor_team(2).run(with_whole_outputs, model, sequence_parallel()):
        assert_same_training(found, wanted, 1e-9)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_plans_train_as_the_unsplit_model(tensor_team, kind, tied) -> None:
    model = llama(kind=kind, tied=tied).double()  # its norms compute in float32 whatever it holds
    wanted = train_whole(model)
    for found in tensor_team(2).run(train_split, model):
        assert_same_training(found, wanted, 1e-5)


def frozen_norms(group, model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(False)
    split(model, group, sequence_parallel())
    return [name for name, p in model.named_parameters() if not p.requires_grad]


def test_frozen_parameters_stay_frozen(tensor_team) -> None:
    frozen = {f"blocks.{b}.norm{n}.{kind}" for b in (0, 1) for n in (1, 2) for kind in ("weight", "bias")}
    for found in tensor_team(2).run(frozen_norms, small()):
        assert set(found) == frozen | {"norm.weight", "norm.bias"}


def memory(group, model, plan):
    model = copy.deepcopy(model)
    before = {name: p.numel() for name, p in model.named_parameters()}
    split(model, group, plan)
    held = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {n: (before[n], t.numel(), t.untyped_storage().nbytes() // t.element_size()) for n, t in held.items()}


def test_a_rank_keeps_its_own_slices_only(tensor_team) -> None:
    for found in tensor_team(2).run(memory, small(), pairs()):
        for name, (whole, own, kept) in found.items():
            cut = any(part in name for part in ("query", "key", "value", "up.", "out.weight", "down.weight"))
            assert own == (whole // 2 if cut else whole), name
            assert kept == own, f"{name} keeps {kept} numbers for {own}"


def untied(group, model, plan):
    try:
        split(copy.deepcopy(model), group, plan)
    except ValueError as error:
        return str(error)
    return None


def test_ties_that_would_break_are_refused(tensor_team) -> None:
    plan = {**pairs(), "head": ends()["head"]}
    for found in tensor_team(2).run(untied, small(tied=True), plan):
        assert found is not None
        assert "embedding.weight and head.weight are one weight" in found
        assert "or neither" in found


def one_weight(group, model, plan):
    model = copy.deepcopy(model)
    split(model, group, plan)
    return model.head.weight is model.embedding.weight


def test_tied_weights_are_one_weight_afterwards(tensor_team) -> None:
    assert tensor_team(2).run(one_weight, small(tied=True), ends()) == [True, True]


def counted(group, model, plan, ids):
    from torch.distributed.tensor.debug import CommDebugMode

    split(model, group, plan)
    with CommDebugMode() as forward:
        loss = model(ids).square().mean() if plan else model(input_ids=ids, use_cache=False).logits.square().mean()
    with CommDebugMode() as backward:
        loss.backward()
    return [{str(op).split(".")[-1]: n for op, n in m.get_comm_counts().items() if n} for m in (forward, backward)]


def test_a_pair_costs_one_all_reduce_forward_and_one_backward(tensor_team) -> None:
    ids = torch.arange(8).view(2, 4)
    twice = {"all_reduce": 4}  # two blocks of two pairs
    for forward, backward in tensor_team(2).run(counted, small(), pairs(), ids):
        assert (forward, backward) == (twice, twice)


def test_a_hugging_face_block_costs_two_all_reduces_each_way(tensor_team) -> None:
    ids = torch.arange(8).view(2, 4)
    for forward, backward in tensor_team(2).run(counted, llama(), None, ids):
        # Beside the blocks': the embedding's, and the gathered logits; the head's input's, and none for tokens.
        assert forward == {"all_reduce": 4 + 1, "all_gather_into_tensor": 1}
        assert backward == {"all_reduce": 4 + 1}


def test_widths_are_as_the_tests_assume() -> None:
    assert small().blocks[0].up.weight.shape == (4 * WIDTH, WIDTH)
