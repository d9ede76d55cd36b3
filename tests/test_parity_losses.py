"""Losses of many kinds through a pipeline: exact, or refused with the way out."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import piped, trainer_of

from raypipe import BatchError

WORDS, WIDTH, ROWS, LENGTH = 11, 6, 10, 7
plain = functools.partial(torch.optim.SGD, lr=1024.0)  # the gradient is (before - after) / lr
Loss = Callable[[Any, Any], Tensor]


class Net(nn.Module):
    """Logits of words, hidden states, and a router that nothing but a balance trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)
        self.router = nn.Linear(WIDTH, 4)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        router = self.router(x)
        for layer in self.layers:
            x = x + layer(x)
        return {"x": x, "pooled": x.mean(1), "one": x.mean((1, 2)), "logits": self.head(x), "router": router}


def called(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(batch["ids"])


def batch_of(padded: bool = True) -> dict[str, Tensor]:
    """Rows of very different lengths, and targets of many kinds."""
    noise = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (ROWS, LENGTH), generator=noise)
    lengths = torch.tensor([7, 2, 5, 3, 7, 6, 1, 4, 2, 2]) if padded else torch.full((ROWS,), LENGTH)
    mask = torch.arange(LENGTH) < lengths[:, None]
    return {
        "ids": ids * mask,
        "labels": torch.where(mask, ids.roll(1, 1), -100),
        "lengths": lengths,
        "kind": torch.randint(0, 3, (ROWS,), generator=noise),
        "value": torch.randn(ROWS, generator=noise),
        "many": torch.randint(0, 2, (ROWS, WIDTH), generator=noise).float(),
        "other": torch.randn(ROWS, WIDTH, generator=noise),
        "sign": torch.randint(0, 2, (ROWS,), generator=noise) * 2 - 1,
    }


