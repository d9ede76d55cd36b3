"""The models that are trained here. A pipeline's peer gets the same modules: a slice of the same ``Sequential``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raypipe.model.split_backward import splittable

__all__ = [
    "Hoard",
    "Scale",
    "Sleeper",
    "Sleeps",
    "adamw",
    "first_mean",
    "gpt",
    "gpt_batch",
    "hoards",
    "llama",
    "scales",
    "sgd",
    "sleepers",
    "token_loss",
]

VOCABULARY, WIDTH, HEADS, BLOCKS, LENGTH = 8192, 512, 8, 8, 256


class Block(nn.Module):
    """A transformer's block, for hidden states of shape [batch, length, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.mlp_norm(x))


class Head(nn.Module):
    """From hidden states to logits over the vocabulary."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


def gpt(width: int = WIDTH, heads: int = HEADS, blocks: int = BLOCKS, vocabulary: int = VOCABULARY) -> nn.Sequential:
    """Embedding, blocks, head; always the same weights."""
    torch.manual_seed(0)
    layers = [Block(width, heads) for _ in range(blocks)]
    return nn.Sequential(nn.Embedding(vocabulary, width), *layers, Head(width, vocabulary))


def gpt_batch(samples: int = 16, length: int = LENGTH, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Tokens and targets of shape [samples, length]; always the same."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (samples, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Sleeps(NamedTuple):
    """Seconds that a stage sleeps for a microbatch: in its forward, for its input's and for its weights' gradient."""

    forward: float
    input: float
    weight: float

    @property
    def backward(self) -> float:
        """Of a whole backward."""
        return self.input + self.weight

    def shared(self, chunks: int) -> Sleeps:
        """Of one of so many chunks of a stage."""
        return Sleeps(*(seconds / chunks for seconds in self))


class Sleeper(nn.Module):
    """An accelerator that is emulated: gives [batch, width] after a while, and needs a while for either gradient.

    Whoever asks for one gradient alone waits for that one alone (``raypipe.model.split_backward.splittable``), and a
    whole backward waits for both. That is so for every way to take a backward apart: raypipe's queue, and autograd
    asked for inputs first and for weights later, as the peer does.

    Args:
        width: of what it gives.
        sleeps: how long.
        first: whether nothing stands before it. Then it adds a parameter to its input, as an embedding does, so that an
            input's gradient is asked for here too.
    """

    def __init__(self, width: int, sleeps: Sleeps, *, first: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.start = nn.Parameter(torch.zeros(1)) if first else None
        work = _Work(width, sleeps)
        self.work = splittable(work.forward, work.input_gradient, work.weight_gradient)

    def forward(self, x: Tensor) -> Tensor:
        return self.work(x if self.start is None else x + self.start, self.weight)


@dataclass(frozen=True)
class _Work:
    width: int
    sleeps: Sleeps

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        _sleep(self.sleeps.forward)
        # No view: the peer lets go of what it has sent, which a view does not allow.
        return x.clone() if x.shape[-1] == self.width else x.new_zeros(len(x), self.width)

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        _sleep(self.sleeps.input)
        return gradient if gradient.shape == x.shape else gradient[:, :1]

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        _sleep(self.sleeps.weight)
        return gradient[0, :1]


def _sleep(seconds: float) -> None:
    if seconds:  # the shortest sleep takes 0.1 ms
        time.sleep(seconds)


def sleepers(count: int, sleeps: Sleeps, width: int = 65536) -> nn.Sequential:
    """Units that sleep; the boundary between two is [1, width] float32 a sample."""
    return nn.Sequential(*(Sleeper(width, sleeps, first=number == 0) for number in range(count)))


class Scale(nn.Module):
    """Multiplies by a vector: keeps its input for the backward and costs nearly no time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, len(self.weight)) * self.weight


def scales(count: int, width: int) -> nn.Sequential:
    """Units with ``width`` weights each, that keep as much for each sample."""
    return nn.Sequential(*(Scale(width) for _ in range(count)))


class Hoard(nn.Module):
    """Holds ``size`` weights and uses one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:1]


def hoards(*sizes: int) -> nn.Sequential:
    """Units with so many weights each."""
    return nn.Sequential(*map(Hoard, sizes))


def first_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that costs nothing: the mean of each sample's first element."""
    return outputs[:, 0].mean()


def llama(layers: int = 12) -> nn.Module:
    """A Hugging Face Llama of the same width, which builds masks and positions in its own forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            use_cache=False,
        )
    )


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of both sides."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer that costs nothing."""
    return torch.optim.SGD(parameters, lr=0.0)
