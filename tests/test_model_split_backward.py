from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from raypipe.model.split_backward import SplitBackward, splittable
from raypipe.model.weight_queue import WeightQueue

Gradients = dict[str, Tensor | None]


def noise(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients_of(model: nn.Module, inputs: list[Tensor]) -> Gradients:
    found = {name: p.grad for name, p in model.named_parameters()}
    return found | {f"input {number}": x.grad for number, x in enumerate(inputs)}


def whole(model: nn.Module, loss: Callable[[Any, Tensor], Tensor], given: list[Tensor]) -> Gradients:
    model, inputs = copy.deepcopy(model), [leaf(x) for x in given]
    for x in inputs:
        torch.manual_seed(0)
        loss(model, x).backward()  # type: ignore[no-untyped-call]
    return gradients_of(model, inputs)


def halves(model: nn.Module, loss: Callable[[Any, Tensor], Tensor], given: list[Tensor]) -> tuple[Gradients, set[str]]:
    """The gradients, and the parameters that had one already when the weight halves began."""
    model, inputs = copy.deepcopy(model), [leaf(x) for x in given]
    queues = [WeightQueue() for _ in inputs]
    for x, queue in zip(inputs, queues, strict=True):
        torch.manual_seed(0)
        with SplitBackward(queue):
            found = loss(model, x)
        with SplitBackward(queue):
            found.backward()  # type: ignore[no-untyped-call]
    early = {name for name, p in model.named_parameters() if p.grad is not None}
    waiting = {id(p) for queue in queues for p in queue.parameters()}
    assert not early & {name for name, p in model.named_parameters() if id(p) in waiting}
    assert all(x.grad is not None for x in inputs if x.requires_grad)
    for queue in queues:
        queue.drain()
        assert len(queue) == 0
    return gradients_of(model, inputs), early


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point() or x.is_complex())  # shares memory, keeps strides


def assert_bits(found: Gradients, wanted: Gradients) -> None:
    for name, gradient in wanted.items():
        own = found[name]
        if gradient is None or own is None:
            assert gradient is own, name
        elif gradient.is_sparse:
            assert own.is_sparse
            assert torch.equal(own.to_dense(), gradient.to_dense()), name
        else:
            assert torch.equal(own, gradient), name
            assert own.stride() == gradient.stride(), name


def some(model: Any, x: Tensor) -> Tensor:
    """A loss whose gradient is no constant."""
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    return (
        (y.abs() if y.is_complex() else y.square())
        .mul(torch.linspace(0.1, 1, y.shape[0]).view(-1, *[1] * (y.dim() - 1)))
        .sum()
    )


def assert_split(model: nn.Module, given: list[Tensor], *, early: set[str] = frozenset(), loss: Any = some) -> None:  # type: ignore[assignment]
    """The halves give the whole's bits, and only ``early`` parameters have a gradient after the input halves."""
    found, own_early = halves(model, loss, given)
    assert_bits(found, whole(model, loss, given))
    assert own_early == early