def lm(o: Any, b: Any, **options: Any) -> Tensor:
    """As Hugging Face's causal models have it: a row's first label counts for nothing."""
    return F.cross_entropy(o["logits"][:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten(), **options)


def each(o: Any, b: Any) -> Tensor:
    return lm(o, b, reduction="none").view(len(b["ids"]), -1)


def valid(b: Any) -> Tensor:
    return b["labels"][:, 1:] != -100  # type: ignore[no-any-return]


def rows(o: Any, b: Any) -> Tensor:
    return F.cross_entropy(o["pooled"][:, :3], b["kind"])


def focal(o: Any, b: Any) -> Tensor:
    return (1 - (-each(o, b)).exp()) ** 2 * each(o, b)


def z(o: Any) -> Tensor:
    return o["logits"][:, :-1].logsumexp(-1).square()  # type: ignore[no-any-return]


def balance(o: Any) -> Tensor:
    """Of experts: a product of two means over the batch."""
    shares = o["router"].softmax(-1).flatten(0, 1)
    chosen = F.one_hot(shares.argmax(-1), 4).float().mean(0)
    return 4 * (chosen * shares.mean(0)).sum()


def contrastive(o: Any, b: Any) -> Tensor:
    logits = 10 * F.normalize(o["pooled"], dim=-1) @ F.normalize(b["other"], dim=-1).T
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def ctc(o: Any, b: Any, **options: Any) -> Tensor:
    scores = o["logits"].log_softmax(-1).transpose(0, 1)
    heard = torch.full((len(b["ids"]),), LENGTH)
    return F.ctc_loss(scores, b["ids"].clamp(min=1), heard, (b["lengths"] // 2).clamp(min=1), **options)


def divergence(o: Any, b: Any, reduction: str) -> Tensor:
    return F.kl_div(o["pooled"].log_softmax(-1), b["other"].softmax(-1), reduction=reduction)


EXACT: dict[str, Loss] = {
    "causal": lm,
    "tokens": lambda o, b: F.cross_entropy(o["logits"].flatten(0, 1), b["labels"].flatten()),
    "class-weights": lambda o, b: lm(o, b, weight=torch.linspace(0.3, 2, WORDS)),
    "smoothing": lambda o, b: lm(o, b, label_smoothing=0.1),
    "sum": lambda o, b: lm(o, b, reduction="sum"),
    "rows": rows,
    "mse": lambda o, b: F.mse_loss(o["one"], b["value"]),
    "huber": lambda o, b: F.huber_loss(o["one"], b["value"]),
    "multi-label": lambda o, b: F.binary_cross_entropy_with_logits(
        o["pooled"], b["many"], pos_weight=torch.linspace(1, 3, WIDTH)
    ),
    "mean-of-token-means": lambda o, b: (each(o, b).sum(1) / valid(b).sum(1).clamp(min=1)).mean(),
    "focal": lambda o, b: focal(o, b).mean(),
    "kl-batchmean": lambda o, b: divergence(o, b, "batchmean"),
    "ctc": ctc,
    "ctc-sum": lambda o, b: ctc(o, b, reduction="sum"),
    "z-over-valid": lambda o, b: lm(o, b) + 1e-4 * z(o)[valid(b)].mean(),
    "cosine": lambda o, b: F.cosine_embedding_loss(o["pooled"], b["other"], b["sign"]),
    "triplet": lambda o, b: F.triplet_margin_loss(o["pooled"], b["other"], -b["other"]),
    "gaussian": lambda o, b: F.gaussian_nll_loss(o["one"], b["value"], torch.ones(len(b["value"]))),
}
REFUSED: dict[str, Loss] = {
    "two-averages": lambda o, b: lm(o, b) + rows(o, b),
    "a-small-second-average": lambda o, b: lm(o, b) + 1e-5 * rows(o, b),
    "masked-mean": lambda o, b: each(o, b).sum() / valid(b).sum(),
    "focal-over-valid": lambda o, b: focal(o, b).sum() / valid(b).sum(),
    "z-over-all": lambda o, b: lm(o, b) + 1e-4 * z(o).mean(),
    "contrastive": contrastive,
    "balance": lambda o, b: lm(o, b) + 1e-3 * balance(o),
    "a-tiny-balance": lambda o, b: lm(o, b) + 1e-5 * balance(o),
    "balance-by-hand": lambda o, b: each(o, b).mean() + 1e-3 * balance(o),
    "a-tiny-balance-by-hand": lambda o, b: each(o, b).mean() + 1e-5 * balance(o),
    "balance-beside-a-sum": lambda o, b: each(o, b).sum() + 1e-2 * balance(o),
    "spread": lambda o, b: lm(o, b) + 1e-3 * o["x"].std(),
}


def assert_exact(
    model: nn.Module, batch: Any, forward: Callable[..., Any], loss: Loss, microbatches: int, **options: Any
) -> None:
    """Loss to 1e-6, gradients to 1e-5."""
    whole = copy.deepcopy(model).train()
    value = loss(forward(whole, batch), batch)
    value.backward()
    settings = {"forward": forward, "loss": loss, "optimizer": plain, "microbatches": microbatches, **options}
    found = piped(model, [batch], 2, **settings)
    assert found.losses[0] == pytest.approx(value.item(), rel=1e-6)
    before = model.state_dict()
    biggest = max(float(p.grad.norm()) for p in whole.parameters() if p.grad is not None)
    for name, parameter in whole.named_parameters():
        wanted = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        # Relative to its own size, down to what is rounding error beside the others and in the weights.
        bound = 1e-5 * max(float(wanted.norm()), 1e-2 * biggest) + 3e-7 * float(parameter.detach().norm()) / 1024
        assert float(((before[name] - found.state[name]) / 1024 - wanted).norm()) < bound, name


@pytest.mark.parametrize("name", EXACT)
def test_a_loss_whose_rule_is_found(name: str) -> None:
    """Also where the first batch is full and only a later one is padded."""
    assert_exact(Net(), batch_of(), called, EXACT[name], 4)
    assert_exact(Net(), batch_of(), called, EXACT[name], 2, example=batch_of(padded=False))


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_no_rule_splits(name: str) -> None:
    options = {"forward": called, "loss": REFUSED[name]}
    for microbatches in (2, 4):
        with pytest.raises(BatchError, match="give microbatch_weight"):
            trainer_of(Net(), 2, microbatches=microbatches, example=batch_of(), **options)
    assert_exact(Net(), batch_of(), called, REFUSED[name], 1)


def test_a_weight_of_ones_own() -> None:
    def tokens(microbatch: Any) -> float:
        return float(valid(microbatch).sum())

    assert_exact(Net(), batch_of(), called, REFUSED["masked-mean"], 4, microbatch_weight=tokens)
    assert_exact(Net(), batch_of(), called, EXACT["causal"], 4, microbatch_weight=tokens)
    for word, name in (("targets", "causal"), ("samples", "focal"), ("sum", "ctc-sum")):
        assert_exact(Net(), batch_of(), called, EXACT[name], 4, microbatch_weight=word)
    # Taken at its word: a mean of microbatches' balances is what many train with.
    trainer_of(Net(), 2, forward=called, loss=REFUSED["balance"], microbatch_weight="targets", example=batch_of())


def without_targets(*microbatches: int) -> dict[str, Tensor]:
    """Of five, two rows each."""
    batch = batch_of()
    for number in microbatches:
        batch["labels"][2 * number : 2 * number + 2] = -100
    return batch


@pytest.mark.parametrize("empty", [(0,), (4,), (1, 3), (0, 1, 2, 4)], ids=str)
def test_microbatches_without_targets_do_no_harm(empty: tuple[int, ...]) -> None:
    assert_exact(Net(), without_targets(*empty), called, lm, 5)
    assert_exact(Net(), without_targets(*empty), called, EXACT["sum"], 5)


@pytest.mark.parametrize("weight", [None, lambda microbatch: float(valid(microbatch).sum())], ids=["found", "given"])
def test_a_batch_without_targets_is_refused_and_training_goes_on(weight: Any) -> None:
    """The refused batch leaves no trace: weights, momentum and scheduler are as if it had not been there."""
    options = {
        "forward": called,
        "loss": lm,
        "microbatches": 5,
        "microbatch_weight": weight,
        "max_grad_norm": 0.1,
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-2),
        "lr_scheduler": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    }
    good, empty = batch_of(), without_targets(0, 1, 2, 3, 4)
    wanted = piped(Net(), [good, good], 3, **options)
    with trainer_of(Net(), 3, **options) as trainer:
        trainer.train_step(good)
        before = trainer.state_dict()
        with pytest.raises(BatchError, match="no microbatch of the batch has a valid target"):
            trainer.train_step(empty)
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state_dict().items())
        assert torch.tensor(trainer.evaluate([empty])["loss"]).isnan()
        assert trainer.train_step(good)["loss"] == wanted.losses[1]
        assert all(torch.equal(wanted.state[name], tensor) for name, tensor in trainer.state_dict().items())


def test_fit_goes_on_after_a_refused_batch() -> None:
    """What was queued behind it is trained on, and the next fit begins after that."""
    good, empty = batch_of(), without_targets(0, 1, 2, 3, 4)
    data = {"train": [good, empty, good, good, empty]}
    options: dict[str, Any] = {"forward": called, "loss": lm, "microbatches": 5, "optimizer": plain}
    options["optimizer"] = functools.partial(torch.optim.SGD, lr=0.1)
    wanted = piped(Net(), [good] * 3, 2, **options)
    with trainer_of(Net(), 2, datasets=data, **options) as trainer:
        for _ in range(2):
            with pytest.raises(BatchError, match="no microbatch of the batch has a valid target"):
                trainer.fit()
        assert all(torch.equal(wanted.state[name], tensor) for name, tensor in trainer.state_dict().items())


def test_terms_that_part_ways_in_a_later_batch_are_refused_before_the_update() -> None:
    options = {"forward": called, "loss": REFUSED["two-averages"], "microbatches": 5, "optimizer": plain}
    with trainer_of(Net(), 2, example=batch_of(padded=False), **options) as trainer:
        trainer.train_step(batch_of(padded=False))
        before = trainer.state_dict()
        for run in (trainer.train_step, lambda batch: trainer.evaluate([batch])):
            with pytest.raises(BatchError, match=re.escape("a loss function averages over")):
                run(batch_of())
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state_dict().items())


SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BERT = {**TEXT, **SMALL, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "max_position_embeddings": 16}


def hugging_face(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of a few thousand weights, and a batch with labels padded unevenly."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(3, 40, (6, 8), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(8) < torch.tensor([[5], [8], [3], [8], [2], [7]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    kind = torch.tensor([0, 1, 1, 0, 0, 0])
    gpt = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0, "embd_pdrop": 0}
    if name.startswith("causal"):
        model: nn.Module = t.GPT2LMHeadModel(t.GPT2Config(attn_pdrop=0, **gpt, **SMALL))
        if name == "causal-items":
            batch["num_items_in_batch"] = (batch["labels"][:, 1:] != -100).sum()
    elif name == "seq2seq":
        t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0}
        model = t.T5ForConditionalGeneration(t.T5Config(decoder_start_token_id=0, **t5, **SMALL))
    elif name == "pretraining":
        model = t.BertForPreTraining(t.BertConfig(**BERT))
        batch["next_sentence_label"] = kind
    elif name == "tokens":
        model = t.BertForTokenClassification(t.BertConfig(**BERT))
        batch["labels"] = (batch["labels"] % 2).masked_fill(mask == 0, -100)
    elif name == "regression":
        model = t.BertForSequenceClassification(t.BertConfig(num_labels=1, **BERT))
        batch["labels"] = kind + 0.5
    else:
        text = {**TEXT, **SMALL, "max_position_embeddings": 16}
        image = {**TEXT, "image_size": 8, "patch_size": 4}
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=image, projection_dim=12))
        del batch["labels"]
        batch |= {"pixel_values": torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
        batch["return_loss"] = True
    return model.train(), batch


def by_name(model: nn.Module, batch: Any) -> Any:
    return model(**batch)


def own(outputs: Any, batch: Any) -> Tensor:
    return outputs["loss"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["causal", "causal-items", "seq2seq", "tokens", "regression"])
def test_the_losses_of_hugging_face_models(name: str) -> None:
    model, batch = hugging_face(name)
    assert_exact(model, batch, by_name, own, 4)


@pytest.mark.parametrize("name", ["pretraining", "contrastive"])
def test_losses_of_hugging_face_models_that_no_rule_splits(name: str) -> None:
    model, batch = hugging_face(name)
    with pytest.raises(BatchError, match="give microbatch_weight"):
        trainer_of(model, 2, microbatches=2, example=batch)
    assert_exact(model, batch, by_name, own, 1)
