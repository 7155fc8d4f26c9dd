# SPDX-License-Identifier: Apache-2.0
"""How commands are read and shown, wherever they are given and wherever their output leads."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from oracles import call

import optimum_moe_prune
from optimum_moe_prune import RequestError
from optimum_moe_prune.architectures.overview import BUILT_MTP, supported
from optimum_moe_prune.commands import COMMANDS, EXAMPLES, MoEPruneCommand, base, shown
from optimum_moe_prune.commands.base import as_flags, flags_by_name
from optimum_moe_prune.commands.libraries import quiet_libraries
from optimum_moe_prune.commands.parsing import CommandsParser, nearest
from optimum_moe_prune.compat import default_config
from optimum_moe_prune.environment import check_packages

BY_NAME = {command.COMMAND.name: command for command in COMMANDS}


def commands_parser(prog: str = "prog") -> CommandsParser:
    parser = CommandsParser(prog=prog)
    subparsers = parser.add_subparsers()
    for command in COMMANDS:
        command(subparsers, command=command.COMMAND)
    return parser


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.COMMAND.name)
def test_help_ends_with_examples_that_can_be_parsed(command: type, capsys: pytest.CaptureFixture[str]) -> None:
    name = command.COMMAND.name
    code, out, err = call(capsys, name, "--help")
    assert (code, err) == (0, "") and "%(" not in out
    assert ("a GGUF file or an MLX folder, or an adapter of it" in " ".join(out.split())) == (name == "apply")
    shown = out.rsplit("\nexample", 1)[1].splitlines()[1:]
    assert 1 <= len(shown) == len(command.examples) <= 3
    program = "python -m optimum_moe_prune "
    for line in shown:
        words = shlex.split(line.strip().removeprefix(program))
        assert line.startswith(f"  {program}{name} ") and commands_parser().parse_args(words).func
    assert out.index("usage: ") == 0 and len(out.split("\n\n")[0]) < 200, "the usage is short"
    assert "options:" not in out or out.index("options:") < out.index("general:")


def test_help_says_what_to_begin_with(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0 and all(f"optimum_moe_prune {example}\n" in out for example in EXAMPLES)
    for example in EXAMPLES[:-1]:
        commands_parser().parse_args(shlex.split(example))


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--version",), ("run", "--version"), ("plan", "--num-experts", "4", "--version", "--zzz")):
        code, out, err = call(capsys, *words)
        assert (code, err) == (0, "") and out.startswith("optimum-moe-prune")
    out = call(capsys, "--version")[1]
    assert f"torch {importlib.metadata.version('torch')}" in out and out.count("\n") == 1


def test_what_may_stand_before_a_command() -> None:
    parser = commands_parser()
    for words in ("--debug --json list models", "list models --json --debug", "--json list --debug models"):
        args = parser.parse_args(words.split())
        assert args.debug and args.json and args.what == "models"


@pytest.mark.parametrize(
    "words",
    [
        "run out --model m --calibration t --sparsity 40%",
        "run --model=m --calibration=t --sparsity=40% out",
        "run --model m --calibration t --sparsity .4 -- out",
        "run --sparsity 0.4 --sparsity 0.4 --model m --calibration t out",
        "run --sparsity '40 %' --model m --calibration t --calibration u --no-stream out",
    ],
)
def test_ways_of_writing_that_are_fine(words: str) -> None:
    args = commands_parser().parse_args(shlex.split(words))
    assert (args.output, args.model, args.sparsity) == ("out", "m", 0.4)


def test_values_that_begin_with_a_dash_or_are_sentences() -> None:
    args = commands_parser().parse_args(
        ["evaluate", "--model", "m", "--tasks=-x", "--system-instruction", "Be brief - please.", "--num-fewshot", "-1"]
    )
    assert args.tasks == ["-x"] and args.system_instruction == "Be brief - please." and args.num_fewshot == -1


def test_other_names_of_precisions() -> None:
    parser = commands_parser()
    for name, meant in {"bf16": "bfloat16", "torch.float16": "float16", "Half": "float16", "fp32": "float32"}.items():
        assert parser.parse_args(["score", "--model", "m", "--dtype", name, "s"]).dtype == meant


def test_what_was_probably_meant() -> None:
    known = ["--num-experts", "--num-samples", "--sparsity", "--seed"]
    assert nearest("--sparcity", known) == ["--sparsity"] and nearest("NUM_EXPERTS", known) == ["--num-experts"]
    assert nearest("--num", known) == ["--num-experts", "--num-samples"] and nearest("--zzz", known) == []


# ------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("skip_layers names layer 9; num_samples is 3", "--skip-layers names layer 9; --num-samples is 3"),
        ("give method_options, or domain_weights.", "give --option, or --domain-weight."),
        ("pass num_experts=4 or sparsity='50%'.", "pass --num-experts 4 or --sparsity 50%."),
        ("hold less (stream=True)", "hold less (--stream)"),
        ("hold all (stream=False).", "hold all (--no-stream)."),
        ("begin anew (restart=True).", "begin anew (--restart)."),
        ("leave them out (mtp='drop').", "leave them out (--mtp drop)."),
        ("seed is -1; it", "--seed is -1; it"),
        ("it is for sample_selection 'kmeans', and", "it is for --sample-selection kmeans, and"),
        ("the device is lost, the seed was planted", "the device is lost, the seed was planted"),
        ("/home/num_samples/max_length.json does not exist", "/home/num_samples/max_length.json does not exist"),
        ("num_samples.json cannot be read", "num_samples.json cannot be read"),
        ("'num_samples' is a name, and \"seed=1\" too", "'num_samples' is a name, and \"seed=1\" too"),
        ("config.json's num_experts is 8, num_experts is 9", "config.json's num_experts is 8, --num-experts is 9"),
        ("my_num_samples and num_samples_of", "my_num_samples and num_samples_of"),
        ("num_samples() is a function", "num_samples() is a function"),
        ("num_generalists is 5", "num_generalists is 5"),
        ("mine.yaml: seed is x; give num_samples", "mine.yaml: seed is x; give num_samples"),
        ("a folder seed=1/x is there", "a folder seed=1/x is there"),
    ],
)
def test_messages_in_the_words_of_a_command(message: str, said: str) -> None:
    assert as_flags(message, BY_NAME["run"]) == said


def test_messages_know_the_flags_of_their_command_alone() -> None:
    message = "num_samples is 3, num_experts is 4"
    assert as_flags(message, BY_NAME["plan"]) == "num_samples is 3, --num-experts is 4"
    assert as_flags(message, BY_NAME["list"]) == message
    assert flags_by_name(BY_NAME["run"])["stream"] == ("--stream", "--no-stream")


def test_errors_are_one_line_that_a_terminal_does_not_obey() -> None:
    assert shown.one_line("a\n  b\r\n\n\x1b[31mred\x00 \u2264 é") == "a b \\x1b[31mred\\x00 ≤ é"


def test_errors_of_others_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def work(args: object) -> None:
        raise OSError("first\nsecond num_samples=3\x1b")

    monkeypatch.setattr(BY_NAME["list"], "work", staticmethod(work))
    assert call(capsys, "list", "models") == (1, "", "error: OSError: first second num_samples=3\\x1b\n")
    code, out, err = call(capsys, "--debug", "list", "models")
    assert (code, out) == (1, "") and err.startswith("Traceback") and err.endswith("3\\x1b\n")


# ------------------------------------------------------------------------------------------- where it runs


def test_windows_is_told_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    for words in (("run", "--nothing"), ("list", "models"), ()):
        code, out, err = call(capsys, *words)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "runs on Linux and macOS, and this is" in err
    assert call(capsys, "--help")[0] == call(capsys, "--version")[0] == 0
    monkeypatch.delitem(vars(optimum_moe_prune), "MoEPruner", raising=False)
    with pytest.raises(RequestError, match="this is Windows"):
        optimum_moe_prune.MoEPruner  # noqa: B018
    assert optimum_moe_prune.list_methods() and optimum_moe_prune.RequestError


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("transformers>=90", r"transformers [\d.]+ is installed, and optimum-moe-prune needs >=90"),
        ("transformers<5", "pip install 'transformers<5'"),
        ("nothing-of-this-name>=1", "nothing-of-this-name is not installed; install it: pip install 'nothing-of-this"),
    ],
)
def test_packages_that_do_not_fit(
    requirement: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = ["torch>=2", "matplotlib>=99; extra == 'plots'", requirement]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    with pytest.raises(RequestError, match=message):
        check_packages()
    code, out, err = call(capsys, "list", "models")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_the_heads_of_the_table_are_those_that_transformers_builds() -> None:
    names = ("num_mtp_layers", "num_nextn_predict_layers")
    built = set()
    for support in supported():
        try:
            config = default_config(support.model_type)
        except (ValueError, KeyError):
            continue
        built |= {support.model_type} if any(hasattr(config, name) for name in names) else set()
    assert built == BUILT_MTP


LIGHT = """
import contextlib, io, json, sys
from optimum_moe_prune.commands import main
words, found = json.loads(sys.argv[1]), {}
for request in words:
    out, code = io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(request)
        except SystemExit as ended:
            code = ended.code
    loaded = [name for name in ("torch", "transformers", "sklearn", "scipy", "huggingface_hub") if name in sys.modules]
    found[" ".join(request)] = [code or 0, loaded, out.getvalue()]