class Uses(nn.Module):
    """A module that does with its own weights what a test says."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **weights: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, weight in weights.items():
            setattr(self, name, weight)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(noise(*shape) / 4)


W = 6
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(W, 5), (4, 3, W)),
    "linear without bias": (lambda: nn.Linear(W, 5, bias=False), (4, 3, W)),
    "linear of a matrix": (lambda: nn.Linear(W, 5), (4, W)),
    "linear of a vector": (lambda: nn.Linear(W, 5), (W,)),
    "linear of a head": (lambda: nn.Linear(W, 5), (2, 3, 4, W)),
    "linear of nothing": (lambda: nn.Linear(W, 5), (0, W)),
    "linear by name": (
        lambda: Uses(lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), w=weight(5, W), b=weight(5)),
        (4, W),
    ),
    "bilinear": (lambda: Uses(lambda m, x: m.layer(x, x), layer=nn.Bilinear(W, W, 3)), (4, W)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding="valid"), (2, 4, 9, 9)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 9, 9)),
    "conv2d channels last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 9, 9)),  # type: ignore[call-overload]
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, dilation=2), (2, 2, 7, 7, 7)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(W), (4, 3, W)),
    "rms norm": (lambda: nn.RMSNorm(W), (4, 3, W)),
    "group norm": (lambda: nn.GroupNorm(2, W), (4, W, 5)),
    "addmm": (lambda: Uses(lambda m, x: torch.addmm(m.b, x, m.w), w=weight(W, 5), b=weight(5)), (4, W)),
    "baddbmm": (lambda: Uses(lambda m, x: torch.baddbmm(m.b, x, m.w), w=weight(4, W, 5), b=weight(4, 1, 5)), (4, 3, W)),
    "matmul": (lambda: Uses(lambda m, x: x @ m.w, w=weight(W, 5)), (4, 3, W)),
    "matmul from the left": (lambda: Uses(lambda m, x: torch.matmul(m.w, x), w=weight(5, 3)), (4, 3, W)),
    "bmm": (lambda: Uses(lambda m, x: torch.bmm(x, m.w), w=weight(4, W, 5)), (4, 3, W)),
    "einsum": (lambda: Uses(lambda m, x: torch.einsum("btc,cd->btd", x, m.w), w=weight(W, 5)), (4, 3, W)),
    "transposed": (lambda: Uses(lambda m, x: x @ m.w.T, w=weight(5, W)), (4, 3, W)),
    "packed": (lambda: Uses(lambda m, x: [F.linear(x, w) for w in m.w.chunk(2)][1], w=weight(10, W)), (4, 3, W)),
    "self-attention": (lambda: Uses(lambda m, x: m.a(x, x, x), a=nn.MultiheadAttention(W, 2)), (4, 3, W)),
    "attention across": (
        lambda: Uses(lambda m, x: m.a(x, x.flip(0), x.flip(0)), a=nn.MultiheadAttention(W, 2)),
        (4, 3, W),
    ),
    "attention of other widths": (
        lambda: Uses(
            lambda m, x: m.a(x, x[..., :4], x[..., :5], need_weights=False),
            a=nn.MultiheadAttention(W, 2, kdim=4, vdim=5, batch_first=True),
        ),
        (4, 3, W),
    ),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(W, 2, 8, dropout=0.3), (4, 3, W)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, shape = LAYERS[name]
    assert_split(make(), [noise(*shape, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("name", LAYERS)
def test_results_that_are_changed_in_place(name: str) -> None:
    def loss(model: Any, x: Tensor) -> Tensor:
        y = model(torch.sin(x).mul_(2))
        return (y[0] if isinstance(y, tuple) else y).add_(1).relu_().square().sum()  # type: ignore[no-any-return]

    make, shape = LAYERS[name]
    assert_split(make(), [noise(*shape)], loss=loss)


def test_hooks_of_modules_see_the_gradients_of_inputs_and_results() -> None:
    model, seen = nn.Sequential(nn.Linear(W, W), nn.Linear(W, W)), []
    for layer in model:
        layer.register_full_backward_hook(lambda _, inputs, outputs: seen.append((*inputs, *outputs)))
    assert_split(model, [noise(4, W)])
    halved, full = seen[:2], seen[2:]
    assert all(torch.equal(a, b) for one, two in zip(halved, full, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    "shape",
    [lambda y: y.transpose(0, 1), lambda y: y.sum().expand(4), lambda y: y[::2, 1:], lambda y: y.permute(2, 0, 1)],
    ids=["transposed", "expanded", "strided", "permuted"],
)
@pytest.mark.parametrize(
    "x", [noise(3, 4, W).transpose(0, 1), noise(4, 3, 2 * W)[..., ::2]], ids=["transposed", "strided"]
)
@pytest.mark.parametrize(
    "layer", [nn.Linear(W, 5), nn.Linear(W, 5, bias=False), nn.LayerNorm(W), nn.RMSNorm(W)], ids=str
)
def test_layouts_of_inputs_and_gradients(layer: nn.Module, x: Tensor, shape: Callable[[Tensor], Tensor]) -> None:
    assert_split(layer, [x, x], loss=lambda model, x: (shape(model(x)) ** 3).sum())


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_layouts_of_images(memory: torch.memory_format) -> None:
    x = noise(2, 4, 9, 9).contiguous(memory_format=memory)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(inplace=True), nn.Conv2d(6, 1, 3))
    norm = {"1.weight", "1.bias"} if memory is torch.channels_last else frozenset()
    assert_split(model, [x, x], early=set(norm))


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=lambda options: "".join(options),
)
def test_embeddings(options: dict[str, Any]) -> None:
    tokens = [torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert_split(nn.Embedding(9, W, **options), tokens)


def test_an_embedding_that_renormalises_stays_whole() -> None:
    tokens = [torch.tensor([[1, 2, 1]])]
    assert_split(nn.Embedding(9, W, max_norm=0.5), tokens, early={"weight"})


def tied(model: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = F.linear(torch.tanh(x), model.w, model.b)
    return x @ model.w.t()


def test_a_weight_that_is_used_many_times() -> None:
    assert_split(Uses(tied, w=weight(W, W), b=weight(W)), [noise(4, 3, W, seed=seed) for seed in range(4)])


def test_a_tied_head() -> None:
    def run(model: Any, tokens: Tensor) -> Tensor:
        return F.linear(model.norm(model.embedding(tokens)), model.embedding.weight)  # type: ignore[no-any-return]

    tokens = [torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert_split(Uses(run, embedding=nn.Embedding(9, W), norm=nn.LayerNorm(W)), tokens)


def test_a_weight_that_is_also_used_whole_differs_in_the_last_bits_only() -> None:
    model = Uses(lambda m, x: m.layer(x) * m.layer.weight.sin().sum(), layer=nn.Linear(W, W))
    given = [noise(4, W, seed=seed) for seed in range(3)]
    inputs = [leaf(x) for x in given]
    own = copy.deepcopy(model)
    for x in inputs:
        queue = WeightQueue()
        with SplitBackward(queue):
            some(own, x).backward()  # type: ignore[no-untyped-call]
        queue.drain()
    wanted = whole(model, some, given)
    for name, gradient in gradients_of(own, inputs).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias", "0"])
def test_frozen_parts(frozen: str) -> None:
    model = nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, 3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    early = {"0.weight": {"0.bias"}, "2.weight": {"2.bias"}}.get(frozen, set())
    assert_split(model, [noise(4, W), noise(4, W)], early=early)


def test_an_input_without_gradient_leaves_weights_only() -> None:
    queue, model, x = WeightQueue(), nn.Linear(W, W), noise(4, W)
    with SplitBackward(queue), FlopCounterMode(display=False) as first:
        loss = model(x).square().sum()
    with SplitBackward(queue), FlopCounterMode(display=False) as second:
        loss.backward()
    assert first.get_total_flops() > 0 == second.get_total_flops()
    assert queue.parameters() == (model.weight, model.bias)
    queue.drain()
    assert model.weight.grad is not None


def test_each_half_does_its_own_work() -> None:
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), noise(4, 8).requires_grad_()
    queue, flops = WeightQueue(), []
    with SplitBackward(queue), FlopCounterMode(display=False) as counted:
        loss = model(x).sum()
    flops.append(counted.get_total_flops())
    with SplitBackward(queue), FlopCounterMode(display=False) as counted:
        loss.backward()
    flops.append(counted.get_total_flops())
    with FlopCounterMode(display=False) as counted:
        queue.drain()
    assert [*flops, counted.get_total_flops()] == [3 * 2 * 4 * 8 * 8] * 3


def test_parameters_with_hooks_stay_whole() -> None:
    model, seen = nn.Sequential(nn.Linear(W, W), nn.Linear(W, W)), []
    model[0].weight.register_hook(lambda gradient: seen.append(gradient.shape))
    model[1].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("added"))
    queue, x = WeightQueue(), leaf(noise(4, W))
    with SplitBackward(queue):
        some(model, x).backward()  # type: ignore[no-untyped-call]
    assert seen == ["added", (W, W)]
    assert len(queue) == 0


def test_a_cast_that_was_changed_since_stays_whole() -> None:
    """As when a LoRA's product is added to a copy of the weight: more than the weight is behind it."""

    def run(model: Any, x: Tensor) -> Tensor:
        merged = model.w.to(torch.float64)
        merged.add_(model.a @ model.b)
        return F.linear(x, merged)

    weights = {name: nn.Parameter(noise(*shape)) for name, shape in {"w": (W, W), "a": (W, 2), "b": (2, W)}.items()}
    for name in ("a", "b"):
        weights[name] = nn.Parameter(weights[name].double())
    assert_split(Uses(run, **weights), [noise(4, W).double()] * 2, early={"w"})


