# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of each architecture, made on the spot, and a tokenizer for them. No network."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models threads only wait for each other; children inherit it

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from optimum_moe_prune import CalibrationSet
from optimum_moe_prune.models import precision

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

VOCABULARY = 96
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough for routers with opinions
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ("mixtral", "qwen2_moe", "qwen2_moe_norm")
"""Mixtral; Qwen2-MoE with a shared expert and a dense layer in between, without and with ``norm_topk_prob``."""


def make_model(kind: str = "mixtral", seed: int = 0, **settings: object) -> PreTrainedModel:
    """A tiny random model in float32, in evaluation mode."""
    torch.manual_seed(seed)
    if kind == "mixtral":
        values = {**SHAPE, "num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2, **settings}
        return MixtralForCausalLM(MixtralConfig(**values)).eval()
    values = {
        **SHAPE,
        "num_hidden_layers": 3,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 20,
        "norm_topk_prob": kind == "qwen2_moe_norm",
        "mlp_only_layers": [1],
        **settings,
    }
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):  # transformers starts this router at zero
                parameter.normal_(0, 0.3)
    return model


def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Words ``w0`` to ``w92``, one token each; begins with ``<s>``."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(VOCABULARY - 3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


def make_texts(count: int = 12, seed: int = 0, length: tuple[int, int] = (4, 24)) -> list[dict[str, str]]:
    """Texts of two domains that share no words."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        domain = ("low", "high")[number % 2]
        first = 0 if domain == "low" else 46
        words = [f"w{first + rng.randrange(46)}" for _ in range(rng.randint(*length))]
        records.append({"text": " ".join(words), "domain": domain})
    return records


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The model, every parameter cloned: memory-mapped ones are aligned differently, and kernels round so."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def load(folder: Path, **kwargs: object) -> PreTrainedModel:
    """A checkpoint through plain transformers, parameters aligned."""
    return aligned(AutoModelForCausalLM.from_pretrained(folder, **kwargs))


def assert_equal_states(a: torch.nn.Module, b: torch.nn.Module) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.fixture(autouse=True)
def multiplied(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have this processor take so many times as long for bfloat16; by default as long as for float32."""

    def takes(times: float) -> None:
        monkeypatch.setattr(precision, "slowness", lambda dtype: times)

    takes(1.0)
    return takes


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> PreTrainedModel:
    return make_model(kind)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def samples(tokenizer: PreTrainedTokenizerFast) -> CalibrationSet:
    return CalibrationSet.build(make_texts(), tokenizer)


@pytest.fixture
def folder(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny bfloat16 checkpoint with its tokenizer."""
    return save_checkpoint(kind, tmp_path / "model", tokenizer)


def save_checkpoint(
    kind: str, path: Path, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.bfloat16
) -> Path:
    make_model(kind).to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
