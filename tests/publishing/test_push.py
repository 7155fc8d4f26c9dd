# SPDX-License-Identifier: Apache-2.0
"""Publishing on the Hub: the real client against a small server on the loopback address."""

from __future__ import annotations

import importlib
import shutil
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import load, make_model, make_tokenizer
from hub_server import CUT, Handler, Hub, served
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from optimum_moe_prune import MoEPruner, PruningPlan, RequestError, RunError
from optimum_moe_prune.checkpoints.checkpoint import INDEX_FILE
from optimum_moe_prune.checkpoints.source import Source
from optimum_moe_prune.names import CONFIG_NAME, PLAN_NAME
from optimum_moe_prune.publishing.hub import push_folder

# The client hands files to its HTTP library by an argument that this one has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

REPO = "some/pruned"
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """No connection outlives these tests; no bars: those of failed uploads would be drawn at the end."""
    shown = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    yield
    if shown:
        enable_progress_bars()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in ``base`` and what was made of it: ``equal``, ``fewer`` (weight files) and ``unequal``."""
    place = tmp_path_factory.mktemp("push")
    make_model().save_pretrained(place / "base")
    make_tokenizer().save_pretrained(place / "base")
    for seed, (name, size) in enumerate({"equal": "40KB", "fewer": "80KB"}.items()):
        pruner = MoEPruner.from_pretrained(place / "base", method="random", num_experts=4, seed=seed)
        pruner.prune_checkpoint(place / name, max_shard_size=size)
    retained = {0: (0, 2, 3), 1: (1, 4), 2: (0, 1, 5, 6, 7)}
    plan = PruningPlan("mixtral", 2, "by hand", retained, dict.fromkeys(retained, 8))
    plan.apply_to_checkpoint(place / "base", place / "unequal")
    (place / "equal" / "evaluation").mkdir()
    (place / "equal" / "evaluation" / "results.json").write_text("{}\n")
    (place / "equal" / "report.html").write_text("<p>what was removed</p>\n")
    (place / "equal" / "report_pictures").mkdir()
    (place / "equal" / "report_pictures" / "retained-1.png").write_bytes(b"\x89PNG")
    (place / "equal" / "empty.txt").touch()
    (place / "equal" / ".DS_Store").write_text("of this machine\n")
    assert len(weights(place / "equal")) > len(weights(place / "fewer")) > 2
    return place


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client waited before it tried again; it does not really."""
    waited: list[float] = []
    module = importlib.import_module("huggingface_hub.utils._http")
    monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Hub]:
    with served() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        yield server


def files(folder: Path) -> dict[str, bytes]:
    """The files of a folder that are published."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".")}


def weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def published(hub: Hub, branch: str = "main", repo_id: str = REPO) -> dict[str, bytes]:
    """What is in a repository, but for what the Hub put there itself."""
    found = hub.repositories[repo_id].files(branch)
    return {name: data for name, data in found.items() if name != ".gitattributes"}


def commits(hub: Hub, repo_id: str = REPO) -> int:
    """Commits to the main branch of a repository, but for the first one, which is the Hub's."""
    return len(hub.repositories[repo_id].history()) - 1


def times(hub: Hub, end: str) -> int:
    """Requests whose path ends so."""
    return sum(path.endswith(end) for _, path in hub.requests)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_everything_in_one_commit(hub: Hub, outputs: Path) -> None:
    commit = push_folder(outputs / "equal", REPO, token="hf_writer")
    assert published(hub) == files(outputs / "equal")
    assert {"README.md", PLAN_NAME, CONFIG_NAME, "report.html", "evaluation/results.json"} < published(hub).keys()
    assert "report_pictures/retained-1.png" in published(hub)
    assert hub.repositories[REPO].history() == ["Pruned by random: 12 of 24 experts retained", "initial commit"]
    assert commit.oid == hub.repositories[REPO].branches["main"]
    assert commit.commit_url == f"{hub.address}/{REPO}/commit/{commit.oid}" and commit.pr_url is None
    assert sorted(hub.sent) == sorted(set(hub.sent)) and len(hub.sent) == len(weights(outputs / "equal"))
    assert not hub.repositories[REPO].private

    # It is there already: nothing is sent, no commit is made.
    again = push_folder(outputs / "equal", REPO, token="hf_writer", commit_message="again")
    assert again.oid == commit.oid and commits(hub) == 1 and len(hub.sent) == len(weights(outputs / "equal"))


