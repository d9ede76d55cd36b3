"""More of ``home_made``: modules that are more than their parameters, what a model returns, Python in between."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from home_made import WIDTH, Stack, case, chain, mse, stack, vectors
from parity import Case
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

__all__: list[str] = []  # its cases are in home_made.CASES

# Modules that are more than their parameters.


@case
def weight_norm() -> Case:
    return stack(lambda model, x: chain(model, x), lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))


@case
def orthogonal() -> Case:
    return stack(lambda model, x: chain(model, x), lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)))


@case
def spectral_norm_frozen() -> Case:
    """In eval mode its vectors stay; the rest trains."""
    made = stack(lambda model, x: chain(model, x), lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))
    for block in made.model.blocks:  # type: ignore[union-attr]
        block.parametrizations.eval()
    return made


@case
def batch_norm_frozen() -> Case:
    made = stack(
        lambda model, x: chain(model, x).tanh(), lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    )
    for block in made.model.blocks:  # type: ignore[union-attr]
        block[1].eval()
        block[1].running_mean.normal_()
    return made


@case
def checkpointed_by_hand() -> Case:
    def run(model: Any, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = x + checkpoint(block, x, use_reentrant=False).tanh()
        return x

    return stack(run)


@case
def called_several_times() -> Case:
    def run(model: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            for block in (*model.blocks[:2], *reversed(model.blocks[:2])):
                x = torch.tanh(block(x)) + x
        return model.blocks[3](model.blocks[2](x))  # type: ignore[no-any-return]

    return stack(run)


class Experts(nn.Module):
    """A ``ModuleDict`` that is called by name, and nested lists."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"first": nn.Linear(WIDTH, WIDTH), "last": nn.Linear(WIDTH, WIDTH)})
        self.nested = nn.ModuleList(
            [nn.ModuleList([nn.Linear(WIDTH, WIDTH)]), nn.ModuleList([nn.Linear(WIDTH, WIDTH)])]
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (x,) = args or (kwargs.pop("x"),)
        x = self.parts["first"](x).sin()
        for inner in self.nested:
            for layer in inner:  # type: ignore[attr-defined]
                x = layer(x).tanh()
        x = self.parts["last"](x)
        return F.mse_loss(x, kwargs["y"]) * kwargs["factor"] if "y" in kwargs else x


@case
def a_module_dict_and_any_arguments() -> Case:
    x, y = vectors()
    return Case(Experts(), {"x": x, "y": y, "factor": 2.0})


@case
def a_module_dict_and_a_pair() -> Case:
    return Case(Experts(), vectors(), {"loss": mse})


@case
def nested_sequentials() -> Case:
    def pair() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH)))

    return Case(nn.Sequential(nn.Sequential(pair(), pair()), pair(), pair()), vectors(), {"loss": mse}, most_stages=3)


@case
def an_ordered_dict_of_layers() -> Case:
    layers = collections.OrderedDict((name, nn.Linear(WIDTH, WIDTH)) for name in ("one", "two", "three", "four"))
    return Case(nn.Sequential(layers), vectors(), {"loss": mse})


# What a model returns.


@dataclasses.dataclass
class Output:
    loss: Tensor
    hidden: Any = None


class Scored(NamedTuple):
    loss: Tensor
    logits: Tensor


def returning(make: Callable[[Tensor, Tensor], Any]) -> Case:
    class Local(Stack):
        """Of a class that no other process can import."""

        def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
            h = chain(self, x)
            return make(F.mse_loss(h, y), h)

    x, y = vectors()
    return Case(Local(lambda model, x: x), {"x": x, "y": y})


@case
def a_dataclass_returned() -> Case:
    return returning(lambda loss, h: Output(loss, {"h": (h, 3)}))


@case
def a_namedtuple_returned() -> Case:
    return returning(Scored)


@case
def a_dict_returned() -> Case:
    return returning(lambda loss, h: {"loss": loss, "hidden": [h, None], "name": "a string"})


@case
def a_tuple_returned_to_a_loss() -> Case:
    made = stack(lambda model, x: (chain(model, x), {"aux": x.mean()}, None))
    return dataclasses.replace(made, options={"loss": lambda outputs, y: F.mse_loss(outputs[0], y)})


# Python in between.


@case
def control_flow_on_shapes_and_flags() -> Case:
    class Flagged(Stack):
        def forward(self, x: Tensor, y: Tensor, reverse: bool, mode: str) -> Tensor:  # type: ignore[override]
            blocks = list(self.blocks)
            for block in reversed(blocks) if reverse else blocks:
                x = block(x)
                if x.shape[-1] == WIDTH and x.dim() == 2 and not x.requires_grad - 1:
                    x = x.sin() if mode == "sin" else x.cos()
                for _ in range(x.size(-1) // 4):
                    x = x * 1.1
            return F.mse_loss(x, y)

    x, y = vectors()
    return Case(Flagged(lambda model, x: x), {"x": x, "y": y, "reverse": True, "mode": "sin"})


@case
def masks_asked_for_their_data() -> Case:
    """Control flow on what the batch holds, and on no activation."""

    class Masked(Stack):
        def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            kept = mask.nonzero()[:, 0] if bool(mask.any()) else mask.new_empty(0, dtype=torch.long)
            for block in self.blocks:
                x = x.index_add(0, kept, block(x[kept])).tanh()
            return F.mse_loss(x, y)

    x, y = vectors()
    return Case(Masked(lambda model, x: x), {"x": x, "y": y, "mask": torch.tensor([True, True, True, True])})


@case
def writes_into_a_buffer_of_its_own() -> Case:
    def run(model: Any, x: Tensor) -> Tensor:
        seen = x.new_zeros(len(x), 4, WIDTH)
        for number, block in enumerate(model.blocks):
            x = block(x)
            seen[:, number] = x
        return seen.square().sum(1)

    return stack(run)


@case
def einsum_and_functions() -> Case:
    def run(model: Any, x: Tensor) -> Tensor:
        a, b = (block(x) for block in model.blocks[:2])
        scores = torch.einsum("bi,bj->bij", a, b).softmax(-1)
        c = torch.baddbmm(a.unsqueeze(2), scores, model.blocks[2](x).unsqueeze(2)).squeeze(2)
        one, two = torch.chunk(F.layer_norm(c, (WIDTH,)), 2, -1)
        return model.blocks[3](torch.cat([two, one], -1)).view(len(x), -1)  # type: ignore[no-any-return]

    return stack(run)
