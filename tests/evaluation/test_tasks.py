# SPDX-License-Identifier: Apache-2.0
"""Benchmark tasks: small local ones, the figures computed a second time with plain torch. No network."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import VOCABULARY, make_model, make_tokenizer
from transformers import PreTrainedModel

from optimum_moe_prune import PruningPlan, RequestError, RunError
from optimum_moe_prune.evaluation import tasks
from optimum_moe_prune.evaluation.tasks import PRESETS, check_tasks, run_tasks
from optimum_moe_prune.models.blocks import moe_blocks

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")

TOKENIZER = make_tokenizer()
STOP = "w3"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products are not worth threads, which wait for one another where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(kind: str = "mixtral", unequal: bool = False) -> PreTrainedModel:
    """A tiny model, or what is left of it with another number of experts in every layer."""
    model = make_model(kind)
    if unequal:
        blocks = moe_blocks(model)
        retained = {b.layer: tuple(range(1 + 2 * n, b.num_experts)) for n, b in enumerate(blocks)}
        counts = {b.layer: b.num_experts for b in blocks}
        PruningPlan(model.config.model_type, blocks[0].routing.top_k, "by hand", retained, counts).apply(model)
        assert len({b.num_experts for b in moe_blocks(model)}) == len(blocks)
    return model


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(VOCABULARY - 3)}" for _ in range(count))


def rows_of_choices(count: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "question": words(rng, rng.randint(3, 9)),
            "choices": [words(rng, rng.randint(1, 3)) for _ in range(4)],
            "label": 0,
        }
        for _ in range(count)
    ]


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """A task file with its data beside it; multiple choice unless the settings say another thing."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def write_answers(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """A task whose answer is the first word that a model generates, at most four tokens and none from ``STOP`` on."""
    return write_task(
        folder,
        name,
        rows,
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [STOP], "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match"}],
        filter_list=[
            {
                "name": "first",
                "filter": [{"function": "regex", "regex_pattern": "(w[0-9]+)"}, {"function": "take_first"}],
            }
        ],
    )


def write_python_task(folder: Path, name: str, flag: str) -> Path:
    """A task whose class says what its file does not."""
    path = write_task(folder, f"{name}_base", rows_of_choices(2))
    config = yaml.safe_load(path.read_text())
    path.unlink()
    code = f"""
from lm_eval.api.task import ConfigurableTask
class Special(ConfigurableTask):
    {flag} = True
    def __init__(self, config=None):
        super().__init__(config={config!r})
        self.{flag} = True
