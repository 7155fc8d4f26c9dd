# SPDX-License-Identifier: Apache-2.0
"""Train the small Mixture-of-Experts models of this project from nothing, on one CPU core each or on a GPU.

    python examples/small_models/train.py mixtral     OUTPUT_DIR
    python examples/small_models/train.py qwen2_moe   OUTPUT_DIR
    python examples/small_models/train.py qwen3_moe   OUTPUT_DIR --device cuda --rows 4
    python examples/small_models/train.py deepseek_v3 OUTPUT_DIR --device cuda --rows 4

The text is the split ``train`` of ``corpus.py``, made here or read with ``--text`` from a folder that it wrote: the
text is the same only where the Python is. Every step sees as many rows of 256 tokens (``--rows``) from each of the six
domains as from any other, so that the load is balanced over domains and experts are free to specialise. It is balanced
by the auxiliary loss, for DeepSeek-V3 by the correction bias of its routers. The result is a bfloat16 checkpoint with
its tokenizer, and ``training.json`` with what was run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DeepseekV3ForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

VOCABULARY = 2048
ROW = 256
PEAK_LEARNING_RATE = 2e-3
PEAK_BIAS_RATE = 3e-3
WARMUP = 100

LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
QWEN_TOKENS = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


@dataclass(frozen=True)
class Kind:
    """What a model is: all stay below 12 MB in bfloat16.

    Attributes:
        model: Its class.
        tokens: Special tokens of its tokenizer.
        config: What its configuration has beyond, or in place of, what ``make_model`` gives to all.
        layer_loss: Weight of each layer's own auxiliary loss. The one that transformers adds to the model's loss
            looks at the layers together, and lets layers with unused experts make up for each other.
    """

    model: type[PreTrainedModel]
    tokens: dict[str, str]
    config: dict[str, Any]
    layer_loss: float = 0.0


KINDS = {
    "mixtral": Kind(
        MixtralForCausalLM,
        LLAMA_TOKENS,
        {
            "intermediate_size": 224,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "router_aux_loss_coef": 0.01,
        },
    ),
    "qwen2_moe": Kind(
        Qwen2MoeForCausalLM,
        QWEN_TOKENS,
        {
            "intermediate_size": 384,
            "moe_intermediate_size": 112,
            "shared_expert_intermediate_size": 128,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "mlp_only_layers": [2],
            "router_aux_loss_coef": 0.01,
        },
    ),
    "qwen3_moe": Kind(
        Qwen3MoeForCausalLM,
        QWEN_TOKENS,
        {
            "head_dim": 32,
            "intermediate_size": 384,
            "moe_intermediate_size": 64,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.01,
        },
        layer_loss=0.01,
    ),
    "deepseek_v3": Kind(
        DeepseekV3ForCausalLM,
        LLAMA_TOKENS,
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "intermediate_size": 384,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_routed_experts": 32,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "num_nextn_predict_layers": 0,
        },
    ),
}


def read_text(folder: Path | None) -> tuple[list[dict[str, str]], str]:
    """The training samples and the Python whose library they come from."""
    if folder is None:
        return corpus.make_corpus({"train": 4000})["train"], platform.python_version()
    with (folder / "train.jsonl").open(encoding="utf-8") as lines:
        samples = [json.loads(line) for line in lines]
    return samples, json.loads((folder / "corpus.json").read_text(encoding="utf-8"))["python"]


def make_tokenizer(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of its kind: where there is ``<s>``, a text begins with it."""
    names = KINDS[kind].tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(names.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if "bos_token" in names:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=ROW, **names)


