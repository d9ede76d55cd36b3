"""Train a Hugging Face Llama on padded documents, over four pipeline stages.

    python examples/finetune_llama.py                    # Ray actors on this machine
    python examples/finetune_llama.py --backend local    # all stages in this process, for a debugger

The model is transformers' own, unmodified. Its weights start at random, so nothing is downloaded; to fine-tune one of
yours, put ``LlamaForCausalLM.from_pretrained(folder)`` in the place of ``LlamaForCausalLM(config)``, and its tokenizer
in the place of ``encode``.
"""

import argparse
import functools
import math

import torch
from make_corpus import read_parts
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from raypipe import PipelineTrainer

PAD, BEGIN, END, FIRST_BYTE = 0, 1, 2, 3  # a token is one of the three, or a byte plus 3


def encode(text):
    return torch.tensor([BEGIN, *(byte + FIRST_BYTE for byte in text), END])


def decode(tokens):
    return bytes(token - FIRST_BYTE for token in tokens.tolist() if token >= FIRST_BYTE).decode(errors="replace")


def documents(text, longest):
    """The paragraphs of Python's standard library, as tokens; each is as long as it is, up to ``longest``."""
    return [encode(paragraph[: longest - 2]) for paragraph in text.split(b"\n\n") if len(paragraph) > 8]


def collate(rows):
    """A padded batch, as every Hugging Face model takes it: labels of -100 are left out of the loss."""
    input_ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
    attention_mask = (input_ids != PAD).long()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, -100),
    }


def optimizer(parameters):
    """AdamW without weight decay on norms and embeddings. A stage gives the (name, parameter) pairs that it holds."""
    groups = {0.1: [], 0.0: []}
    for name, parameter in parameters:
        groups[0.0 if "norm" in name or "embed" in name else 0.1].append((name, parameter))
    return torch.optim.AdamW(
        [{"params": pairs, "weight_decay": decay} for decay, pairs in groups.items() if pairs], lr=3e-3
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--longest", type=int, default=128, help="tokens in a document at most")
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--backend", choices=("ray", "local"), default="ray")
    options = parser.parse_args()

    text = read_parts(limit_bytes=4 * 2**20)
    held_out = documents(text["valid"], options.longest)[: 8 * options.batch_size]
    data = {
        "train": DataLoader(
            documents(text["train"], options.longest),
            options.batch_size,
            shuffle=True,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(0),
        ),
        "valid": DataLoader(held_out, options.batch_size, collate_fn=collate),
    }
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256 + FIRST_BYTE,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    with PipelineTrainer(
        model,
        options.stages,
        datasets=data,
        schedule=options.schedule,
        microbatches=options.microbatches,
        optimizer=optimizer,
        lr_scheduler=functools.partial(
            get_cosine_schedule_with_warmup, num_warmup_steps=options.steps // 10, num_training_steps=options.steps
        ),
        max_grad_norm=1.0,
        evaluate_every=min(options.evaluate_every, options.steps),
        backend=options.backend,
    ) as trainer:
        print(trainer.plan(), end="\n\n", flush=True)
        result = trainer.fit(steps=options.steps)
        model.load_state_dict(trainer.state_dict())

    rows = result.metrics_dataframe
    print(f"\nloss {rows['loss'].iloc[0]:.2f} -> {result.metrics['loss']:.2f}. On held-out text:")
    for step, loss in rows[["step", "valid_loss"]].dropna().itertuples(index=False):
        print(f"  after {step + 1:.0f} steps: loss {loss:.3f}, perplexity {math.exp(loss):.2f}")
    prompt = encode(b"def ")[None, :-1]
    tokens = model.eval().generate(prompt, max_new_tokens=options.longest, do_sample=True, temperature=0.7)
    print(f"\nA sample:\n\n{decode(tokens[0])}")


if __name__ == "__main__":
    main()
