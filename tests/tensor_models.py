"""Models for tensor parallelism, and five steps of AdamW on them, unsplit or on one rank of a tensor group."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel
from torch.nn import functional as F

from raypipe.parallel.apply import split_layers, summed_parameters
from raypipe.parallel.heads import split_heads
from raypipe.parallel.shards import Shards
from raypipe.parallel.tensor_plan import find_styles

VOCABULARY, WIDTH, STEPS = 61, 16, 5


class Attention(nn.Module):
    def __init__(self, heads, dropout=0.0):
        super().__init__()
        self.num_heads, self.head_dim, self.dropout = heads, WIDTH // heads, dropout
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)  # a bias's gradient is rounding here, which AdamW scales up
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape

        def by_head(y):
            return y.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

        q, k, v = by_head(self.query(x)), by_head(self.key(x)), by_head(self.value(x))
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(attended.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    def __init__(self, heads=4, dropout=0.0, attention_dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(heads, attention_dropout)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout1(self.attention(self.norm1(x)))
        return x + self.dropout2(self.down(F.gelu(self.up(self.norm2(x)))))


class Small(nn.Module):
    """A GPT by hand: tokens of shape [batch, length] to a loss, or to logits."""

    def __init__(self, heads=4, layers=2, tied=False, **options):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(heads, **options) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, targets=None):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def pairs():
    """The plan of ``Small``'s blocks."""
    return {
        "blocks.*.attention": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
        "blocks.*.attention.[qkv]*": ColwiseParallel(),
        "blocks.*.attention.out": RowwiseParallel(),
        "blocks.*.up": ColwiseParallel(),
        "blocks.*.down": RowwiseParallel(),
    }


def ends():
    """The plan of its embedding and head, by vocabulary."""
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


def small(**options):
    torch.manual_seed(0)
    return Small(**options)


def llama(heads=4, keys=2, tied=False, kind="llama", width=16, **options):
    """A tiny Hugging Face model that has a plan of its own."""
    import transformers

    torch.manual_seed(0)
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    made = config(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=8,
        tie_word_embeddings=tied,
        max_position_embeddings=32,
        **options,
    )
    return model(made)


def family(kind):
    """Another tiny Hugging Face model."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    keys = {} if kind == "GPTNeoX" else {"num_key_value_heads": 2, "max_position_embeddings": 32}
    more = {"head_dim": 4} if kind == "Gemma2" else {}
    return getattr(transformers, f"{kind}ForCausalLM")(
        config(**sizes, **special, **keys, **more, vocab_size=VOCABULARY)
    )


def tokens(steps=STEPS, samples=4, length=12):
    noise = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (samples, length), generator=noise) for _ in range(steps)]


def loss_of(model, ids):
    if isinstance(model, Small):
        return model(ids[:, :-1], ids[:, 1:])
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train_whole(model, max_norm=0.5, **adamw):
    """Losses, norms and weights of five steps of the unsplit model."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **adamw)
    losses, norms = [], []
    for ids in tokens():
        loss = loss_of(model, ids)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model.state_dict()


def split(model, group, plan=None):
    """The model split in place, and its shards."""
    styles, local = split_heads(model, find_styles(model, plan, group.size), group.size)
    summed = summed_parameters(model, styles)
    split_layers(model, group, styles, local)
    return Shards(group, dict(model.named_parameters()), summed)


def train_split(group, model, plan=None, max_norm=0.5, **adamw):
    """The same on one rank of a group."""
    model = copy.deepcopy(model).train()
    shards = split(model, group, plan)
    optimizer = torch.optim.AdamW(list(shards.parameters.items()), lr=1e-2, **adamw)
    losses, norms = [], []
    for ids in tokens():
        loss = loss_of(model, ids)
        loss.backward()
        shards.collect()
        shards.check_replicas()
        trained = [name for name, p in shards.parameters.items() if p.requires_grad]
        norm = float(torch.linalg.vector_norm(shards.norms(trained)))
        for parameter in shards.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()
        norms.append(norm)
        losses.append(loss.item())
    return losses, norms, {name: shards.full(name) for name in shards.parameters}
