"""The models that are trained here. A pipeline's peer gets the same modules: a slice of the same ``Sequential``."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class _Through(torch.autograd.Function):
    """The way of a sleeper's input: F in the forward, I in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, forward_s: float, input_s: float) -> Tensor:
        ctx.input_s, ctx.shape = input_s, x.shape
        time.sleep(forward_s)
        return x.view_as(x) if x.shape[-1] == width else x.new_zeros(len(x), width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        time.sleep(ctx.input_s)
        return gradient if gradient.shape == ctx.shape else gradient[:, :1], None, None, None


class _Weigh(torch.autograd.Function):
    """The way of a sleeper's weight: nothing in the forward, W in the backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, weight_s: float) -> Tensor:
        ctx.weight_s, ctx.shape = weight_s, weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.weight_s)
        return gradient.new_zeros(ctx.shape), None


class Sleeper(nn.Module):
    """An accelerator that is emulated: gives [batch, width] after a while, and needs a while for either gradient.

    Input and weight go two ways that meet in an addition, since what a Function of both were asked for could not be
    told from inside it. So whoever asks for one gradient alone waits for that one alone, and a whole backward for both.

    Args:
        width: of what it gives.
        forward_s, input_s, weight_s: seconds of the forward, of the gradient of the input and of that of the weights.
        first: whether nothing stands before it. Then it adds a parameter to its input, as an embedding does, so that an
            input's gradient is asked for here too.
    """

    def __init__(self, width: int, forward_s: float, input_s: float, weight_s: float, *, first: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.start = nn.Parameter(torch.zeros(1)) if first else None
        self.width, self.forward_s, self.input_s, self.weight_s = width, forward_s, input_s, weight_s

    def forward(self, x: Tensor) -> Tensor:
        if self.start is not None:
            x = x + self.start
        through: Tensor = _Through.apply(x, self.width, self.forward_s, self.input_s)
        return through + _Weigh.apply(self.weight, self.weight_s)


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


def sleepers(count: int, sleeps: Sleeps, width: int = 65536) -> nn.Sequential:
    """Units that sleep; the boundary between two is [1, width] float32 a sample."""
    return nn.Sequential(*(Sleeper(width, *sleeps, first=number == 0) for number in range(count)))


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
