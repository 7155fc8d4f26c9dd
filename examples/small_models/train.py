# SPDX-License-Identifier: Apache-2.0
"""Train the two small Mixture-of-Experts models of this project from nothing, on one CPU core each.

    python examples/small_models/train.py mixtral   OUTPUT_DIR
    python examples/small_models/train.py qwen2_moe OUTPUT_DIR

The text comes from ``corpus.py`` (split ``train``). Every step sees one row of 256 tokens from each of the six
domains, so that the router's load is balanced over domains and experts are free to specialise. The result is a
bfloat16 checkpoint with its tokenizer, and ``training.json`` with what was run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from pathlib import Path

import corpus
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

VOCABULARY = 2048
ROW = 256
PEAK_LEARNING_RATE = 2e-3
WARMUP = 100


def make_tokenizer(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with its architecture's special tokens: Mixtral begins with ``<s>``, Qwen2 does not."""
    specials = ["<s>", "</s>", "<pad>"] if kind == "mixtral" else ["<|endoftext|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "mixtral":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    else:
        names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=ROW, **names)


def make_model(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained model. Both stay below 12 MB in bfloat16."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": ROW,
        "router_aux_loss_coef": 0.01,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "mixtral":
        return MixtralForCausalLM(
            MixtralConfig(
                **shared, intermediate_size=224, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
            )
        )
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **shared,
            intermediate_size=384,
            moe_intermediate_size=112,
            shared_expert_intermediate_size=128,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=False,
            mlp_only_layers=[2],
        )
    )


def rows_by_domain(tokenizer: PreTrainedTokenizerFast, samples: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """The samples of each domain, each ended by the end token, in rows of tokens: ``{domain: (rows, ROW)}``."""
    rows = {}
    for domain in corpus.DOMAINS:
        texts = [sample["text"] for sample in samples if sample["domain"] == domain]
        stream = [token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
        count = len(stream) // ROW
        rows[domain] = torch.tensor(stream[: count * ROW]).view(count, ROW)
    return rows


def train(kind: str, output: Path, steps: int, seed: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    samples = corpus.make_corpus({"train": 4000, "tune": 0, "heldout": 0})["train"]
    random.Random(seed).shuffle(samples)
    tokenizer = make_tokenizer(kind, [sample["text"] for sample in samples[:12000]])
    rows = rows_by_domain(tokenizer, samples)
    print("training tokens:", {domain: r.numel() for domain, r in rows.items()}, flush=True)

    model = make_model(kind, tokenizer)
    print(f"parameters: {model.num_parameters():,}", flush=True)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
    )

    def learning_rate(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / WARMUP
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    order = {domain: iter(()) for domain in rows}
    began = time.time()
    for step in range(steps):
        batch = []
        for domain, table in rows.items():
            index = next(order[domain], None)
            if index is None:
                order[domain] = iter(torch.randperm(len(table)).tolist())
                index = next(order[domain])
            batch.append(table[index])
        input_ids = torch.stack(batch)
        result = model(input_ids=input_ids, labels=input_ids, output_router_logits=True, use_cache=False)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(
                    result.logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
                ).view(len(batch), -1)
            shown = " ".join(
                f"{domain} {loss:.2f}" for domain, loss in zip(rows, losses.mean(1).tolist(), strict=True)
            )
            print(f"step {step:5d}  {time.time() - began:6.0f} s  aux {result.aux_loss:.3f}  {shown}", flush=True)

    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    summary = {
        "steps": steps,
        "seed": seed,
        "tokens_per_step": ROW * len(rows),
        "training_tokens": {domain: table.numel() for domain, table in rows.items()},
        "seconds": round(time.time() - began),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (output / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("mixtral", "qwen2_moe"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.kind, arguments.output, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
