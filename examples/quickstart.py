# SPDX-License-Identifier: Apache-2.0
"""Prune a small trained model with Mosaic and with Pathfinder, save, reload, and compare the methods by domain.

    python examples/quickstart.py [--model examples/small_models/qwen2_moe] [--draws 3] [--output FOLDER]
    python examples/quickstart.py --draws 3 --sensitivity mosaic --write examples/small_models/RESULTS.md

Needs no network: the model is one of this repository's, and the text is made on the spot by
``small_models/corpus.py``, for calibration from the split the model was trained on, for judging from the held-out one.
Of each pruned model it shows what it writes beside what the original writes, and what it lost by domain. The table
at the end shows, for each domain, by how many nats per token the loss rises, and how many experts each layer retains
(of the first draw). Rows marked "global" spread the same number of experts unequally over the layers. One row is
calibrated on a single general domain, all others on a mixture. For the methods of --sensitivity there are rows of
plans that spread the same number by divergences measured on 24 of the calibration samples. --write puts the tables
into a Markdown file. Numbers are calculated in bfloat16, in which the model is stored, or in float32 on a processor
that has no units for bfloat16 and would take 12 to 44 times as long for it; what is written stays bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    Compute,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    Sensitivity,
    calibrate,
    evaluate,
    list_methods,
    measure_sensitivity,
)
from optimum_moe_prune import compare as compare_models
from optimum_moe_prune.evaluation.choosing import choose_experts
from optimum_moe_prune.evaluation.tables import filled
from optimum_moe_prune.evaluation.verdict import EXPLAINED
from optimum_moe_prune.methods import get_method
from optimum_moe_prune.models.devices import one_device
from optimum_moe_prune.names import device_name, dtype_name
from optimum_moe_prune.planning.build import build_plan

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
import corpus  # noqa: E402
from blocks import markdown, write_block  # noqa: E402

GENERAL = "docs"
CALIBRATION_SAMPLES = 120  # of a draw: 20 of each domain, or all of the general one
HELDOUT_SAMPLES = 24  # of each domain
MEASURED_SAMPLES = 24  # of the calibration samples, with --sensitivity
CONTEXT = 256  # the length the small models were trained on
JUDGED_SAMPLES = 8  # of each domain, for what each of the two pruned models lost
PROMPTS = ("SELECT name, city\nFROM", "Compute 37 * 20 + 86.\n")
NEW_TOKENS = 24
RELOAD = """
import json, sys
{first}
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert ("optimum_moe_prune" in sys.modules) == bool("{first}")
experts = [len(layer.mlp.experts.down_proj) for layer in model.model.layers if hasattr(layer.mlp, "experts")]
print(f"{{type(model).__name__}}, experts in its MoE layers: {{experts}}, {{model.num_parameters():,}} parameters")
for prompt in json.loads(sys.argv[3]):
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    new = model.generate(**ids, max_new_tokens=int(sys.argv[4]), do_sample=False)[0, ids["input_ids"].shape[1]:]
    print(json.dumps(tokenizer.decode(new, skip_special_tokens=True)))
"""
NEXT = """{kept}Your own model and texts: first which way loses least, then the pruned checkpoint with its results.

  optimum-cli moe-prune compare --model MODEL --calibration mix.jsonl --data heldout.jsonl COMPARED
  optimum-cli moe-prune run --model MODEL --calibration mix.jsonl --method pathfinder --sparsity 25% \\
      --evaluate heldout.jsonl --report OUT

