"""Train a Hugging Face Llama in three dimensions: stages, tensor groups and replicas; or plan one that fits no machine.

    python examples/three_d.py                         # 2 stages x 2 ranks x 2 replicas, eight actors on this machine
    python examples/three_d.py --plan-only --size 7b   # what each rank would hold of Llama 7B; nothing is started

The model is transformers' own, unmodified; how its layers are split among the ranks of a stage is its own plan too.
"""

import argparse
import functools

import torch
from make_corpus import read_parts
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from raypipe import PipelineTrainer

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def build(config):
    return LlamaForCausalLM(config)


def batches(text, samples, length):
    """Bytes of Python's standard library, block after block, for ever the same."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return [{"input_ids": piece, "labels": piece} for piece in rows.split(samples) if len(piece) == samples]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--tensor-parallel", type=int, default=2)
    parser.add_argument("--data-parallel", type=int, default=2)
    parser.add_argument("--shard", choices=("none", "optimizer"), default="optimizer")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--microbatches", type=int, default=4, help="pieces of a replica's share of a batch")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens a sample")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--plan-only", action="store_true")
    options = parser.parse_args()

    config = LlamaConfig(vocab_size=32000 if options.size == "7b" else 256, use_cache=False, **SIZES[options.size])
    data = batches(read_parts(limit_bytes=2 * 2**20)["train"], options.batch_size, options.length)
    with PipelineTrainer(
        functools.partial(build, config),  # no process ever holds all of its weights
        options.stages,
        tensor_parallel=options.tensor_parallel,
        data_parallel=options.data_parallel,
        shard=None if options.shard == "none" or options.data_parallel == 1 else options.shard,
        precision=options.precision,
        recompute=options.recompute,
        schedule=options.schedule,
        microbatches=options.microbatches,
        microbatch_weight="targets",
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3),
        lr_scheduler=functools.partial(
            get_cosine_schedule_with_warmup, num_warmup_steps=options.steps // 10, num_training_steps=options.steps
        ),
        max_grad_norm=1.0,
        datasets={"train": data},
    ) as trainer:
        print(trainer.plan(), end="\n\n", flush=True)
        if options.plan_only:
            return
        rows = trainer.fit(steps=options.steps).metrics_dataframe
        print(f"\nloss {rows['loss'].iloc[0]:.2f} -> {rows['loss'].iloc[-1]:.2f}")


if __name__ == "__main__":
    main()
