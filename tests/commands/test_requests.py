# SPDX-License-Identifier: Apache-2.0
"""Wrong requests end with 2 and one line, before a model or torch is looked at, and write nothing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from oracles import call
from wrong_requests import TABLES

from optimum_moe_prune import PruningPlan


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the requests name."""
    for folder in ("mixtral", "full", "empty", "above/model", "ggufs", "stats", "saved", "cut", "compared/plans"):
        (tmp_path / folder).mkdir(parents=True)
    files = {
        "mixtral/config.json": '{"model_type": "mixtral"}',
        "above/model/config.json": "{}",
        "ggufs/w.gguf": "",
        "full/mine.txt": "keep",
        "texts.jsonl": '{"text": "w1 w2"}\n',
        "w.safetensors": "",
        "w.gguf": "",
        "w.tar.gz": "",
        "recipes.json": "{}",
        "broken.json": "{",
        "broken.yaml": "method: reap\n: : 4\n",
        "twice.yaml": "num_experts: 4\nnum_experts: 5\n",
        "alias.yaml": "protect: &a {0: [1]}\nmethod_options: *a\n",
        "list.yaml": "- 1\n",
        "empty.yaml": "# nothing\n",
        "object.yaml": "!!python/object/apply:os.system ['true']\n",
        "unknown.yaml": "num_expert: 4\n",
        "unknown.json": json.dumps({"sparcity": 0.5}),
        "saved/stats.json": json.dumps({"format_version": 2, "needs": [], "kept_tokens": 0, "samples": []}),
        "saved/layer.safetensors": "",
        "cut/moe_pruning_plan.json": "{}",
        "compared/results.json": json.dumps({"format_version": 1, "models": {}, "settings": {}}),
        "compared/plans/reap_0.25.json": "{}",
        "results.json": json.dumps({"format_version": 1, "models": {}, "settings": {}, "reference": None}),
        "sensitivity.json": json.dumps({"format_version": 1, "methods": {}, "samples": []}),
        "recipe.yaml": "method: reap\n",
        "recipe2.json": json.dumps({"method": "reap", "num_experts": 4}),
        "weights.index.json": json.dumps({"weight_map": {}}),
        "list.json": "[]",
        "nothing.json": "",
        "lines.jsonl": '{"text": "a"}\n{"text": "b"}\n',
        "picture.png": "",
        "real.gguf": "GGUF",
        "a.pdf": "%PDF-1.4",
        "wrong.yaml": "sparsity: '40'\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    plan = PruningPlan("mixtral", 2, "reap", {0: (0, 1)}, {0: 4})
    for name in ("plan.json", "plan2.json"):
        plan.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("table", TABLES)
def test_wrong_requests(here: Path, capsys: pytest.CaptureFixture[str], table: str) -> None:
    before = sorted(here.rglob("*"))
    wrong = []
    for request, message in TABLES[table]:
        code, out, err = call(capsys, *shlex.split(request))
        if (code, out, err.count("\n")) != (2, "", 1) or not err.startswith("error: ") or message not in err:
            wrong.append(f"{request}\n    {code} {out!r} {err!r}\n    {message!r}")
    assert not wrong, "\n".join(wrong)
    assert sorted(here.rglob("*")) == before
