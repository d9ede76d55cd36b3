"""Tiny Hugging Face models of many families, random and unmodified, with batches such as users have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["FAMILIES", "VOCABULARY", "Family", "image_batch", "padded", "text_batch"]

VOCABULARY = 96
LENGTHS = (12, 5, 9, 12, 3, 7, 10, 12)
"""Of the rows of a batch: the others are padding."""

Batch = dict[str, Tensor]

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {**_LLAMA, "type_vocab_size": 2}
_ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes: ``model``, its class's name in transformers; ``config``, what is tiny in its configuration; ``batch``,
    which makes a batch of some samples from a seed; ``shared``, whether weights are used in several places;
    ``most_stages`` that it can be cut into.
    """

    model: str
    config: dict[str, Any]
    batch: Callable[..., Batch]
    shared: bool = False
    most_stages: int = 4

    def build(self, *, dropout: float = 0.0, seed: int = 0, **changes: Any) -> nn.Module:
        """The model, in train mode, from random numbers alone; ``changes`` are to its configuration."""
        cls = getattr(transformers, self.model)
        config = cls.config_class(**{**self.config, **changes})
        for key, value in config.to_dict().items():
            if "drop" in key and "layer" not in key and isinstance(value, (int, float)):
                setattr(config, key, dropout)
        torch.manual_seed(seed)
        built: nn.Module = cls(config)
        return built.train()


def padded(samples: int, *, seed: int = 1, left: bool = False, lengths: Sequence[int] = LENGTHS) -> Batch:
    """Tokens [samples, 12] and their mask; rows differ in length."""
    noise = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (samples, 12), generator=noise)
    own = torch.tensor([lengths[row % len(lengths)] for row in range(samples)])
    mask = torch.arange(12) < own[:, None]
    mask = mask.flip(1) if left else mask
    return {"input_ids": torch.where(mask, tokens, 0), "attention_mask": mask.long()}


def _unevenly(labels: Tensor, mask: Tensor, seed: int) -> Tensor:
    """Labels with -100 on padding, on every third token of some rows, and on most of one row."""
    noise = torch.Generator().manual_seed(seed + 1)
    keep = torch.rand(labels.shape, generator=noise) < torch.linspace(0.2, 1.0, len(labels))[:, None]
    keep[:, :2] = True
    return torch.where(mask.bool() & keep, labels, -100)


def text_batch(samples: int = 8, *, seed: int = 1, **padding: Any) -> Batch:
    """For a causal language model."""
    batch = padded(samples, seed=seed, **padding)
    return {**batch, "labels": _unevenly(batch["input_ids"], batch["attention_mask"], seed)}


def _masked_batch(samples: int = 8, *, seed: int = 1, **padding: Any) -> Batch:
    """For a masked language model, with two segments."""
    batch = text_batch(samples, seed=seed, **padding)
    return {**batch, "token_type_ids": (torch.arange(12) >= 4).long().repeat(samples, 1)}


def _masked_unmasked_batch(samples: int = 8, *, seed: int = 1) -> Batch:
    """For a model that knows no mask, and takes its segments from a buffer."""
    batch = text_batch(samples, seed=seed)
    return {key: batch[key] for key in ("input_ids", "labels")}


def _classified_batch(samples: int = 8, *, seed: int = 1, **padding: Any) -> Batch:
    """For a classifier of sequences."""
    batch = _masked_batch(samples, seed=seed, **padding)
    return {**batch, "labels": torch.randint(0, 3, (samples,), generator=torch.Generator().manual_seed(seed))}


def _translated_batch(samples: int = 8, *, seed: int = 1, **padding: Any) -> Batch:
    """For an encoder-decoder: the target's rows have other lengths than the source's."""
    batch = padded(samples, seed=seed, **padding)
    target = padded(samples, seed=seed + 7, lengths=LENGTHS[::-1])
    labels = target["input_ids"][:, :8]
    return {**batch, "labels": torch.where(target["attention_mask"][:, :8].bool(), labels, -100)}


def image_batch(samples: int = 8, *, seed: int = 1) -> Batch:
    """For a classifier of images."""
    noise = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(samples, 3, 8, 8, generator=noise),
        "labels": torch.randint(0, 3, (samples,), generator=noise),
    }


def _speech_batch(samples: int = 8, *, seed: int = 1) -> Batch:
    """For speech to text: [samples, mel bands, frames]."""
    noise = torch.Generator().manual_seed(seed)
    labels = padded(samples, seed=seed)
    return {
        "input_features": torch.randn(samples, 8, 24, generator=noise),
        "labels": torch.where(labels["attention_mask"].bool(), labels["input_ids"], -100),
    }


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        text_batch,
        shared=True,
    ),
    "llama": Family("LlamaForCausalLM", _LLAMA, text_batch),
    "qwen3": Family("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}, text_batch),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**_LLAMA, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "num_hidden_layers": 4},
        text_batch,
        shared=True,
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", {**_LLAMA, "rotary_pct": 0.5}, text_batch),
    "mixtral": Family("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, text_batch),
    "bert_masked": Family("BertForMaskedLM", _BERT, _masked_batch, shared=True),
    "bert_classifier": Family("BertForSequenceClassification", {**_BERT, "num_labels": 3}, _classified_batch),
    "fnet": Family("FNetForMaskedLM", _BERT, _masked_unmasked_batch, shared=True),
    "albert": Family(
        "AlbertForMaskedLM",
        {**_BERT, "embedding_size": 8, "num_hidden_layers": 4},
        _masked_batch,
        shared=True,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        _translated_batch,
        shared=True,
    ),
    "bart": Family("BartForConditionalGeneration", _ENCODER_DECODER, _translated_batch, shared=True),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        {**_ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32},
        _speech_batch,
        shared=True,
    ),
    "vit": Family(
        "ViTForImageClassification",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 3,
        },
        image_batch,
    ),
}
