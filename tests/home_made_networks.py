"""More of ``home_made``: architectures, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from home_made import SAMPLES, WIDTH, case, mse, vectors
from parity import Case
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

__all__: list[str] = []  # its cases are in home_made.CASES

LENGTH, VOCABULARY = 5, 23


class UNet(nn.Module):
    """Convolutions down and up, with skips from early units to late ones."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)])
        self.pool = nn.AvgPool2d(2)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ModuleList([nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(16, 4, 3, padding=1)])
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = F.relu(layer(x), inplace=True)
            skips.append(x)
        x = torch.relu_(self.middle(self.pool(x)))
        x = self.up[1](torch.cat([self.up[0](x), skips.pop()], 1))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        made: Tensor = self.head(torch.cat([x, skips.pop()], 1))
        return made


@case
def unet() -> Case:
    return Case(UNet(), vectors(3, 8, 8), {"loss": mse})


@case
def vgg_in_place() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 5),
    )
    batch = torch.randn(SAMPLES, 3, 8, 8), torch.randint(0, 5, (SAMPLES,))
    return Case(model, batch, {"loss": nn.CrossEntropyLoss()})


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(2, out)
        self.two = nn.Conv2d(out, out, 3, padding=1)
        # Not of size 1: its backward in channels_last with a stride corrupts the heap (torch 2.13 on CPUs).
        self.short = nn.Conv2d(channels, out, stride, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu_(self.norm(self.one(x)))) + self.short(x), inplace=True)


class ResNet(nn.Module):
    """Stages of blocks as nested ``Sequential``s."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Residual(4, 4, 1), Residual(4, 4, 1))
        self.layer2 = nn.Sequential(Residual(4, 8, 2), nn.Sequential(Residual(8, 8, 1)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x).to(memory_format=torch.channels_last)))
        made: Tensor = self.fc(x.mean((2, 3)))
        return made


@case
def resnet() -> Case:
    batch = torch.randn(SAMPLES, 3, 8, 8), torch.randint(0, 5, (SAMPLES,))
    return Case(ResNet(), batch, {"loss": F.cross_entropy})


class Language(nn.Module):
    """Blocks of ``make`` between a table of tokens and a head made of that table, with a loss of its own."""

    def __init__(self, make: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.pos_embedding = nn.Parameter(torch.randn(1, LENGTH + 1, WIDTH) * 0.1)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layers = nn.ModuleList(make() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.call = call

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Any]:
        h = torch.cat([self.cls_token.expand(len(tokens), -1, -1), self.emb(tokens)], 1) + self.pos_embedding
        for layer in self.layers:
            h = self.call(layer, h)
        logits = self.norm(h)[:, 1:] @ self.emb.weight.T
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits, "none": None}


def tokens_and_labels(*, ragged: bool = False) -> dict[str, Tensor]:
    labels = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH))
    if ragged:
        labels[torch.arange(LENGTH) >= torch.tensor([[5], [2], [0], [4]])] = -100
    return {"tokens": torch.randint(0, VOCABULARY, (SAMPLES, LENGTH)), "labels": labels}


@case
def a_head_of_another_modules_weight() -> Case:
    model = Language(lambda: nn.Linear(WIDTH, WIDTH), lambda layer, h: h + torch.tanh(layer(h)))
    return Case(model, tokens_and_labels(ragged=True))


@case
def encoder_layers() -> Case:
    return Case(
        Language(lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True), lambda layer, h: layer(h)),
        tokens_and_labels(ragged=True),
    )


@case
def attention_by_itself() -> Case:
    def call(layer: nn.Module, h: Tensor) -> Tensor:
        hidden, weights = layer(h, h, h, need_weights=True, average_attn_weights=False)
        return h + hidden + weights.mean((1, 3)).unsqueeze(-1)  # type: ignore[no-any-return]

    return Case(Language(lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), call), tokens_and_labels())


class Recurrent(nn.Module):
    """Recurrent layers, whose states go on from one to the next, and one over packed sequences inside of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.lstms = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(2))
        self.gru = nn.GRU(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True)
        self.packed = Packed()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        h, state = self.emb(tokens), None
        for lstm in self.lstms:
            h, state = lstm(h, state)
        h, last = self.gru(h)
        h = self.packed(h[..., :WIDTH] * h[..., WIDTH:] + last.mean(0).unsqueeze(1), lengths)
        return F.cross_entropy(self.head(h + state[0].transpose(0, 1)).flatten(0, 1), labels.flatten())


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, h: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(h, lengths.cpu(), batch_first=True, enforce_sorted=False)
        made: Tensor = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=h.shape[1])[0]
        return made


@case
def recurrent() -> Case:
    return Case(Recurrent(), {**tokens_and_labels(ragged=True), "lengths": torch.tensor([5, 2, 3, 4])})


class Translation(nn.Module):
    """``nn.Transformer`` whole, with its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.transformer = nn.Transformer(WIDTH, 2, 2, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        padding, causal = source == 0, nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        h = self.transformer(
            self.emb(source),
            self.emb(tokens),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


@case
def transformer() -> Case:
    source = torch.randint(1, VOCABULARY, (SAMPLES, 7)) * (torch.arange(7) < torch.tensor([[7], [3], [5], [2]]))
    return Case(Translation(), {"source": source, **tokens_and_labels(ragged=True)})


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, padding: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = self.encoder(x, src_key_padding_mask=padding)
        score = self.head(h.masked_fill(padding[..., None], 0.0).sum(1))
        return {"loss": F.mse_loss(score, y), "h": h}


@case
def encoder() -> Case:
    padding = torch.arange(LENGTH) >= torch.tensor([[5], [2], [3], [4]])
    x, y = torch.randn(SAMPLES, LENGTH, WIDTH), torch.randn(SAMPLES, 1)
    return Case(Encoder(), {"x": x, "padding": padding, "y": y})
