"""Train a byte-level GPT on Python's own standard library, over four pipeline stages.

    python examples/train_gpt.py                    # Ray actors on this machine
    python examples/train_gpt.py --backend local    # all stages in this process, for a debugger

The model is an ordinary module, written as one would for one GPU.
"""

import argparse
import math
from pathlib import Path

import torch
from make_corpus import make_corpus
from torch import nn
from torch.nn import functional as F

import raypipe
from raypipe import PipelineTrainer


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Maps tokens of shape [batch, length] to logits, or to the loss where targets are given."""

    def __init__(self, vocabulary=256, width=128, layers=6, heads=4, length=128, dropout=0.05, tied=True):
        super().__init__()
        self.length = length
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(self._init)
        if tied:
            self.head.weight = self.embedding.weight

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens, targets=None):
        tokens = tokens.long()
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.long().flatten())

    @torch.no_grad()
    def generate(self, prompt, count, temperature=0.8):
        """Continues a byte string."""
        tokens = torch.tensor([list(prompt)])
        for _ in range(count):
            logits = self(tokens[:, -self.length :])[:, -1] / temperature
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        return bytes(tokens[0].tolist())


def optimizer(parameters):
    """AdamW without weight decay on norms, biases and embeddings."""
    decayed = [(name, p) for name, p in parameters if p.dim() > 1 and "embedding" not in name]
    plain = [(name, p) for name, p in parameters if not (p.dim() > 1 and "embedding" not in name)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=3e-3, betas=(0.9, 0.95))


def lr_scheduler(optimizer, steps=500, warmup=30):
    """Linear warm-up, then a cosine down to a tenth."""

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--backend", choices=("ray", "local"), default="ray")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpt"))
    options = parser.parse_args()

    make_corpus(options.folder / "corpus", block=128)
    data = {
        "train": raypipe.data.parquet(options.folder / "corpus/train", ["tokens", "targets"], options.batch_size),
        "valid": raypipe.data.parquet(options.folder / "corpus/valid", ["tokens", "targets"], 64, shuffle=False),
    }
    torch.manual_seed(0)
    model = GPT()
    with PipelineTrainer(
        model,
        options.stages,
        datasets=data,
        schedule=options.schedule,
        microbatches=options.microbatches,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        max_grad_norm=1.0,
        backend=options.backend,
    ) as trainer:
        print(trainer.plan(), end="\n\n", flush=True)
        result = trainer.fit(steps=options.steps)
        model.load_state_dict(trainer.state_dict())

    torch.save(model.state_dict(), Path(result.path) / "model.pt")
    print(f"\nloss {result.metrics_dataframe['loss'].iloc[0]:.2f} -> {result.metrics['loss']:.2f}. A sample:\n")
    print(model.eval().generate(b"def ", 300).decode(errors="replace"))
    print(f"\nResults (metrics.csv, schedule.txt, model.pt): {result.path}\n")
    print((Path(result.path) / "schedule.txt").read_text())


if __name__ == "__main__":
    main()
