# SPDX-License-Identifier: Apache-2.0
"""The text the small models live on, the models themselves, and that the examples run."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = EXAMPLES / "small_models"
sys.path[:0] = [str(SMALL), str(EXAMPLES)]
import blocks  # noqa: E402
import corpus  # noqa: E402
from train import watch_loads  # noqa: E402


@pytest.fixture(scope="module")
def made() -> dict[str, list[dict[str, str]]]:
    return corpus.make_corpus({"train": 400, "tune": 60, "heldout": 60})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The small models in float32: a processor without bfloat16 units is 12 to 44 times as slow in their own dtype."""
    places = {name: str(tmp_path_factory.mktemp("small") / name) for name in ("mixtral", "qwen2_moe", "qwen3_moe")}
    for name, place in places.items():
        AutoModelForCausalLM.from_pretrained(SMALL / name, dtype="float32").save_pretrained(place)
        AutoTokenizer.from_pretrained(SMALL / name).save_pretrained(place)
    return places


def paragraphs(samples: list[dict[str, str]]) -> set[str]:
    found = (" ".join(p.split()) for s in samples if s["domain"] in ("code", "docs") for p in s["text"].split("\n\n"))
    return {p for p in found if len(p) >= 80}


def test_nothing_judged_was_trained_on() -> None:
    """Over the whole library: no sample in two splits, and no paragraph of library text either."""
    whole = corpus.make_corpus({"train": 10_000, "tune": 2000, "heldout": 2000})
    texts = {split: {s["text"] for s in samples} for split, samples in whole.items()}
    for a, b in (("train", "tune"), ("train", "heldout"), ("tune", "heldout")):
        assert not texts[a] & texts[b]
        assert not paragraphs(whole[a]) & paragraphs(whole[b])


def test_the_same_text_every_time_in_every_domain(made: dict[str, list[dict[str, str]]]) -> None:
    assert corpus.make_corpus({"train": 400, "tune": 60, "heldout": 60}) == made
    for split, count in (("train", 400), ("tune", 60), ("heldout", 60)):
        numbers = {d: sum(s["domain"] == d for s in made[split]) for d in corpus.DOMAINS}
        assert numbers == dict.fromkeys(corpus.DOMAINS, count)
        assert all(len(s["text"]) >= 100 for s in made[split]) or split == "train"
    longer = corpus.make_corpus({"train": 410, "tune": 0, "heldout": 0})["train"]
    first = [s for d in corpus.DOMAINS for s in [t for t in longer if t["domain"] == d][:400]]
    assert first == made["train"], "fewer samples are a prefix of more"


def test_a_module_is_in_one_split_with_code_and_docs() -> None:
    splits = [corpus.split_of(name) for name, _ in corpus.library_modules()]
    assert 0.7 < splits.count("train") / len(splits) < 0.9
    assert min(splits.count("tune"), splits.count("heldout")) > 10


def test_every_worked_answer_is_right(made: dict[str, list[dict[str, str]]]) -> None:
    checked = 0
    for sample in made["heldout"]:
        for line in sample["text"].splitlines() if sample["domain"] == "math" else ():
            left, equals, right = line.partition(" = ")
            if equals and set(left) <= set("0123456789 +-*") and right.strip(".").isdigit():
                assert eval(left) == int(right.strip("."))
                checked += 1
    assert checked > 50


def test_records_and_files_are_sound(tmp_path: Path) -> None:
    paths = corpus.write_corpus(tmp_path / "text", {"train": 10, "tune": 10, "heldout": 10})
    for path in paths.values():
        assert all(set(json.loads(line)) == {"text", "domain"} for line in path.read_text().splitlines())
    summary = json.loads((tmp_path / "text" / "corpus.json").read_text())
    assert summary["python"] == ".".join(map(str, sys.version_info[:3]))
    assert summary["samples"]["heldout"] == dict.fromkeys(corpus.DOMAINS, 10)