print(json.dumps(found))
"""


def test_what_needs_no_torch_starts_without(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "texts.jsonl").write_text('{"text": "w1 w2"}\n')
    run = "run --model model --calibration texts.jsonl"
    requests = {
        "--version": 0,
        "run --help": 0,
        "list models": 0,
        "list models --json": 0,
        "list methods": 0,
        "list methods --json": 0,
        "list targets": 0,
        "list targets --json": 0,
        f"{run} --num-experts 4 --sparsity 0.5 out": 2,
        f"{run} --num-experts 4 --method reep out": 2,
        f"{run} --num-experts 0 out": 2,
        f"{run} --num-experts 4 model": 2,
        f"{run} --config none.yaml out": 2,
        "run --model model --num-experts 4 out": 2,
        "run --model ./modle --num-experts 4 out": 2,
        "score --model model stats": 2,
        "score --model model --calibration texts.jsonl --method reep stats": 2,
        "score --model model --calibration none.jsonl stats": 2,
        "plan --stats model --num-experts 4 plan.json": 2,
        "plan --stats model plan.json": 2,
        "apply --model model --plan none.json out": 2,
        "apply --model model --plan model/config.json out": 2,
        "evaluate --model model": 2,
        "sensitivity --model model s.json": 2,
        "report --stats model r.html": 2,
    }
    words = json.dumps([request.split() for request in requests])
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, words], cwd=tmp_path, capture_output=True, text=True, env=_environment()
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {request: value[:2] for request, value in found.items()} == {r: [code, []] for r, code in requests.items()}
    assert len(json.loads(found["list methods --json"][2])["methods"]) == len(optimum_moe_prune.list_methods())


def _environment(**more: str) -> dict[str, str]:
    path = str(Path(optimum_moe_prune.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": path, **more}


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        ("{python} list models | head -1", {}, "model type"),
        ("{python} list methods | true", {}, ""),
        ("{python} --help | true", {}, ""),
        ("{python} list models >&-", {}, ""),
        ("{python} prun 2>&-", {}, ""),
        ("{python} run --model ./m\u00f6del --num-experts 4 out 2>&1", {"PYTHONIOENCODING": "ascii"}, "m\\xf6del"),
        ("{python} list models", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "LANG": "C"}, "mixtral"),
    ],
)
def test_wherever_output_leads(words: str, more: dict[str, str], said: str) -> None:
    command = words.format(python=f"{shlex.quote(sys.executable)} -m optimum_moe_prune")
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=_environment(**more))
    assert b"Traceback" not in done.stderr + done.stdout and b"Exception" not in done.stderr
    assert said.encode() in done.stdout


def test_optimum_cli_has_the_same_parsers(capsys: pytest.CaptureFixture[str]) -> None:
    from optimum.commands.base import RootOptimumCLICommand
    from optimum.commands.optimum_cli import register_optimum_cli_subcommand

    def ended(words: str) -> tuple[int, str, str]:
        root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
        register_optimum_cli_subcommand(MoEPruneCommand, parent_command=root)
        with pytest.raises(SystemExit) as end:
            args = root.parser.parse_args(["moe-prune", *words.split()])
            args.func(args).run()
        return end.value.code or 0, *capsys.readouterr()

    for words in ("", "prun", "run --sparcity 1", "run", "list model", "--modle x run", "run --model m --seed x o"):
        theirs, ours = ended(words), call(capsys, *words.split())
        assert theirs[0] == ours[0] == 2 and theirs[1] == ours[1] == "" and theirs[2].count("\n") == 1
        assert theirs[2] == ours[2].replace("python -m optimum_moe_prune", "optimum-cli moe-prune")
    code, out, _ = ended("--help")
    assert code == 0 and "optimum-cli moe-prune run --model ./mixtral --calib" in out
    assert ended("--debug --json list methods")[0] == 0
    assert ended("run --help")[1].startswith("usage: optimum-cli moe-prune run --model DIR|ID [flags] OUTPUT\n")


# ------------------------------------------------------------------------------------------- what others say


def test_other_libraries_are_quiet_and_this_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    theirs, ours = logging.getLogger("transformers"), logging.getLogger("optimum_moe_prune.models")
    before = theirs.level, ours.parent.handlers[:] if ours.parent else []
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with quiet_libraries(debug=False):
            assert theirs.level == logging.ERROR and os.environ["TRANSFORMERS_VERBOSITY"] == "error"
            warnings.warn("theirs", UserWarning, stacklevel=1)
            ours.warning("the model takes %d GB", 3)
            ours.info("a detail")
    assert stderr.getvalue() == "warning: the model takes 3 GB\n"
    assert (theirs.level, logging.getLogger("optimum_moe_prune").handlers) == before
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    with quiet_libraries(debug=True):
        assert theirs.level == before[0]
        ours.info("a detail")
    assert stderr.getvalue().endswith("info: a detail\n")


def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BY_NAME["list"], "work", staticmethod(work))
    args = commands_parser().parse_args(["list", "models"])
    assert base.execute(BY_NAME["list"], args) == 130