def make_model(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained model."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": ROW,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model_class = KINDS[kind].model
    return model_class(model_class.config_class(**{**shared, **KINDS[kind].config}))


def rows_by_domain(tokenizer: PreTrainedTokenizerFast, samples: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """The samples of each domain, each ended by the end token, in rows of tokens: ``{domain: (rows, ROW)}``."""
    rows = {}
    for domain in corpus.DOMAINS:
        texts = [sample["text"] for sample in samples if sample["domain"] == domain]
        stream = [token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
        count = len(stream) // ROW
        rows[domain] = torch.tensor(stream[: count * ROW]).view(count, ROW)
    return rows


def every_expert(
    experts: torch.nn.Module, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """All experts on all tokens, those not chosen with weight 0: more work, but two products and fixed shapes.

    For a GPU, where launching kernels is what takes the time at this size.
    """
    number, _, hidden_size = experts.gate_up_proj.shape
    chosen = weights.new_zeros(len(index), number).scatter(1, index, weights)
    gate, up = (
        torch.nn.functional.linear(hidden_states, experts.gate_up_proj.flatten(0, 1))
        .unflatten(1, (number, -1))
        .chunk(2, dim=-1)
    )
    inner = experts.act_fn(gate) * up * chosen[:, :, None]
    return inner.flatten(1) @ experts.down_proj.transpose(1, 2).reshape(-1, hidden_size)


ALL_EXPERTS_FUNCTIONS.register("every_expert", every_expert)


def watch_loads(model: PreTrainedModel) -> dict[torch.nn.Module, torch.Tensor]:
    """How often each router chose each of its experts in the model's last forward pass, kept up to date by hooks."""
    loads = {}

    def count(router: torch.nn.Module, _: tuple, output: tuple[torch.Tensor, ...]) -> None:
        number = len(router.weight)
        loads[router] = torch.histc(output[2].float(), bins=number, min=0, max=number - 1)

    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            module.register_forward_hook(count)
    return loads


def balance(loads: dict[torch.nn.Module, torch.Tensor], rate: float) -> None:
    """Move the routers' correction bias, where they have one: up for experts below the mean load, else down."""
    for router, load in loads.items():
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias += rate * torch.sign(load.mean() - load)


def fit(model: PreTrainedModel, tables: dict[str, torch.Tensor], *, steps: int, rows: int, layer_loss: float) -> float:
    """Train on ``rows`` rows of each domain's table a step, each table gone through in random order; the seconds."""
    config = model.config
    tables = {domain: table.to(model.device) for domain, table in tables.items()}
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
    )

    def share_of_peak(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / WARMUP
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    loads = watch_loads(model)
    order = {domain: iter(()) for domain in tables}
    began = time.time()
    for step in range(steps):
        batch = []
        for domain, table in tables.items():
            for _ in range(rows):
                index = next(order[domain], None)
                if index is None:
                    order[domain] = iter(torch.randperm(len(table)).tolist())
                    index = next(order[domain])
                batch.append(table[index])
        input_ids = torch.stack(batch)
        result = model(input_ids=input_ids, labels=input_ids, output_router_logits=True, use_cache=False)
        loss = result.loss
        if layer_loss:
            for logits in result.router_logits:
                loss = loss + layer_loss * load_balancing_loss_func(
                    (logits,), config.num_experts, config.num_experts_per_tok
                )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        balance(loads, PEAK_BIAS_RATE * share_of_peak(step))
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(
                    result.logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
                ).view(len(tables), -1)
            busiest = max((load.max() / load.mean()).item() for load in loads.values())
            shown = " ".join(
                f"{domain} {loss:.2f}" for domain, loss in zip(tables, losses.mean(1).tolist(), strict=True)
            )
            print(f"step {step:5d}  {time.time() - began:6.0f} s  busiest expert {busiest:.2f}  {shown}", flush=True)
    return time.time() - began


def to_bfloat16(model: PreTrainedModel) -> None:
    """The parameters in bfloat16, except those that transformers keeps in float32 when it loads the model so."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(torch.bfloat16)


def train(
    kind: str, output: Path, *, steps: int, rows: int, seed: int, device: torch.device, text: Path | None
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    samples, text_python = read_text(text)
    random.Random(seed).shuffle(samples)
    tokenizer = make_tokenizer(kind, [sample["text"] for sample in samples[:12000]])
    tables = rows_by_domain(tokenizer, samples)
    print("training tokens:", {domain: table.numel() for domain, table in tables.items()}, flush=True)

    model = make_model(kind, tokenizer).to(device)
    print(f"parameters: {model.num_parameters():,}", flush=True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        model.set_experts_implementation("every_expert")
    seconds = fit(model, tables, steps=steps, rows=rows, layer_loss=KINDS[kind].layer_loss)

    to_bfloat16(model)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    summary = {
        "steps": steps,
        "seed": seed,
        "rows_per_domain": rows,
        "tokens_per_step": ROW * rows * len(tables),
        "training_tokens": {domain: table.numel() for domain, table in tables.items()},
        "seconds": round(seconds),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "text_python": text_python,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (output / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=1, help="rows of each domain a step (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cpu", help="default cpu")
    parser.add_argument("--text", type=Path, help="folder that corpus.py wrote (default: make the text here)")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