"""
    (folder / f"{name}_code.py").write_text(code)
    path = folder / f"{name}.yaml"
    path.write_text(f"task: {name}\nclass: !function {name}_code.Special\n")
    return path


def ids(text: str) -> list[int]:
    """``<s>`` and the words, without the tokenizer."""
    return [1, *(int(word[1:]) + 3 for word in text.split())]


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> float:
    start, whole = len(ids(context)), torch.tensor(ids(f"{context} {continuation}"))
    log_p = model(whole[None]).logits[0].double().log_softmax(-1)
    return log_p[range(start - 1, len(whole) - 1), whole[start:]].sum().item()


@torch.no_grad()
def first_word(model: PreTrainedModel, question: str) -> str | None:
    """The first word of a greedy answer, one forward pass for each token."""
    tokens, told = ids(question), []
    for _ in range(4):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
        told += [f"w{tokens[-1] - 3}"] if tokens[-1] > 2 else []
    text = " ".join(told)
    text = text[: text.find(STOP)] if STOP in text else text  # it stops inside of words, too: w3 in w31
    return next((word for word in text.split() if len(word) > 1), None)


def labelled(model: PreTrainedModel, rows: list[dict[str, Any]], right: int) -> list[list[float]]:
    """Label the rows so that the model is right about the first ``right``; the log-likelihoods of the choices."""
    likely = [[log_likelihood(model, row["question"], choice) for choice in row["choices"]] for row in rows]
    for number, (row, values) in enumerate(zip(rows, likely, strict=True)):
        best, second = sorted(values, reverse=True)[:2]
        assert best - second > 1e-3  # no ties
        row["label"] = values.index(best if number < right else second)
    return likely


# ------------------------------------------------------------------------------------------- figures


@needs_harness
@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe_norm"])
def test_the_figures_are_those_of_plain_torch(kind: str, unequal: bool, tmp_path: Path) -> None:
    model = make(kind, unequal)
    rows = rows_of_choices()
    likely = labelled(model, rows, right=7)
    by_length = [
        max(range(4), key=lambda c: values[c] / len(row["choices"][c])) == row["label"]
        for row, values in zip(rows, likely, strict=True)
    ]
    told = [first_word(model, row["question"]) for row in rows]
    assert sum(word is not None for word in told) > 6 and len(set(told)) > 2
    for number, (row, word) in enumerate(zip(rows, told, strict=True)):
        row["answer"] = word if number % 2 and word is not None else "another"
    answered = sum(row["answer"] != "another" for row in rows)
    assert 0 < answered < len(rows)
    if unequal:  # the base model gives other answers
        base = make_model(kind)
        assert told != [first_word(base, row["question"]) for row in rows]
    files = [
        write_task(tmp_path, "choosing", rows, metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}]),
        write_answers(tmp_path, "answering", rows),
    ]
    told_of = run_tasks(model, TOKENIZER, [str(path) for path in files], batch_size=4)
    assert list(told_of) == ["choosing", "answering"]
    assert all(type(value) is float for figures in told_of.values() for value in figures.values())

    def error(share: float) -> float:
        return math.sqrt(share * (1 - share) / (len(rows) - 1))

    share = sum(by_length) / len(rows)
    assert told_of["choosing"] == pytest.approx(
        {"acc": 0.7, "acc_stderr": error(0.7), "acc_norm": share, "acc_norm_stderr": error(share)}
    )
    share = answered / len(rows)
    assert told_of["answering"] == pytest.approx(
        {"exact_match[first]": share, "exact_match[first]_stderr": error(share)}
    )
    few = run_tasks(model, TOKENIZER, ["choosing"], include=[tmp_path], limit=7)
    assert few["choosing"]["acc"] == 1.0


@needs_harness
def test_seeds_and_examples_are_the_harness_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(evaluator, "add_env_info", lambda storage: None)  # seconds, to describe the machine
    monkeypatch.setattr(evaluator, "get_git_commit_hash", lambda: None)
    model = make()
    brier = {"metric_list": [{"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}]}
    examples = {"fewshot_split": "test", **brier}
    write_task(tmp_path, "two", rows_of_choices(), num_fewshot=2, **examples)
    write_task(tmp_path, "open", rows_of_choices(), **examples)
    write_task(tmp_path, "never", rows_of_choices(), num_fewshot=0, **examples)
    names = ["two", "open", "never"]

    def by_hand(num_fewshot: int | None) -> dict[str, float]:
        results = evaluator.simple_evaluate(
            HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=8),
            tasks=names,
            task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
            num_fewshot=num_fewshot,
            log_samples=False,
        )
        return {name: results["results"][name]["brier_score,none"] for name in names}

    def here(**how: Any) -> dict[str, float]:
        told = run_tasks(model, TOKENIZER, names, include=[tmp_path], **how)
        assert all(list(figures) == ["brier_score"] for figures in told.values())  # its error is not known
        return {name: figures["brier_score"] for name, figures in told.items()}

    own, three = here(), here(num_fewshot=3)
    assert own == pytest.approx(by_hand(None)) and three == pytest.approx(by_hand(3))
    assert own["open"] == pytest.approx(own["never"]) == pytest.approx(three["never"])
    assert len({own["two"], own["open"], three["two"]}) == 3
    assert here(seed=1)["two"] != pytest.approx(own["two"])


@needs_harness
def test_what_is_sampled_is_seeded(tmp_path: Path) -> None:
    model, seen = make(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    path = write_answers(tmp_path, "sampled", [{"question": "w1 w2 w5", "answer": "w9"}] * 3)
    config = yaml.safe_load(path.read_text())
    config["generation_kwargs"] |= {"do_sample": True, "temperature": 1.0}
    path.write_text(yaml.safe_dump(config))

    def sampled(seed: int, before: int) -> list[list[int]]:
        seen.clear()
        torch.manual_seed(before)
        run_tasks(model, TOKENIZER, [str(path)], seed=seed)
        return [tokens.flatten().tolist() for tokens in seen[1:]]  # the first is the question

    first = sampled(0, before=1)
    assert len(first) > 1 and first == sampled(0, before=2) != sampled(1, before=1)


CHAT = (
    "{% for m in messages %}{{ {'system': 'w80', 'user': 'w81', 'assistant': 'w82'}[m.role] }} {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}w82 {% endif %}"
)


@needs_harness
def test_chats_and_generation_are_as_asked(tmp_path: Path) -> None:
    model, seen = make(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    rows = [{"question": "w1 w2", "answer": "w9"}, {"question": "w5 w6", "answer": "w7"}]
    path = write_answers(tmp_path, "talk", rows)
    config = yaml.safe_load(path.read_text()) | {"fewshot_split": "test", "num_fewshot": 1}
    path.write_text(yaml.safe_dump(config))
    tokenizer = make_tokenizer(bos=False)
    tokenizer.chat_template = CHAT

    def first_prompt(**how: Any) -> str:
        seen.clear()
        run_tasks(model, tokenizer, [str(path)], limit=1, **how)
        return " ".join(f"w{i - 3}" for i in seen[0][0].tolist())

    assert first_prompt() == "w5 w6 w7 w1 w2"
    assert first_prompt(system_instruction="w70 ") == "w70 w5 w6 w7 w1 w2"
    chat = {"apply_chat_template": True, "system_instruction": "w70"}
    assert first_prompt(**chat) == "w80 w70 w81 w5 w6 w82 w7 w81 w1 w2 w82"
    assert first_prompt(**chat, fewshot_as_multiturn=False) == "w80 w70 w81 w5 w6 w7 w1 w2 w82"
    tokenizer.chat_template = {"default": CHAT, "other": CHAT.replace("w81", "w85")}
    assert first_prompt(apply_chat_template="other") == "w85 w5 w6 w82 w7 w85 w1 w2 w82"
    assert first_prompt(apply_chat_template=True) == "w81 w5 w6 w82 w7 w81 w1 w2 w82"
    assert set(tokenizer.chat_template) == {"default", "other"}
    for gen_kwargs in ("max_gen_toks=1", {"max_gen_toks": 1}):
        first_prompt(gen_kwargs=gen_kwargs)
        assert len(seen) == 1
    with pytest.raises(RequestError, match="no chat template 'third'; it has default, other"):
        first_prompt(apply_chat_template="third")
    with pytest.raises(RequestError, match="gen_kwargs is 'greedy'; it must be of the form"):
        first_prompt(gen_kwargs="greedy")
    with pytest.raises(RequestError, match=r"cannot run these tasks: .*no_such_setting"):
        first_prompt(gen_kwargs="no_such_setting=1")
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match=r"apply_chat_template: .*chat_template is not set"):
        first_prompt(apply_chat_template=True)
    with pytest.raises(RequestError, match="no chat template 'other'; it has none"):
        first_prompt(apply_chat_template="other")


@needs_harness
def test_a_tokenizer_without_special_tokens_is_named_before_the_run(tmp_path: Path) -> None:
    chosen = write_task(tmp_path, "choosing", rows_of_choices(2))
    answers = write_answers(tmp_path, "answering", [{"question": "w1 w2", "answer": "w9"}])
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    assert "acc" in run_tasks(make(), tokenizer, [str(chosen)])["choosing"]
    with pytest.raises(RequestError, match=r"^task 'answering' needs a tokenizer with an eos token, and this one has"):
        run_tasks(make(), tokenizer, [str(answers)])
    tokenizer = make_tokenizer(bos=False)
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(RequestError, match=r"^task 'choosing' needs a tokenizer with a bos or eos token"):
        run_tasks(make(), tokenizer, [str(chosen)])


@needs_harness
def test_errors_of_other_metrics_come_without_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import multiprocessing

    def refuse(*args: Any) -> None:
        raise AssertionError("a pool of processes")

    monkeypatch.setattr(multiprocessing, "Pool", refuse)
    model, rows = make(), rows_of_choices()
    for number, row in enumerate(rows):  # words of about the same likelihood: few draws tell the error
        with torch.no_grad():
            log_p = model(torch.tensor([ids(row["question"])])).logits[0, -1, 3:].log_softmax(-1)
        row["word"] = f"w{int((log_p + 4 + number / 10).abs().argmin())}"
    likely = [log_likelihood(model, row["question"], row["word"]) for row in rows]
    path = write_task(
        tmp_path,
        "last",
        rows,
        output_type="loglikelihood",
        doc_to_choice=None,
        doc_to_target=" {{word}}",
        metric_list=[{"metric": "perplexity"}],
    )
    figures = run_tasks(model, TOKENIZER, [str(path)])["last"]
    assert figures["perplexity"] == pytest.approx(math.exp(-sum(likely) / len(likely)), rel=1e-4)
    draws = np.random.default_rng(0).choice(likely, (4000, len(likely)))
    assert figures["perplexity_stderr"] == pytest.approx(np.exp(-draws.mean(1)).std(), rel=0.15)
    assert capfd.readouterr() == ("", "")  # no bars where there is no terminal


@needs_harness
def test_groups_and_tags(tmp_path: Path) -> None:
    model = make()
    short, long = rows_of_choices(4, seed=1), rows_of_choices(6, seed=2)
    labelled(model, short, right=1)
    labelled(model, long, right=6)
    write_task(tmp_path, "short", short, tag="both")
    write_task(tmp_path, "long", long, tag="both")
    group = {"group": "weighted", "task": ["short", "long"]}
    aggregate = [{"metric": "acc", "weight_by_size": True}]
    (tmp_path / "weighted.yaml").write_text(yaml.safe_dump({**group, "aggregate_metric_list": aggregate}))
    (tmp_path / "loose.yaml").write_text(yaml.safe_dump({**group, "group": "loose"}))
    told = run_tasks(model, TOKENIZER, ["weighted"], include=[tmp_path])
    assert list(told) == ["weighted"] and told["weighted"]["acc"] == pytest.approx(0.7)
    assert told["weighted"]["acc_stderr"] > 0
    for name in (str(tmp_path / "loose.yaml"), "both"):
        told = run_tasks(model, TOKENIZER, [name], include=[tmp_path])
        assert {task: figures["acc"] for task, figures in told.items()} == {"short": 0.25, "long": 1.0}
    with pytest.raises(RequestError, match="Duplicate task 'long': found in both 'weighted' and 'long'"):
        run_tasks(model, TOKENIZER, ["weighted", "long"], include=[tmp_path])


def test_figures_are_clean_and_finite(caplog: pytest.LogCaptureFixture) -> None:
    metrics = {
        "name": "t",
        "alias": "t",
        "sample_len": 4,
        "acc,none": np.float64(0.5),
        "acc_stderr,none": "N/A",
        "exact_match,strict-match": 1,
        "exact_match_stderr,strict-match": 0.25,
        "perplexity,none": math.inf,
        "f1,none": math.nan,
    }
    figures = tasks._figures("t", metrics)
    assert figures == {"acc": 0.5, "exact_match[strict-match]": 1.0, "exact_match[strict-match]_stderr": 0.25}
    assert all(type(value) is float for value in figures.values())
    assert [record.getMessage() for record in caplog.records] == [
        "perplexity of task 't' is inf and is left out.",
        "f1 of task 't' is nan and is left out.",
    ]


# ------------------------------------------------------------------------------------------- names


@needs_harness
def test_names_are_the_harness_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for preset, names in PRESETS.items():
        assert check_tasks([preset], allow_code=True) == list(names)
    assert check_tasks(["arc_easy", "papers"], allow_code=True).count("arc_easy") == 1
    with pytest.raises(RequestError, match=r"has no task 'arc_chalenge' \(nearest: arc_challenge, .*\)\."):
        check_tasks(["boolq", "arc_chalenge"])
    with pytest.raises(RequestError, match=r"no task 'paper' \(nearest: papers.*\), 'local' "):
        check_tasks(["paper", "local"])
    assert not caplog.records
    path = write_task(tmp_path, "local", rows_of_choices())
    write_task(tmp_path, "boolq", rows_of_choices())
    assert check_tasks([str(path), "local", "arc_easy"]) == ["local", "arc_easy"]
    assert not caplog.records
    streams: list[Any] = []
    handler = logging.Handler()
    handler.emit = lambda record: streams.append(sys.stderr)  # type: ignore[method-assign]
    tasks.logger.addHandler(handler)
    try:
        assert check_tasks(["boolq", "arc_easy"], include=[tmp_path]) == ["boolq", "arc_easy"]
    finally:
        tasks.logger.removeHandler(handler)
    assert streams == [sys.stderr]  # not where the harness's words go
    assert [record.getMessage() for record in caplog.records] == [
        f"task 'boolq' is the one in {tmp_path / 'boolq.yaml'}, not the harness's own."
    ]


@needs_harness
def test_wrong_requests(tmp_path: Path) -> None:
    def refuse(module: Any, inputs: Any) -> None:
        raise AssertionError("the model ran")

    model = make()
    model.register_forward_pre_hook(refuse)
    path = str(write_task(tmp_path, "local", rows_of_choices()))
    no_task, damaged, circle = tmp_path / "none.yaml", tmp_path / "damaged.yaml", tmp_path / "circle.yaml"
    no_task.write_text("dataset_path: json\n")
    damaged.write_text("group: damaged\ntask: [[1]]\n")
    circle.write_text("group: circle\ntask: [circle]\n")
    (tmp_path / "empty.yaml").write_text("group: empty\ntask: []\n")
    (tmp_path / "broken.yaml").write_text("task: broken\noutput_type: guess\nno_such_setting: 1\n")
    for specs, how, message in (
        ([], {}, "no task is named"),
        ([str(tmp_path / "absent.yaml")], {}, r"absent\.yaml does not exist"),
        ([str(no_task)], {}, r"none\.yaml defines no task"),
        ([str(damaged)], {}, "definition of task 'damaged' is damaged"),
        ([str(circle)], {}, "group 'circle' of tasks holds itself"),
        ([path], {"include": [tmp_path / "local.yaml"]}, "is not a folder"),
        ([path], {"limit": 0}, "limit is 0; it must be at least 1"),
        ([path], {"batch_size": 0}, "batch_size is 0"),
        ([path], {"num_fewshot": -1}, "num_fewshot is -1"),
        ([str(tmp_path / "broken.yaml")], {}, "task 'broken' cannot be used: .*no_such_setting"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            run_tasks(model, TOKENIZER, specs, **how)
        assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="a tokenizer is needed"):
        run_tasks(model, None, [path])
    with pytest.raises(RequestError, match="names 'no_such_task', and there is no such task"):
        (tmp_path / "open.yaml").write_text("group: open\ntask: [local, no_such_task]\n")
        check_tasks([str(tmp_path / "open.yaml")])
    with pytest.raises(RequestError, match="group 'empty' of tasks holds none"):
        run_tasks(model, TOKENIZER, [str(tmp_path / "empty.yaml")])
    with pytest.raises(RequestError, match=r"cannot run these tasks: .*'picture'.* require multimodal input"):
        run_tasks(make(), TOKENIZER, [str(write_python_task(tmp_path, "picture", "MULTIMODAL"))])


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    spec = importlib.util.spec_from_file_location("optimum_moe_prune.evaluation.another", tasks.__file__)
    assert spec is not None and spec.loader is not None
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)  # importing the module needs nothing
    hint = r'not installed \(.*lm_eval.*\): pip install "optimum-moe-prune\[eval\]"$'
    for refused in (lambda: another.check_tasks(["boolq"]), lambda: another.run_tasks(make(), TOKENIZER, ["boolq"])):
        with pytest.raises(RequestError, match=hint):
            refused()


@needs_harness
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            ConnectionError("no route\nto the Hub"),
            RunError,
            "the data of task 'local' cannot be read: no route to the Hub",
        ),
        (FileNotFoundError(), RunError, "the data of task 'local' cannot be read: FileNotFoundError"),
        (ModuleNotFoundError("install maths"), RequestError, "'local' needs a package that is missing: install maths"),
        (ValueError("x" * 1000), RequestError, "task 'local' cannot be used: xxx"),
    ],
)
def test_data_out_of_reach(
    error: Exception, raised: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    path = write_task(tmp_path, "local", rows_of_choices())
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(raised, match=message) as caught:
        run_tasks(make(), TOKENIZER, [str(path)])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@needs_harness
def test_programs_run_only_where_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("humaneval", "mbpp"):
        with pytest.raises(RequestError, match=f"^{name}: these tasks run programs"):
            check_tasks([name])
    with pytest.raises(RequestError, match=r"^humaneval, mbpp: "):
        check_tasks(["papers"])
    function = (
        "def score(doc, results):\n    import os\n    return {'seen': os.environ.get('HF_ALLOW_CODE_EVAL') == '1'}\n"
    )
    (tmp_path / "scoring.py").write_text(function)
    path = write_answers(tmp_path, "program", [{"question": "w1 w2", "answer": "w3"}] * 3)
    config = yaml.safe_load(path.read_text()) | {"unsafe_code": True}
    config["metric_list"] = [{"metric": "seen", "aggregation": "mean", "higher_is_better": True}]
    path.write_text(yaml.safe_dump(config) + "process_results: !function scoring.score\n")
    (tmp_path / "child.yaml").write_text("include: program.yaml\ntask: child\n")
    (tmp_path / "group.yaml").write_text("group: group\ntask: [{task: program, num_fewshot: 0}]\n")
    model = make()
    for spec, told in ((path, "program"), (tmp_path / "child.yaml", "child"), (tmp_path / "group.yaml", "group")):
        with pytest.raises(RequestError, match=f"^{told}: these tasks run programs"):
            run_tasks(model, TOKENIZER, [str(spec)])
    with pytest.raises(RequestError, match=r"cannot run these tasks: .*hidden which is marked as unsafe"):
        run_tasks(model, TOKENIZER, [str(write_python_task(tmp_path / "python", "hidden", "UNSAFE_CODE"))])
    for before in (None, "0"):
        monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
        if before is not None:
            monkeypatch.setenv("HF_ALLOW_CODE_EVAL", before)
        told = run_tasks(model, TOKENIZER, [str(path)], allow_code=True)
        assert told["program"]["seen[first]"] == 1.0
        assert os.environ.get("HF_ALLOW_CODE_EVAL") == before


# ------------------------------------------------------------------------------------------- what must not change


@needs_harness
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(fails: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = rows_of_choices(3)
    path = write_task(tmp_path, "local", rows, num_fewshot=1, fewshot_split="test")
    answers = write_answers(tmp_path, "answers", [{**row, "answer": "w1"} for row in rows])
    model = make().train()
    model.model.layers[1].eval()
    if fails:
        with torch.no_grad():
            model.lm_head.weight[5] = math.nan
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    harness = logging.getLogger("lm_eval")
    harness.setLevel(logging.INFO)

    def state() -> list[Any]:
        return [
            [module.training for module in model.modules()],
            [(name, p.data_ptr(), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
            dict(model._forward_hooks),
            str(model.generation_config),
            (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer), tokenizer.backend_tokenizer.to_str()),
            random.getstate(),
            [array.tolist() if isinstance(array, np.ndarray) else array for array in np.random.get_state()],
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            dict(os.environ),
            harness.level,
            (sys.stdout, sys.stderr),
        ]

    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    try:
        before = state()
        how: Callable[[], Any] = lambda: run_tasks(model, tokenizer, [str(path), str(answers)])  # noqa: E731
        if fails:
            with pytest.raises(RunError, match="the model's output is NaN"):
                how()
        else:
            assert set(how()) == {"local", "answers"}
        assert state() == before
    finally:
        harness.setLevel(logging.NOTSET)
    assert capfd.readouterr() == ("", "")


@needs_harness
def test_a_terminal_shows_progress_and_no_chatter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    path = write_task(tmp_path, "local", rows_of_choices(5))
    model, sizes = make(), []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for batch_size in (1, 4):
        sizes.clear()
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        run_tasks(model, TOKENIZER, [str(path)], batch_size=batch_size)
        monkeypatch.undo()
        assert max(sizes) == batch_size
        assert "Running loglikelihood requests" in terminal.getvalue()
    assert not caplog.records  # the harness would warn of a loaded model, and of settings that are not in the file