def test_parametrised_weights_stay_whole() -> None:
    model = parametrizations.weight_norm(nn.Linear(W, W, bias=False))
    names = {name for name, _ in model.named_parameters()}
    assert_split(model, [noise(4, W), noise(4, W)], early=names)


def test_complex_numbers() -> None:
    assert_split(nn.Linear(W, 4, dtype=torch.complex64), [noise(3, W, dtype=torch.complex64)] * 2)


def test_an_input_that_is_the_weight_and_one_that_is_given_twice() -> None:
    assert_split(Uses(lambda m, x: F.linear(m.w, m.w) + x, w=weight(W, W)), [noise(W, W)])
    assert_split(Uses(lambda m, x: torch.baddbmm(x, x, m.w), w=weight(W, W, W)), [noise(W, W, W)])


def test_a_change_in_place_of_what_a_call_saved_is_an_error_as_ever() -> None:
    model, x = nn.Linear(W, W), leaf(noise(4, W))
    with SplitBackward(WeightQueue()):
        h = x * 2
        y = model(h).sum()
        h.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize("cache", [True, False])
def test_autocast_casts_as_ever(cache: bool) -> None:
    def loss(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            return some(model, x * 1)

    model = Uses(tied, w=weight(W, W), b=weight(W))
    given = [noise(4, 3, W, seed=seed) for seed in range(3)]
    assert_split(model, given, loss=loss)
    assert_split(nn.Sequential(nn.Linear(W, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2)), given, loss=loss)
    assert whole(model, loss, given)["w"].dtype is torch.float32  # type: ignore[union-attr]


def test_under_autocast_a_leaf_is_cast_once_for_all_of_its_users() -> None:
    """Their gradients are summed in bfloat16, so these calls stay whole."""

    def loss(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model[3](torch.stack([layer(x) for layer in model[:3]]).prod(0)).float().square().sum()

    model = nn.Sequential(*(nn.Linear(W, W) for _ in range(4)))
    early = {f"{number}.{name}" for number in range(3) for name in ("weight", "bias")}
    assert_split(model, [noise(8, W)], loss=loss, early=early)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(W, 9), nn.GELU(), nn.Dropout(0.3), nn.Linear(9, W)) for _ in range(3)
        )
        self.norm = nn.LayerNorm(W)
        self.runs = 0

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        self.runs += 1
        return self.norm(x + block(x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(self.block, block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    assert_split(Checkpointed(reentrant), [noise(4, 3, W, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_runs_again_once(reentrant: bool) -> None:
    model, x, queue = Checkpointed(reentrant), leaf(noise(4, W)), WeightQueue()
    with SplitBackward(queue):
        loss = some(model, x)
    with SplitBackward(queue):
        loss.backward()  # type: ignore[no-untyped-call]
    queue.drain()
    assert model.runs == 6


def test_a_gradient_asked_for_inside_the_forward_is_given_and_not_left() -> None:
    def loss(model: Any, x: Tensor) -> Tensor:
        inner = some(model, x)
        of_input, of_weight = torch.autograd.grad(inner, [x, model[0].weight], retain_graph=True)
        return some(model, x + of_input) + (of_weight.sum() * x).sum() + inner

    model = nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W))
    assert_split(model, [noise(4, W), noise(4, W)], loss=loss)


def test_a_graph_that_is_kept_runs_twice() -> None:
    def loss(model: Any, x: Tensor) -> Tensor:
        first = some(model, x)
        first.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        return first * 2

    assert_split(nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W)), [noise(4, W)], loss=loss)


def counted() -> tuple[Any, list[str]]:
    """A product of matrices, and what of it was computed."""
    calls: list[str] = []

    def product(x: Tensor, w: Tensor) -> Tensor:
        calls.append("F")
        return x @ w

    def of_input(g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        calls.append("I")
        return g @ w.T

    def of_weight(g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        calls.append("W")
        return x.T @ g

    return splittable(product, of_input, of_weight), calls


def test_a_function_of_ones_own_is_split_into_what_is_asked_for() -> None:
    function, calls = counted()
    model = Uses(lambda m, x: function(torch.tanh(function(x, m.one)), m.two), one=weight(W, W), two=weight(W, 3))
    x = noise(4, W)
    wanted = whole(model, some, [x])
    assert calls == ["F", "F", "I", "W", "I", "W"]
    calls.clear()
    queue, x = WeightQueue(), leaf(x)
    with SplitBackward(queue):
        loss = some(model, x)
    assert calls == ["F", "F"]
    with SplitBackward(queue):
        loss.backward()  # type: ignore[no-untyped-call]
    assert calls == ["F", "F", "I", "I"]
    queue.drain()
    assert calls == ["F", "F", "I", "I", "W", "W"]
    assert_bits(gradients_of(model, [x]), wanted)


@pytest.mark.parametrize(("of_input", "of_weight"), [(True, False), (False, True)])
def test_a_function_of_ones_own_computes_no_gradient_in_vain(of_input: bool, of_weight: bool) -> None:
    function, calls = counted()
    x, w = noise(4, W).requires_grad_(of_input), weight(W, W).requires_grad_(of_weight)
    queue = WeightQueue()
    with SplitBackward(queue):
        function(x, w).sum().backward()
    queue.drain()
    assert calls == ["F", "I" if of_input else "W"]
    torch.autograd.grad(function(x * 1, w).sum(), [t for t in (x, w) if t.requires_grad])
    assert calls[2:] == ["F", "I" if of_input else "W"]


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # of the compiler's own imports
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_parts_are_exact(backend: str) -> None:
    """PyTorch's compiler takes them out of sight, so they have a whole backward."""
    if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        pytest.skip("no C++ compiler")
    model = nn.Sequential(nn.Linear(W, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, W), nn.Linear(W, W))
    given = [noise(4, W, seed=seed) for seed in range(2)]
    torch._dynamo.reset()
    first = torch.compile(model[:4], backend=backend)

    def bits(split: bool) -> Gradients:
        model.zero_grad()
        inputs = [leaf(x) for x in given]
        for x in inputs:
            queue = WeightQueue()
            with SplitBackward(queue) if split else nullcontext():
                loss = some(lambda y: model[4](first(y)), x)
            with SplitBackward(queue) if split else nullcontext():
                loss.backward()  # type: ignore[no-untyped-call]
            assert (model[4].weight in queue.parameters()) == split
            queue.drain()
        return gradients_of(model, inputs)

    wanted = bits(False)
    assert_bits(bits(True), wanted)
    torch._dynamo.reset()


def test_a_gradient_of_a_gradient_is_refused() -> None:
    model, x = nn.Linear(W, W), leaf(noise(4, W))
    with SplitBackward(WeightQueue()):
        y = some(model, x)
        with pytest.raises(RuntimeError, match=r"create_graph=True.* such as '1f1b'"):
            torch.autograd.grad(y, x, create_graph=True)


def test_without_grad_mode_nothing_is_left() -> None:
    model, queue = nn.Linear(W, W), WeightQueue()
    with SplitBackward(queue), torch.no_grad():
        assert not model(noise(4, W)).requires_grad


def test_what_only_the_input_half_needs_is_freed_there() -> None:
    """A linear layer's weight half needs its input and its result's gradient: nothing of what is between layers."""
    model = nn.Sequential(nn.Linear(W, 50), nn.GELU(), nn.Linear(50, W))
    queue, x = WeightQueue(), leaf(noise(4, W))
    with SplitBackward(queue):
        before_gelu = model[0](x)
        hidden = F.gelu(before_gelu)
        memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in (before_gelu, hidden)]
        loss = some(model[2], hidden)
        del before_gelu, hidden
        assert [part.expired() for part in memory] == [False, False]
        loss.backward()  # type: ignore[no-untyped-call]
    assert [part.expired() for part in memory] == [True, False]
    queue.drain()
    assert [part.expired() for part in memory] == [True, True]


def test_a_checkpoint_keeps_nothing_of_what_it_runs_again() -> None:
    """As without halves: an input's stand-in must not hold its memory."""
    kept: list[StorageWeakRef] = []

    def block(x: Tensor) -> Tensor:
        hidden = torch.tanh(x)
        kept.append(StorageWeakRef(hidden.untyped_storage()))
        return F.linear(hidden, weight(W, W))

    with SplitBackward(WeightQueue()):
        y = checkpoint(block, leaf(noise(4, W)), use_reentrant=False)
    assert kept[0].expired()
    assert y.requires_grad


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bert_masked", "albert", "t5", "whisper", "vit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hugging_face_families(name: str, checkpointing: bool) -> None:
    if checkpointing and name == "albert":
        pytest.skip("ALBERT has no checkpointing of its own")
    family = FAMILIES[name]
    model = family.build(dropout=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    batches = [family.batch(3, seed=seed) for seed in (1, 2)]

    def loss(model: Any, number: Tensor) -> Tensor:
        return model(**batches[int(number)]).loss  # type: ignore[no-any-return]

    found, early = halves(model, loss, [torch.tensor(0), torch.tensor(1)])
    assert_bits(found, whole(model, loss, [torch.tensor(0), torch.tensor(1)]))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes[name] for name in early) < 0.1 * sum(sizes.values()) or name == "mixtral"