@pytest.mark.parametrize(
    ("name", "experts", "top_k"),
    [("mixtral", 8, 2), ("qwen2_moe", 16, 4), ("qwen3_moe", 32, 4), ("deepseek_v3", 32, 4)],
)
def test_the_small_models_are_what_they_should_be(name: str, experts: int, top_k: int) -> None:
    config = AutoConfig.from_pretrained(SMALL / name)
    number = config.n_routed_experts if name == "deepseek_v3" else config.num_experts
    assert (number, config.num_experts_per_tok) == (experts, top_k)
    assert str(config.dtype) == "torch.bfloat16"
    assert (SMALL / name / "model.safetensors").stat().st_size <= 12_000_000
    tokenizer = AutoTokenizer.from_pretrained(SMALL / name)
    assert tokenizer("1 + 1")["input_ids"][0] == tokenizer.bos_token_id or name.startswith("qwen")
    if name == "qwen2_moe":
        assert config.norm_topk_prob is False and config.mlp_only_layers == [2]
    if name == "deepseek_v3":
        assert (config.n_group, config.topk_group, config.first_k_dense_replace) == (4, 2, 1)
        with safe_open(SMALL / name / "model.safetensors", "pt") as tensors:
            bias = tensors.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert bias.dtype == torch.float32 and not torch.equal(bias, bias.bfloat16().float())


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_every_expert_is_used_and_domains_differ(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(SMALL / name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(SMALL / name)
    last, loads = watch_loads(model), {}
    for sample in corpus.make_corpus({"heldout": 20})["heldout"]:
        tokens = tokenizer(sample["text"], truncation=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        loads[sample["domain"]] = loads.get(sample["domain"], 0) + torch.stack(list(last.values()))
    by_domain = torch.stack([load / load.sum(1, keepdim=True) for load in loads.values()])
    everywhere = by_domain.mean(0)
    assert 0.7 < (everywhere * 32).min() and (everywhere * 32).max() < 1.3
    assert ((by_domain - everywhere).abs().sum(2) / 2).mean() > 0.2


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_the_trained_models_have_specialists(name: str, small: dict[str, str]) -> None:
    """What they are for: experts chosen on one domain alone cost another one far more than those chosen on all."""
    from optimum_moe_prune import CalibrationSet, MoEPrunerConfig, Need
    from optimum_moe_prune.calibration.in_memory import collect
    from optimum_moe_prune.evaluation.losses import evaluate
    from optimum_moe_prune.planning.build import build_plan

    text = corpus.make_corpus({"train": 40, "tune": 0, "heldout": 5})
    tokenizer = AutoTokenizer.from_pretrained(SMALL / name)
    docs = [s for s in text["train"] if s["domain"] == "docs"]
    mixed = [s for d in corpus.DOMAINS for s in [t for t in text["train"] if t["domain"] == d][:7]]
    math = CalibrationSet.build([s for s in text["heldout"] if s["domain"] == "math"], tokenizer, max_length=256)
    loss = {}
    for kind, samples in (("docs", docs), ("mixed", mixed)):
        model = AutoModelForCausalLM.from_pretrained(small[name])
        stats = collect(model, CalibrationSet.build(samples, tokenizer, max_length=256), {Need.ROUTING, Need.GRAM})
        plan = build_plan(
            stats, MoEPrunerConfig(method="enumeration", sparsity=0.5, method_options={"search": "greedy"})
        )
        loss[kind] = evaluate(plan.apply(model), math).domains["math"].loss
    assert loss["docs"] > loss["mixed"] + 0.5


def test_the_quickstart_runs(tmp_path: Path, small: dict[str, str]) -> None:
    """One small run as a user starts it; the numbers are the quickstart's own business."""
    command = [sys.executable, "-c", QUICK, str(EXAMPLES), str(tmp_path / "out"), small["mixtral"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mosaic: 24 of 48 experts retained in 6 layers (50% removed)" in done.stdout
    assert "MixtralForCausalLM, experts in its MoE layers: [4, 4, 4, 4, 4, 4], " in done.stdout
    assert "pathfinder: 24 of 48 experts retained in 6 layers (50% removed)" in done.stdout
    assert done.stdout.count("MixtralForCausalLM, experts in its MoE layers: [") == 2
    rows = [line.split("  ")[0].strip() for line in done.stdout.splitlines()]
    for name in ("mosaic", "enumeration, docs only", "pathfinder", "pathfinder, global", "reap, global"):
        assert rows.count(name) == 2
    for method in ("mosaic", "pathfinder"):
        assert (tmp_path / "out" / method / "moe_pruning_plan.json").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("prune_mixtral.py", ["{mixtral}", "--output", "out"], "4,955,776 -> 3,922,048 parameters"),
        ("substitute.py", ["{mixtral}"], "serve it: vllm serve constant"),
        ("draft.py", ["{mixtral}", "--output", "out"], "the same as alone"),
        ("bits.py", ["{qwen2_moe}"], "layer_config=json.load(open('experts-auto-round.json'))"),
        ("compare_methods.py", ["{qwen2_moe}", "--methods", "reap", "random"], "95% interval"),
        (
            "larger_than_memory.py",
            ["{qwen2_moe}", "--method", "reap", "--output", "out"],
            "reap: 40 of 80 experts retained",
        ),
        ("edit_plan.py", ["{mixtral}", "--output", "out"], "{0: 8, 1: 4, 2: 4, 3: 4, 4: 4, 5: 4}"),
        ("prune_then_quantise.py", ["{qwen2_moe}", "--heldout", "1"], " 82% quantised, 100% of experts"),
        ("gguf_file.py", ["{mixtral}", "--output", "out"], "11.6 MB, 4 experts in each layer"),
        ("own_method.py", [], "loyal: 36 of 48 experts retained"),
        ("add_architecture.py", [], "SigmoidForCausalLM with 8 experts in each layer"),
        ("mlx_folder.py", ["{mixtral}"], "four-bits-pruned"),
        ("serve_vllm.py", ["{qwen3_moe}", "--output", "out"], "24 experts in a layer, since its expert load balancer"),
        ("how_far.py", ["{mixtral}", "--samples", "2", "--output", "page.html"], "page.html"),
    ],
)
def test_the_examples_run(script: str, arguments: list[str], said: str, tmp_path: Path, small: dict[str, str]) -> None:
    needs = {"how_far.py": "matplotlib", "prune_then_quantise.py": "torchao", "mlx_folder.py": "mlx_lm"}
    for name, package in needs.items():
        if script == name:
            pytest.importorskip(package)
    arguments = [argument.format(**small) for argument in arguments]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_an_adapter_follows_the_cut(
    small: dict[str, str],
    made: dict[str, list[dict[str, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, with texts that are there already: it would be ten seconds in one of its own."""
    monkeypatch.setattr(corpus, "make_corpus", lambda counts: {split: made[split][::100] for split in counts})
    monkeypatch.setattr(sys, "argv", ["adapters.py", small["mixtral"], "--steps", "2", "--output", str(tmp_path)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(EXAMPLES / "adapters.py"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["original", "pruned"]
    assert all(float(row[-1]) < float(row[1]) for row in rows)


QUICK = """
import sys
sys.path.insert(0, sys.argv[1])
import quickstart
quickstart.CALIBRATION_SAMPLES, quickstart.HELDOUT_SAMPLES = 12, 1
sys.argv = ["quickstart.py", "--output", sys.argv[2], "--model", sys.argv[3]]
quickstart.main()
"""


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("calibration.py", ["--experts", "4", "--repeats", "1"]),
        ("calibration.py", ["--kind", "qwen2_moe", "--experts", "6", "--dtype", "bfloat16", "--repeats", "1"]),
        ("selection.py", ["--experts", "5", "--retain", "3", "--only", "sets"]),
    ],
)
def test_the_benchmarks_run(script: str, arguments: list[str]) -> None:
    tiny = ["--hidden", "64", "--width", "32", "--layers", "2", "--tokens", "1024"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "benchmarks" / script), *tiny, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rows"] and result["settings"]["layers"] == 2
    assert all(row.get("same sets") in (True, "", None) for row in result["rows"])


def test_the_path_benchmark_runs() -> None:
    tiny = ["--layers", "3", "--experts", "6", "--top-k", "2", "--paths", "9", "--samples", "4"]
    script = EXAMPLES / "benchmarks" / "paths.py"
    done = subprocess.run([sys.executable, str(script), *tiny], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["rows"]) == 3


@pytest.mark.parametrize(
    ("arguments", "measured"),
    [
        (["--only", "surgery", "startup"], 9),
        pytest.param([], 30, marks=pytest.mark.slow),
    ],
)
def test_all_benchmarks_end_in_one_table(arguments: list[str], measured: int, tmp_path: Path) -> None:
    """At sizes where the numbers mean nothing: every bar is compared, met or not."""
    script = EXAMPLES / "benchmarks" / "all.py"
    command = [sys.executable, str(script), "--quick", "--folder", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert len(rows) >= measured, done.stderr
    assert all(isinstance(row["met"], bool) for row in rows if row["bar"] != "")
    assert (done.returncode == 0) == all(row["met"] for row in rows)


def test_no_template_is_left_unfilled(made: dict[str, list[dict[str, str]]]) -> None:
    for samples in made.values():
        assert not [s for s in samples if s["domain"] in corpus.GENERATORS and "rng." in s["text"]]


def test_options_can_be_measured(small: dict[str, str]) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import method_options as m, quickstart\n"
    code += "quickstart.CALIBRATION_SAMPLES, m.TUNE_SAMPLES, m.DRAWS = 12, 1, 1\n"
    code += "sys.argv[1:] = ['--model', sys.argv[2], '--method', 'pathfinder', '--try', 'tau=0.2,0.3']\nm.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES), small["mixtral"]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows[1:]] == [["25%", "0.2"], ["25%", "0.3"], ["50%", "0.2"], ["50%", "0.3"]]


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\n<!-- b -->\n<!-- /b -->\nafter\n", encoding="utf-8")
    blocks.write_block(page, "a", blocks.markdown(["x", "y"], [["1", "2"]]))
    expected = "before\n<!-- a -->\n| x | y |\n| --- | --- |\n| 1 | 2 |\n<!-- /a -->\n<!-- b -->\n<!-- /b -->\nafter\n"
    assert page.read_text(encoding="utf-8") == expected
    with pytest.raises(SystemExit, match=r"page.md has no block <!-- c --> \.\.\. <!-- /c -->"):
        blocks.write_block(page, "c", "new")
    assert page.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    ("page", "names"),
    [
        (SMALL / "RESULTS.md", ["quickstart mixtral", "quickstart qwen2_moe"]),
        (EXAMPLES / "benchmarks" / "README.md", ["all benchmarks"]),
    ],
)
def test_the_pages_have_the_blocks(page: Path, names: list[str], tmp_path: Path) -> None:
    """And there is something in each."""
    copy = tmp_path / "page.md"
    for name in names:
        copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
        blocks.write_block(copy, name, "")
        assert len(copy.read_text(encoding="utf-8")) < len(page.read_text(encoding="utf-8")) - 100