def test_a_private_repository_and_a_name_without_an_owner(
    hub: Hub, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    push_folder(outputs / "fewer", "pruned", private=True, commit_message="in private")
    assert hub.repositories[REPO].private and hub.repositories[REPO].history()[0] == "in private"
    assert published(hub) == files(outputs / "fewer")
    with pytest.raises(RequestError, match="no model can be read"):
        MoEPruner.from_pretrained(REPO, token=False, cache_dir=tmp_path)
    assert MoEPruner.from_pretrained(REPO, token="hf_writer", cache_dir=tmp_path).pruning_plan is not None

    hub.repositories[REPO].private = False
    with pytest.raises(RequestError, match="exists and is public") as error:
        push_folder(outputs / "equal", REPO, private=True)
    one_line(error)
    assert commits(hub) == 1


def test_large_files_in_parts(hub: Hub, outputs: Path) -> None:
    hub.part_bytes = 10_000
    push_folder(outputs / "equal", REPO, token="hf_writer")
    assert published(hub) == files(outputs / "equal")
    assert all(len(parts) > 1 for parts in hub.parts.values()) and len(hub.parts) == len(hub.sent) > 1


def test_one_commit_however_many_files(
    hub: Hub, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Xet is installed, the client's own way to upload a folder makes a commit of every 250 files."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large_files = False
    folder = tmp_path / "out"
    shutil.copytree(outputs / "unequal", folder)
    (folder / "samples").mkdir()
    for number in range(300):
        (folder / "samples" / f"{number}.txt").write_text(f"{number}\n")
    push_folder(folder, REPO, token="hf_writer")
    assert published(hub) == files(folder) and commits(hub) == 1


@pytest.mark.parametrize("name", ["equal", "unequal"])
def test_published_and_loaded_again(hub: Hub, outputs: Path, tmp_path: Path, name: str) -> None:
    commit = push_folder(outputs / name, REPO, token="hf_writer")
    push_folder(outputs / "fewer", REPO, token="hf_writer")
    assert commits(hub) == 2
    where: dict[str, Any] = {"revision": commit.oid, "cache_dir": tmp_path}

    plan = Source(REPO, **where).stored_plan()
    assert plan == PruningPlan.load(outputs / name) != Source(REPO, cache_dir=tmp_path).stored_plan()
    pruner = MoEPruner.from_pretrained(REPO, **where)
    assert pruner.pruning_plan == plan and (pruner.config is None) == (name == "unequal")
    mine, theirs = load(outputs / name), load(REPO, **where)
    with torch.no_grad():
        assert torch.equal(mine(IDS).logits, theirs(IDS).logits)
    assert hub.downloads().keys() == set(weights(outputs / name))

    # The plan from the Hub, applied to the base model, makes the same checkpoint.
    pruner.prune_checkpoint(tmp_path / "again", source=outputs / "base")
    again = load(tmp_path / "again")  # in one file, where tensors lie otherwise than in several: load() aligns them
    with torch.no_grad():
        assert torch.equal(mine(IDS).logits, again(IDS).logits)


def test_weight_files_of_an_earlier_output_are_deleted(hub: Hub, outputs: Path) -> None:
    push_folder(outputs / "equal", REPO, token="hf_writer")
    hub.repositories[REPO].add(published(hub) | {"model-mtp.safetensors": b"added by hand", "notes.md": b"mine"})
    push_folder(outputs / "fewer", REPO, token="hf_writer")
    assert commits(hub) == 3
    pictures = {"report_pictures/retained-1.png"}
    kept = pictures | {"model-mtp.safetensors", "notes.md", "report.html", "evaluation/results.json", "empty.txt"}
    assert published(hub).keys() == files(outputs / "fewer").keys() | kept
    push_folder(outputs / "unequal", REPO, token="hf_writer")  # one file, no index
    assert weights(outputs / "unequal") == ["model.safetensors"] and INDEX_FILE not in published(hub)
    assert published(hub).keys() == files(outputs / "unequal").keys() | kept
    push_folder(outputs / "fewer", REPO, token="hf_writer")
    assert "model.safetensors" not in published(hub) and INDEX_FILE in published(hub)
    assert commits(hub) == 5


def test_a_branch_and_a_pull_request(hub: Hub, outputs: Path, tmp_path: Path) -> None:
    push_folder(outputs / "equal", REPO, token="hf_writer")
    before = published(hub)
    push_folder(outputs / "fewer", REPO, token="hf_writer", revision="other/half")
    assert published(hub) == before and commits(hub) == 1
    assert weights(outputs / "fewer") == [n for n in sorted(published(hub, "other/half")) if n.endswith("tensors")]
    assert Source(REPO, "other/half", cache_dir=tmp_path).stored_plan() == PruningPlan.load(outputs / "fewer")

    push_folder(outputs / "unequal", REPO, token="hf_writer", revision="other/half")  # what is stale there
    assert [n for n in sorted(published(hub, "other/half")) if n.endswith("tensors")] == ["model.safetensors"]

    commit = push_folder(outputs / "unequal", REPO, token="hf_writer", create_pr=True)
    assert published(hub) == before and commits(hub) == 1
    assert (
        commit.pr_revision == "refs/pr/2"
        and files(outputs / "unequal").items() <= published(hub, commit.pr_revision).items()
    )
    asked = len(hub.requests)
    with pytest.raises(RequestError, match="a pull request goes to the main branch"):
        push_folder(outputs / "unequal", REPO, token="hf_writer", create_pr=True, revision="other/half")
    assert len(hub.requests) == asked
    with pytest.raises(RequestError, match="400: Invalid reference for a branch: refs/pr/7"):
        push_folder(outputs / "unequal", REPO, token="hf_writer", revision="refs/pr/7")


# -- refused


def test_unfinished_folders_are_refused(hub: Hub, outputs: Path, tmp_path: Path) -> None:
    def without(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(outputs / "equal", folder)
        (folder / name).unlink()
        return folder

    shard = weights(outputs / "equal")[1]
    cases = {
        tmp_path / "nothing": "is not a folder",
        outputs / "base": f"not a finished output of this package: it has no {PLAN_NAME}",
        without(PLAN_NAME): f"it has no {PLAN_NAME}",
        without("config.json"): "it has no config.json",
        without(shard): f"{shard} is missing",
        without(INDEX_FILE): f"has no {INDEX_FILE}",
    }
    for name in (shard, "config.json", PLAN_NAME):
        damaged = tmp_path / f"damaged {name}"
        shutil.copytree(outputs / "equal", damaged)
        (damaged / name).write_bytes((damaged / name).read_bytes()[:-9])
        cases[damaged] = f"damaged {name}/{name}"
    for folder, message in cases.items():
        with pytest.raises(RequestError, match=message) as error:
            push_folder(folder, REPO, token="hf_writer")
        one_line(error)
    assert hub.requests == []


@pytest.mark.parametrize(
    "repo_id",
    ["", "a/b/c", "some/model.git", "some/two--dashes", "some/what?", ".hidden", "x" * 97, Path("a/b"), None],
)
def test_names_that_no_repository_can_have(hub: Hub, outputs: Path, repo_id: str) -> None:
    with pytest.raises(RequestError, match="is no name of a repository: ") as error:
        push_folder(outputs / "equal", repo_id, token="hf_writer")
    one_line(error)
    assert hub.requests == []


def test_the_base_model_is_not_overwritten(hub: Hub, outputs: Path, tmp_path: Path) -> None:
    """Neither the model that was pruned nor the one that it was pruned from, in whatever case they are written."""
    first = PruningPlan.load(outputs / "equal")
    first = replace(first, provenance={"model": {"name_or_path": "some/Base"}})
    plan = replace(first, provenance={"model": {"name_or_path": "some/half"}, "parent": first.to_dict()})
    folder = tmp_path / "quarter"
    shutil.copytree(outputs / "equal", folder)
    plan.save(folder)
    for name in ("some/base", "some/Half"):
        with pytest.raises(RequestError, match=f"^{name} is the model that this one was pruned from") as error:
            push_folder(folder, name, token="hf_writer")
        one_line(error)
    assert hub.requests == []
    hub.publish("some/half", outputs / "equal")
    with pytest.raises(RequestError, match=r"^some/half is the model that this one was pruned from"):
        push_folder(folder, "half", token="hf_writer")  # whose it is the Hub tells
    assert hub.repositories["some/half"].history() == ["by hand"]
    push_folder(folder, "some/quarter", token="hf_writer")
    assert published(hub, repo_id="some/quarter") == files(folder)


def test_what_a_person_says_is_the_base_model_is_not_overwritten(hub: Hub, outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs / "fewer", tmp_path / "out")
    plan = PruningPlan.load(tmp_path / "out")
    replace(plan, provenance={**plan.provenance, "card": {"base_model": "some/Base"}}).save(tmp_path / "out")
    with pytest.raises(RequestError, match=r"^some/base is the model that this one was pruned from"):
        push_folder(tmp_path / "out", "some/base", token="hf_writer")
    assert hub.requests == []


def test_a_repository_may_be_called_as_the_folder_of_the_original(hub: Hub, outputs: Path) -> None:
    assert PruningPlan.load(outputs / "fewer").made_for["name_or_path"] == "base"
    push_folder(outputs / "fewer", "base", token="hf_writer")
    assert published(hub, repo_id="some/base") == files(outputs / "fewer")


def test_a_plan_of_an_earlier_version_names_no_folder_once_published(hub: Hub, outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs / "fewer", tmp_path / "out")
    plan = PruningPlan.load(tmp_path / "out")
    model = {**plan.made_for, "name_or_path": "/home/anna/secret/model"}
    replace(plan, provenance={**plan.provenance, "model": model}).save(tmp_path / "out")
    before = files(tmp_path / "out")
    push_folder(tmp_path / "out", REPO, token="hf_writer")
    there = published(hub)
    assert files(tmp_path / "out") == before and b"anna" not in b"".join(there.values())
    assert {**there, PLAN_NAME: b""} == {**before, PLAN_NAME: b""}
    (tmp_path / PLAN_NAME).write_bytes(there[PLAN_NAME])
    assert PruningPlan.load(tmp_path / PLAN_NAME).made_for["name_or_path"] == "model"


def test_what_others_made_is_not_overwritten(hub: Hub, outputs: Path) -> None:
    hub.publish("some/foreign", outputs / "base")
    with pytest.raises(RequestError, match=r"did not make \(model.safetensors, and no moe_pruning_plan") as error:
        push_folder(outputs / "equal", "some/foreign", token="hf_writer")
    one_line(error)
    with pytest.raises(RequestError, match="did not make"):
        push_folder(outputs / "equal", "some/foreign", token="hf_writer", revision="new")
    with pytest.raises(RequestError, match="did not make"):
        push_folder(outputs / "equal", "some/foreign", token="hf_writer", create_pr=True)
    assert hub.repositories["some/foreign"].branches.keys() == {"main"} and commits(hub, "some/foreign") == 0
    assert hub.sent == []

    # A card, and a recipe that MoEPrunerConfig.push_to_hub put there, are no obstacle.
    hub.publish(REPO, outputs / "base")
    hub.repositories[REPO].add({"README.md": b"soon", CONFIG_NAME: b"{}"})
    push_folder(outputs / "equal", REPO, token="hf_writer")
    assert published(hub) == files(outputs / "equal")


def test_a_card_that_the_hub_refuses(hub: Hub, outputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(outputs / "equal", folder)
    (folder / "README.md").write_text("---\ntags: none\n---\n\n# A model\n")
    with pytest.raises(RequestError, match=r'Invalid metadata in README.md.*"tags" must be an array') as error:
        push_folder(folder, REPO, token="hf_writer")
    one_line(error)
    assert hub.sent == [] and commits(hub) == 0


@pytest.mark.parametrize("token", [False, "hf_wrong", True])
def test_no_valid_token(hub: Hub, outputs: Path, token: str | bool) -> None:
    with pytest.raises(RequestError, match="no valid token; log in with `hf auth login`, or pass") as error:
        push_folder(outputs / "equal", REPO, token=token)
    one_line(error)
    assert hub.repositories == {}


@pytest.mark.parametrize("exists", [False, True])
def test_a_token_that_may_not_write(hub: Hub, outputs: Path, exists: bool) -> None:
    if exists:
        push_folder(outputs / "fewer", REPO, token="hf_writer")
    sent = list(hub.sent)
    with pytest.raises(
        RequestError, match=r"may not write there; .*\(403: You don't have the rights to write here\)"
    ) as error:
        push_folder(outputs / "equal", REPO, token="hf_reader")
    assert one_line(error).endswith("Nothing was published.")
    assert hub.sent == sent and (commits(hub) == 1 if exists else hub.repositories == {})


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "no valid token"),
        (402, "the Hub refuses the request"),
        (403, "may not write"),
        (404, "there is no such repository for this token"),
        (409, "changed by somebody else"),
        (413, "the Hub refuses the request"),
    ],
)
def test_refusals_of_the_commit(hub: Hub, outputs: Path, status: int, message: str, waits: list[float]) -> None:
    hub.faults.append(lambda request: status if "/commit/" in request.path else None)
    with pytest.raises(RequestError, match=f"{message}.*{status}.*this was arranged.*Nothing was published") as error:
        push_folder(outputs / "equal", REPO, token="hf_writer")
    one_line(error)
    assert commits(hub) == 0 and waits == []
    hub.faults.clear()
    sent = len(hub.sent)
    push_folder(outputs / "equal", REPO, token="hf_writer")
    assert published(hub) == files(outputs / "equal") and commits(hub) == 1 and len(hub.sent) == sent


def test_changed_by_somebody_else_in_the_meantime(hub: Hub, outputs: Path) -> None:
    """What was looked at is what is replaced: who uploads for hours overwrites nothing that came after."""

    def interfere(request: Handler) -> None:
        if "/commit/" in request.path and commits(hub) == 0:
            hub.repositories[REPO].add({"model.safetensors": b"another model"})

    hub.faults.append(interfere)
    with pytest.raises(RequestError, match=r"changed by somebody else in the meantime.*412: A commit has happened"):
        push_folder(outputs / "equal", REPO, token="hf_writer")
    assert published(hub) == {"model.safetensors": b"another model"}
    with pytest.raises(RequestError, match="did not make"):
        push_folder(outputs / "equal", REPO, token="hf_writer")
    assert published(hub) == {"model.safetensors": b"another model"}


def test_offline(hub: Hub, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=f"{REPO} needs the Hub, and the offline mode is on; unset HF_HUB_OFF") as e:
        push_folder(outputs / "equal", REPO, token="hf_writer")
    one_line(e)
    with pytest.raises(RequestError, match="is not a folder"):  # what can be looked at here is, first
        push_folder(outputs / "nothing", REPO, token="hf_writer")
    assert hub.requests == []


# -- failed


def test_xet_says_what_it_was_answered(hub: Hub, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way large files go tells a refusal in words alone, which are shown."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.faults.append(lambda request: 403 if "/xet-write-token/" in request.path else None)
    with pytest.raises(
        RunError, match=r"403 Forbidden.*the token may lack write access.*Nothing was published"
    ) as error:
        push_folder(outputs / "equal", REPO, token="hf_writer")
    one_line(error)
    assert times(hub, "/xet-write-token/main") == 1 and commits(hub) == 0


@pytest.mark.parametrize(
    ("where", "status", "tries"),
    [
        ("/api/repos/create", 500, 1),
        ("/tree/", 503, 1),  # 6 since 2.0
        ("/api/validate-yaml", 502, 1),
        ("/preupload/", 503, 6),
        ("/objects/batch", 500, 6),
        ("/verify", 429, 6),
        ("/commit/", 500, 1),
        ("/commit/", 503, 1),
    ],
)
def test_a_server_that_fails(hub: Hub, outputs: Path, waits: list[float], where: str, status: int, tries: int) -> None:
    """The client tries most requests again; then it is said what became of it, and the same call continues."""
    hub.faults.append(lambda request: status if where in request.path else None)
    said = "the answer was no JSON" if "yaml" in where else rf"\({status}\)\."
    with pytest.raises(RunError, match=rf"publishing {REPO} failed: .*{said}.*Nothing was published") as error:
        push_folder(outputs / "unequal", REPO, token="hf_writer")
    assert "the same call continues" in one_line(error)
    tried = sum(where in path for _, path in hub.requests)
    assert tried >= tries and len(waits) == tried - 1
    assert REPO not in hub.repositories or commits(hub) == 0
    hub.faults.clear()
    arrived = list(hub.sent)
    push_folder(outputs / "unequal", REPO, token="hf_writer")
    assert published(hub) == files(outputs / "unequal") and commits(hub) == 1
    assert len(hub.sent) == 1 and (arrived == [] or arrived == hub.sent)


def test_a_storage_that_refuses(hub: Hub, outputs: Path, waits: list[float]) -> None:
    """The address to send a file to is good for some time only; that the token may not write it does not mean."""
    hub.storage = f"http://localhost:{hub.server_port}/storage"  # another host than the Hub
    hub.faults.append(lambda request: 403 if request.command == "PUT" else None)
    with pytest.raises(
        RunError, match=r"'model.safetensors' to the Hub; Forbidden by localhost \(403\)\. Nothing"
    ) as error:
        push_folder(outputs / "unequal", REPO, token="hf_writer")
    assert "the same call continues" in one_line(error) and waits == []
    hub.faults.clear()
    push_folder(outputs / "unequal", REPO, token="hf_writer")
    assert published(hub) == files(outputs / "unequal")


@pytest.mark.parametrize("part_bytes", [None, 10_000])
def test_a_connection_that_is_cut(hub: Hub, outputs: Path, waits: list[float], part_bytes: int | None) -> None:
    """What arrived before is not sent again by the second call."""
    hub.part_bytes = part_bytes
    hashes = [sha256((outputs / "equal" / name).read_bytes()).hexdigest() for name in weights(outputs / "equal")]
    arrived = threading.Event()

    def only_one_arrives(request: Handler) -> str | None:
        if request.path == f"/storage/{hashes[0]}/verify":
            arrived.set()
        if request.command != "PUT" or hashes[0] in request.path:
            return None
        assert arrived.wait(20)
        return CUT

    hub.faults.append(only_one_arrives)
    with pytest.raises(RunError, match=r"Error while uploading 'model-\d+-of-\d+.safetensors'.*Nothing was") as error:
        push_folder(outputs / "equal", REPO, token="hf_writer")
    one_line(error)
    assert hub.sent == hashes[:1] and commits(hub) == 0 and len(waits) >= 5  # tried again, all of it in vain
    hub.faults.clear()
    push_folder(outputs / "equal", REPO, token="hf_writer")
    assert hub.sent[:1] == hashes[:1] and sorted(hub.sent) == sorted(hashes)
    assert published(hub) == files(outputs / "equal") and commits(hub) == 1


@pytest.mark.parametrize("made", [False, True])
def test_a_commit_whose_answer_is_lost(hub: Hub, outputs: Path, made: bool) -> None:
    """Whether it was made is asked for, and said; the same call makes it if it was not, and no other if it was."""

    def lose(request: Handler) -> str | None:
        if "/commit/" not in request.path:
            return None
        if made:
            request.answer = lambda *_: None
            request.commit(REPO, "main")
        return CUT

    hub.faults.append(lose)
    message = f"{REPO} has a new commit, [0-9a-f]+; the same call makes no other" if made else "Nothing was published"
    with pytest.raises(RunError, match=message) as error:
        push_folder(outputs / "unequal", REPO, token="hf_writer")
    assert "Nothing was" in one_line(error) or made
    assert commits(hub) == made
    hub.faults.clear()
    commit = push_folder(outputs / "unequal", REPO, token="hf_writer")
    assert commits(hub) == 1 and commit.oid == hub.repositories[REPO].branches["main"] and len(hub.sent) == 1
    assert published(hub) == files(outputs / "unequal")


def test_a_pull_request_whose_answer_is_lost(hub: Hub, outputs: Path) -> None:
    """The branch tells nothing of it."""
    hub.faults.append(lambda request: CUT if "/commit/" in request.path else None)
    with pytest.raises(RunError, match=f"Whether {REPO} has the commit is not known") as error:
        push_folder(outputs / "unequal", REPO, token="hf_writer", create_pr=True)
    assert "Nothing was" not in one_line(error)


def test_a_hub_that_is_gone_at_the_commit(hub: Hub, outputs: Path) -> None:
    """Nothing is claimed that is not known."""
    hub.faults.append(lambda _: CUT if times(hub, "/commit/main") else None)
    with pytest.raises(RunError, match=f"Whether {REPO} has the commit is not known") as error:
        push_folder(outputs / "unequal", REPO, token="hf_writer")
    assert "Nothing was" not in one_line(error)


def test_no_hub_at_all(hub: Hub, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=f"publishing {REPO} failed: .*refused.* Nothing was published") as error:
        push_folder(outputs / "unequal", REPO, token="hf_writer")
    one_line(error)


def test_through_the_pruner_and_the_command_line(
    hub: Hub, outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from optimum_moe_prune.commands import main

    shutil.copytree(outputs / "equal", tmp_path / "out")
    pruner = MoEPruner.from_pretrained(tmp_path / "out")
    with pytest.raises(RequestError, match="there is no checkpoint to publish"):
        pruner.push_to_hub(REPO, token="hf_writer")
    commit = pruner.push_to_hub(REPO, tmp_path / "out", private=True, token="hf_writer")
    assert hub.repositories[REPO].private
    card = published(hub)["README.md"].decode()
    assert f"from_pretrained('{REPO}'" in card and published(hub) == files(tmp_path / "out")
    cache = {"cache_dir": tmp_path / "cache", "token": "hf_writer"}
    plan = PruningPlan.from_pretrained(REPO, revision=commit.oid, **cache)
    assert plan == PruningPlan.load(outputs / "equal")
    assert MoEPruner.from_pretrained(REPO, revision=commit.oid, **cache).pruning_plan == plan
    with pytest.raises(RequestError, match=r"has no moe_pruning_plan\.json"):
        PruningPlan.from_pretrained(outputs / "base")

    run = ["run", "--model", str(outputs / "base"), "--method", "random", "--num-experts", "4", "--token", "hf_writer"]
    with pytest.raises(SystemExit) as done:
        main([*run, "--push-to-hub", "me/from-the-command-line", str(tmp_path / "run")])
    out, err = capsys.readouterr()
    assert not done.value.code, err
    assert "published: " in out and published(hub, repo_id="me/from-the-command-line") == files(tmp_path / "run")
    assert "hf_writer" not in "".join(data.decode(errors="ignore") for data in files(tmp_path / "run").values())
