# SPDX-License-Identifier: Apache-2.0
"""Gradients of a model's own predictions: those that torch gives for the whole model, however they are gathered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.tiny import tiny_model
from conftest import load, make_model, make_texts, save_checkpoint
from heads import LAYERS, checkpoint, heads_of_tiny_models  # noqa: F401  # a fixture
from oracles import assert_identical, block_inputs, calibrated, expert_output, layout_of
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_moe_prune import CalibrationSet, CalibrationStats, Need, RequestError, RunError, calibrate
from optimum_moe_prune.calibration.gradients import Gradients, draw_labels
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.models.blocks import MoEBlock, moe_blocks
from optimum_moe_prune.statistics.needs import LABEL_DRAWS, OF_A_FORWARD_PASS
from optimum_moe_prune.statistics.samples import Sample, keep_tokens, label_quantiles
from optimum_moe_prune.storage.growing import Store

NEEDS = {Need.ROUTING, Need.FISHER}


def gradients_of(model: PreTrainedModel, ids: Tensor, sample: Sample, seed: int) -> Iterator[dict[int, Tensor]]:
    """For each draw the gradients ``(T, H)`` at each layer's experts' output, of the whole model at once."""
    added: dict[int, Tensor] = {}
    handles = []
    for block in moe_blocks(model):

        def add(_module: Any, _inputs: Any, output: Tensor, layer: int = block.layer) -> Tensor:
            added[layer] = torch.zeros_like(output).requires_grad_()
            return output + added[layer]

        handles.append(block.experts.register_forward_hook(add))
    with torch.enable_grad():
        log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].float(), dim=-1)
    for handle in handles:
        handle.remove()
    quantiles = label_quantiles(sample, seed, LABEL_DRAWS)
    for draw in range(LABEL_DRAWS):
        total = torch.zeros(())
        for position, row in enumerate(log_p):
            below = row.detach().double().exp().cumsum(0) <= float(quantiles[position, draw])
            with torch.enable_grad():
                total = total + row[int(below.sum())]
        found = torch.autograd.grad(total, list(added.values()), retain_graph=True)
        yield dict(zip(added, (g.reshape(len(ids), -1) for g in found), strict=True))


def test_products_of_outputs_and_gradients(model: PreTrainedModel, samples: CalibrationSet) -> None:
    """Expert by expert and token by token, by torch through the whole model; and whatever the batches."""
    learning = [parameter.requires_grad for parameter in model.parameters()]
    stats = collect(model, samples, NEEDS, batch_size=5, seed=3)
    assert learning == [parameter.requires_grad for parameter in model.parameters()]
    single = collect(model, samples, NEEDS, batch_size=1, seed=3)
    for number, ids in enumerate(samples.token_ids):
        rows = stats.token_sample == number
        with torch.no_grad():
            inputs = block_inputs(model, ids)
        for draw, gradients in enumerate(gradients_of(model, ids, samples.samples[number], seed=3)):
            for block in moe_blocks(model):
                x, g = inputs[block.layer], gradients[block.layer]
                y = torch.stack([expert_output(block, e, x) for e in range(block.num_experts)])
                expected = torch.einsum("eth,th->te", y, g).detach()
                for found in (stats, single):
                    tensors = found.layers[block.layer].tensors
                    scale = float(expected.abs().mean())
                    torch.testing.assert_close(tensors["fisher"][rows, draw], expected, rtol=1e-4, atol=1e-4 * scale)
                    energy = tensors["gradient_energy"][rows, draw]
                    torch.testing.assert_close(energy, g.square().sum(1), rtol=1e-4, atol=1e-6)
                    assert not tensors["fisher"][rows][-1].any()  # nothing follows the last token


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama4_text", "gpt_oss", "longcat_flash", "gemma4_text"])
def test_what_stands_between_experts_and_hidden_states_is_part_of_it(model_type: str) -> None:
    """Norms, factors, scores on the input, outputs chosen like experts': by torch, the whole model at once."""
    model = tiny_model(model_type).requires_grad_(False)
    samples = CalibrationSet.build([torch.randint(3, 60, (7,), generator=torch.Generator().manual_seed(1))])
    stats = collect(model, samples, NEEDS)
    (ids,), (sample,) = samples.token_ids, samples.samples
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with contextlib.ExitStack() as watching, torch.enable_grad():
        for block in moe_blocks(model):

            def watch(own: Any, x: Tensor, chosen: Tensor, weights: Tensor, block: MoEBlock = block) -> Tensor:
                x = x.reshape(-1, x.shape[-1])
                output = own(x, chosen, weights)
                count = stats.layers[block.layer].tensors["fisher"].shape[2]
                one = torch.ones(len(x), 1, dtype=weights.dtype)
                y = [own(x.detach(), torch.full((len(x), 1), expert), one) for expert in range(count)]
                seen[block.layer] = torch.zeros_like(output).requires_grad_(), torch.stack(y)
                return output + seen[block.layer][0]

            watching.enter_context(block.observed(lambda logits: None, watch))
        log_p = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0, :-1].float(), dim=-1)
        totals = log_p.gather(1, draw_labels(log_p.detach(), label_quantiles(sample, 0, LABEL_DRAWS))).sum(0)
        for draw, total in enumerate(totals):
            found = torch.autograd.grad(total, [added for added, _ in seen.values()], retain_graph=True)
            for (layer, (_, y)), gradient in zip(seen.items(), found, strict=True):
                expected = torch.einsum("eth,th->te", y, gradient).detach()
                tensor, scale = stats.layers[layer].tensors["fisher"][:, draw], float(expected.abs().mean())
                torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-3 * scale)