Texts are lines of JSON, {{"text": "...", "domain": "..."}}: of every kind that the model has to stay good at."""


@dataclass
class Row:
    """One method: nats lost by domain and seconds, a list entry for each draw."""

    name: str
    lost: list[dict[str, float]]
    calibration_seconds: list[float]
    plan_seconds: list[float]
    experts: list[int]

    def by_domain(self) -> list[float]:
        return [sum(lost[domain] for lost in self.lost) / len(self.lost) for domain in corpus.DOMAINS]

    @property
    def mean(self) -> float:
        values = self.by_domain()
        return sum(values) / len(values)


def losses(model: PreTrainedModel, heldout: CalibrationSet) -> dict[str, float]:
    """Nats per token by domain."""
    return {domain: result.loss for domain, result in evaluate(model, heldout, batch_size=16).domains.items()}


def texts_by_domain(path: Path) -> dict[str, list[str]]:
    """The texts of a ``.jsonl`` file of the corpus."""
    text: dict[str, list[str]] = {domain: [] for domain in corpus.DOMAINS}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text[record["domain"]].append(record["text"])
    return text


def draw(text: dict[str, list[str]], number: int, domains: tuple[str, ...]) -> list[dict[str, str]]:
    """Calibration texts that no other draw of the same domains uses."""
    each = CALIBRATION_SAMPLES // len(domains)
    return [{"text": t, "domain": d} for d in domains for t in text[d][number * each : (number + 1) * each]]


def calibrated(
    model: PreTrainedModel, texts: list[dict[str, str]], needs: set[Need], tokenizer: object
) -> tuple[CalibrationStats, float]:
    began = time.perf_counter()
    stats = calibrate(model, texts, needs, tokenizer=tokenizer, max_length=CONTEXT)
    return stats, time.perf_counter() - began


def sensitivities(
    model: PreTrainedModel,
    tokenizer: object,
    texts: list[list[dict[str, str]]],
    calibrations: list[tuple[CalibrationStats, float]],
    methods: list[str],
) -> list[Sensitivity]:
    """What was measured of the methods in each draw."""
    found = []
    for number, (draws_texts, (stats, _)) in enumerate(zip(texts, calibrations, strict=True)):
        samples = CalibrationSet.build(draws_texts, tokenizer, max_length=CONTEXT).take(MEASURED_SAMPLES)
        recipes = [MoEPrunerConfig(method=method, seed=number) for method in methods]
        began = time.perf_counter()
        found.append(measure_sensitivity(model, samples, recipes, stats, sparsities=()))
        print(f"  measured draw {number} in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return found


def compare(
    model: PreTrainedModel,
    tokenizer: object,
    text: dict[str, list[str]],
    heldout: CalibrationSet,
    draws: int,
    methods: list[str],
    measured_methods: list[str],
) -> dict[float, list[Row]]:
    """Rows by sparsity."""
    base = losses(model, heldout)
    texts = [draw(text, n, corpus.DOMAINS) for n in range(draws)]
    mixed = [calibrated(model, t, set(Need), tokenizer) for t in texts]
    measured: list[Sensitivity] = []
    if measured_methods:
        measured = sensitivities(model, tokenizer, texts, mixed, measured_methods)
    general = [
        calibrated(model, draw(text, n, (GENERAL,)), {Need.ROUTING, Need.GRAM}, tokenizer) for n in range(draws)
    ]
    entries = [(f"enumeration, {GENERAL} only", "enumeration", "uniform", general)]
    for method in methods:
        for allocation in (*get_method(method).allocations, *(["sensitivity"] if method in measured_methods else [])):
            name = method if allocation == "uniform" else f"{method}, {allocation}"
            entries.append((name, method, allocation, mixed))
    rows: dict[float, list[Row]] = {}
    for sparsity in (0.25, 0.5):
        known: dict[str, dict[str, float]] = {}  # methods often agree
        rows[sparsity] = []
        for name, method, allocation, calibrations in entries:
            row = Row(name, [], [], [], [])
            for number, (stats, seconds) in enumerate(calibrations):
                began = time.perf_counter()
                config = MoEPrunerConfig(method=method, sparsity=sparsity, allocation=allocation, seed=number)
                if get_method(method).measures:
                    samples = CalibrationSet.build(texts[number], tokenizer, max_length=CONTEXT)
                    plan, _ = choose_experts(model, config, stats, samples)
                else:
                    plan = build_plan(stats, config, sensitivity=measured[number] if measured else None)
                row.plan_seconds.append(time.perf_counter() - began)
                row.calibration_seconds.append(0.0 if method == "random" else seconds)
                row.experts = row.experts or list(plan.num_experts.values())
                if str(plan.retained) not in known:
                    known[str(plan.retained)] = losses(plan.apply(copy.deepcopy(model)), heldout)
                after = known[str(plan.retained)]
                row.lost.append({domain: after[domain] - base[domain] for domain in base})
            rows[sparsity].append(row)
            at = f"plan {len(rows) * len(entries) - len(entries) + len(rows[sparsity])} of {2 * len(entries)}"
            print(
                f"  {at}: {name}, {sparsity:.0%} removed: {round(row.mean, 2) + 0.0:.2f} nats lost",
                file=sys.stderr,
                flush=True,
            )
    perplexities = ", ".join(f"{domain} {torch.tensor(base[domain]).exp():.1f}" for domain in corpus.DOMAINS)
    print(f"\nPerplexity of the whole model: {perplexities}")
    return rows


def print_table(rows: dict[float, list[Row]], draws: int) -> None:
    width = max(len(row.name) for table in rows.values() for row in table)
    for sparsity, table in rows.items():
        print(
            f"\n{sparsity:.0%} of the experts removed: nats lost per token, the best first (mean of {draws} draw(s))"
        )
        columns = [*corpus.DOMAINS, "mean", "worst", "plan s"]
        print(f"{'method':<{width}} " + " ".join(f"{c:>8}" for c in columns) + "  experts")
        losses_of = {row.name: [*row.by_domain(), row.mean, max(row.by_domain())] for row in table}
        least = [f"{round(min(column), 2) + 0.0:8.2f}" for column in zip(*losses_of.values(), strict=True)]
        for row in sorted(table, key=lambda r: r.mean):
            cells = [f"{round(cell, 2) + 0.0:8.2f}" for cell in losses_of[row.name]]
            if sys.stdout.isatty():
                cells = [f"\x1b[1m{c}\x1b[0m" if c == best else c for c, best in zip(cells, least, strict=True)]
            numbers = row.experts if len(set(row.experts)) > 1 else [row.experts[0], "in each layer"]
            cells.append(f"{sum(row.plan_seconds) / draws:8.2f}")
            print(f"{row.name:<{width}} " + " ".join(cells) + "  " + " ".join(map(str, numbers)))
    every = {row.name: sum(row.calibration_seconds) / draws for row in next(iter(rows.values()))}
    general = every.pop(f"enumeration, {GENERAL} only")
    print(
        f"\nCalibration: {max(every.values()):.1f} s for all methods at once on the mixture; {general:.1f} s on "
        f"{GENERAL}."
    )


def tables(rows: dict[float, list[Row]], draws: int) -> str:
    """The tables in Markdown, with the command that made them."""
    parts = []
    for sparsity, table in rows.items():
        lines = []
        for row in sorted(table, key=lambda r: r.mean):
            values = row.by_domain()
            counts = " ".join(map(str, row.experts)) if len(set(row.experts)) > 1 else f"{row.experts[0]} each"
            numbers = [row.mean, max(values), *values]
            name, _, note = row.name.partition(", ")
            shown = f"`{name}`" + (f", {note}" if note else "")
            lines.append([shown, *(f"{round(number, 2) + 0.0:.2f}" for number in numbers), counts])
        parts.append(f"{sparsity:.0%} of the experts removed, mean of {draws} draws:")
        parts.append(markdown(["method", "mean", "worst", *corpus.DOMAINS, "experts of each layer"], lines))
    command = " ".join(argument for argument in sys.argv[1:] if not argument.startswith(tempfile.gettempdir()))
    parts.append(f"    python examples/quickstart.py {command}")
    return "\n\n".join(parts)


def continuations(model: PreTrainedModel, tokenizer: object) -> list[str]:
    """What a model writes after each prompt, greedily."""
    written = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        new = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
        written.append(tokenizer.decode(new, skip_special_tokens=True))
    return written


def reload(folder: Path, first: str, dtype: str) -> list[str]:
    """Open a checkpoint in a new process, print what it is, and give what it writes after each prompt."""
    command = [sys.executable, "-c", RELOAD.format(first=first), str(folder), dtype]
    done = subprocess.run(
        [*command, json.dumps(PROMPTS), str(NEW_TOKENS)], check=True, stdout=subprocess.PIPE, text=True
    )
    shown, *written = done.stdout.splitlines()
    print(shown)
    return [json.loads(line) for line in written]


def print_beside(written: dict[str, list[str]]) -> None:
    """What each model writes after the same prompts."""
    width = max(map(len, written))
    for number, prompt in enumerate(PROMPTS):
        print(f"\n  {'prompt':<{width}}  {prompt!r}")
        for name, texts in written.items():
            print(f"  {name:<{width}}  {texts[number]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "small_models" / "mixtral")
    parser.add_argument(
        "--output", type=Path, help="keep the pruned checkpoints in this folder (default: a temporary one)"
    )
    parser.add_argument("--draws", type=int, default=1, help="disjoint calibration draws to average over (default 1)")
    every = [name for name in list_methods() if not get_method(name).measures]
    parser.add_argument("--methods", nargs="+", default=every, help="to compare (default all that need no measuring)")
    parser.add_argument(
        "--dtype",
        default="auto",
        type=dtype_name,
        help="precision to calculate in (default auto: what the processor does fast)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        type=device_name,
        help="where to run: cpu, cuda ... (default: the GPU that is there)",
    )
    parser.add_argument(
        "--sensitivity", nargs="+", default=[], help="methods that also spread experts by measured divergences"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE.md", help="put the tables into this file's block of the model"
    )
    arguments = parser.parse_args()
    disable_progress_bar()
    logging.getLogger("optimum_moe_prune").setLevel(logging.ERROR)
    began = time.perf_counter()

    def step(text: str) -> None:
        print(f"\n[{time.perf_counter() - began:4.0f} s] {text}\n", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        counts = {"train": arguments.draws * CALIBRATION_SAMPLES, "tune": 0, "heldout": HELDOUT_SAMPLES}
        paths = corpus.write_corpus(Path(scratch) / "text", counts)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
        model = model.to(one_device(arguments.device))
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        heldout = CalibrationSet.build(paths["heldout"], tokenizer, max_length=CONTEXT)
        judged = heldout.take(JUDGED_SAMPLES * len(corpus.DOMAINS))
        text = texts_by_domain(paths["train"])

        output = arguments.output or Path(scratch) / "pruned"
        sample = draw(text, 0, corpus.DOMAINS)
        print(f"The model: {type(model).__name__}, {model.num_parameters():,} parameters, trained on six domains:")
        print(
            f"{', '.join(corpus.DOMAINS)}. It loses half of its experts, in two ways; each is saved, opened again in a"
        )
        print("new process, and judged on text that neither the model nor the calibration has seen.")
        written = {"original": continuations(model, tokenizer)}
        ways = (
            ("mosaic", "", "half of the experts of every layer"),
            ("pathfinder", "import optimum_moe_prune", "half of all experts, more in one layer than in another"),
        )
        for number, (method, first, kept) in enumerate(ways, 1):
            step(f"{number} of 3: {method} retains {kept} (calibrates on {len(sample)} texts)")
            pruner = MoEPruner.from_pretrained(arguments.model, MoEPrunerConfig(method=method, sparsity=0.5))
            folder = output / method
            samples = CalibrationSet.build(sample, tokenizer, max_length=CONTEXT)
            pruner.prune_checkpoint(
                folder,
                calibration=samples,
                dtype=arguments.dtype,
                device=arguments.device,
                overwrite=arguments.output is None,
            )
            assert pruner.pruning_plan is not None
            print(pruner.pruning_plan.summary())
            how = f"transformers, after {first}" if first else "plain transformers"
            print(f"\nOpened again in a new process with {how}:", flush=True)
            written[method] = reload(folder, first, arguments.dtype)
            print_beside({"original": written["original"], method: written[method]})
            found = compare_models(folder, judged, reference=model, compute=Compute(arguments.dtype, arguments.device))
            print(f"\nWhat it lost, on {len(judged)} held-out texts:\n")
            print(found.models[method].evaluation.summary())
            print(f"\n{filled(EXPLAINED)}\n" if number == 1 else "")
            print(filled(found.verdict()), flush=True)
        step(f"3 of 3: all {len(arguments.methods)} methods, 25% and 50% removed, from one calibration")
        every = heldout if arguments.write or arguments.draws > 1 else judged
        rows = compare(model, tokenizer, text, every, arguments.draws, arguments.methods, arguments.sensitivity)
        print_table(rows, arguments.draws)
        if arguments.write:
            name = arguments.model.resolve().name
            write_block(arguments.write, f"quickstart {name}", tables(rows, arguments.draws))
        step("Done. Next:")
        print(NEXT.format(kept=f"The pruned checkpoints are in {output}.\n" if arguments.output else ""))


if __name__ == "__main__":
    main()