def test_interrupted_and_continued(
    samples: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    """At every step of the way forward and back, by layer or by batch; nothing that was finished is done again."""
    folder = save_checkpoint("qwen2_moe", tmp_path / "model", tokenizer, torch.float32)
    settings = {"batch_size": 4, "max_tokens": 50}
    expected = calibrated(layout_of(folder), samples, NEEDS, stream=True, **settings)
    commit = Store.commit

    def ends(self: Store, finished: int, whole: Any = ()) -> None:
        commit(self, finished, whole)
        if self._what == "backward pass":
            raise RunError(f"ended after {finished}")

    calls: list[str] = []
    for name in ("at_logits", "back"):
        real = getattr(Gradients, name)
        monkeypatch.setattr(
            Gradients, name, lambda self, *args, name=name, real=real: (calls.append(name), real(self, *args))[1]
        )
    for stream, steps in ((True, 7), (False, 1)):
        work = {"folder": tmp_path / f"work {stream}", "stream": stream, **settings}
        with monkeypatch.context() as patch:
            patch.setattr(Store, "commit", ends)
            for step in range(1, steps + 1):
                with pytest.raises(RunError, match=f"ended after {step if stream else 3}"):
                    calibrated(layout_of(folder), samples, NEEDS, **work)
        count = len(calls)
        assert_identical(calibrated(layout_of(folder), samples, NEEDS, **work), expected)
        assert len(calls) == count
    assert calls[: calls.index("at_logits")] == [] and calls.count("at_logits") == 3 * 2


def test_narrow_weights_are_widened_for_it(
    samples: CalibrationSet, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, multiplied: Any
) -> None:
    """Pieces of experts are widened one after another in the same memory, but not while they are differentiated."""
    from optimum_moe_prune.models import widened

    folder = save_checkpoint("mixtral", tmp_path / "model", tokenizer)
    expected = collect(load(folder, dtype="float32"), samples, NEEDS)
    multiplied(10.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened, "PIECE_BYTES", 20_000)  # two experts or so
        found = [
            calibrated(layout_of(folder), samples, NEEDS, stream=True),
            calibrated(layout_of(folder), samples, NEEDS, stream=False),
            calibrate(load(folder), samples, NEEDS),
        ]
    for stats in found:
        for index, layer in expected.layers.items():
            tensor = layer.tensors["fisher"]
            other = stats.layers[index].tensors["fisher"]
            torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().mean()))


def test_half_precision_loses_no_small_gradients(samples: CalibrationSet) -> None:
    expected = collect(make_model(), samples, NEEDS).layers
    found = collect(make_model().half(), samples, NEEDS).layers
    for index, layer in expected.items():
        a, b = layer.tensors["fisher"].flatten(), found[index].tensors["fisher"].flatten()
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.9


@pytest.mark.usefixtures("heads_of_tiny_models")
def test_heads_have_no_part_in_what_is_predicted(tmp_path: Path, samples: CalibrationSet) -> None:
    folder = checkpoint("deepseek_v3", tmp_path / "model", loads=False)
    stats = calibrated(layout_of(folder), samples, NEEDS, stream=True)
    assert [n for n, layer in stats.layers.items() if not layer.tensors["fisher"].any()] == [LAYERS]
    stats.save(tmp_path / "stats")
    assert_identical(CalibrationStats.load(tmp_path / "stats"), stats)


def test_a_decoder_alone_predicts_nothing(samples: CalibrationSet, tmp_path: Path) -> None:
    make_model().base_model.save_pretrained(tmp_path / "bare")
    for stream in (True, False):
        with pytest.raises(RequestError, match="fisher"):
            calibrated(layout_of(tmp_path / "bare"), samples, NEEDS, stream=stream)


def test_all_is_what_a_forward_pass_gives(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = CalibrationSet.build(make_texts(2), tokenizer)
    model = make_model()
    assert calibrate(model, samples).needs == OF_A_FORWARD_PASS == frozenset(Need) - {Need.FISHER, Need.MEAN_OUTPUTS}
    assert calibrate(model, samples, ["all", Need.FISHER]).needs == frozenset(Need) - {Need.MEAN_OUTPUTS}
    assert calibrate(model, samples, "fisher").needs == NEEDS


def test_labels_follow_the_distribution_and_nothing_else() -> None:
    """From the seed, the sample and the position alone; and as often as the model says."""
    sample, longer = Sample("ab" * 32, "a", 4001), Sample("ab" * 32, "b", 5001)
    quantiles = label_quantiles(sample, 5, 2)
    assert quantiles.shape == (4000, 2) and torch.equal(label_quantiles(longer, 5, 2)[:4000], quantiles)
    assert not torch.equal(label_quantiles(sample, 6, 2), quantiles)
    p = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    labels = draw_labels(p.log().expand(4000, 5), quantiles)
    for draw in range(2):
        share = torch.bincount(labels[:, draw], minlength=5) / 4000
        torch.testing.assert_close(share, p, atol=0.03, rtol=0)
    assert bool((draw_labels(torch.zeros(1, 1), torch.ones(1, 1)) == 0).all())
    kept = keep_tokens((Sample("ab" * 32, "a", 4000),), 2000, 5)[1]
    assert abs(float(quantiles[kept, 0].mean()) - 0.5) < 0.03  # which tokens are kept says nothing of their labels
