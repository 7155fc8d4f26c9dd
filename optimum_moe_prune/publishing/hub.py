# SPDX-License-Identifier: Apache-2.0
"""Publish a finished folder on the Hub: everything in it, as one commit."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo

# HTTPError is that of the HTTP library the client stands on, which is another one in each major version.
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.source import Source
from ..errors import MoEPruneError, RequestError, RunError
from ..names import CONFIG_NAME, PLAN_NAME
from ..plan import PruningPlan
from ..storage.values import read_json

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""The weight files this package writes, and the only files it deletes in a repository."""

_NO_MODEL = {".gitattributes", "README.md", CONFIG_NAME}
"""What a repository may hold that nothing was published in: what the Hub begins with, and a recipe."""

_NOTHING = "Nothing was published; the same call continues, and sends nothing again that has arrived."
_XET_REFUSED = re.compile(r"HTTP status client error \((\d{3}) .*/xet-write-token/")
"""How Xet tells that the Hub gave it no token: in the text of a ConnectionError, and nowhere else."""

_LATER = (408, 429)
_LONGEST = 300
_REQUEST = re.compile(r"\([\w ]*ID: [^)]*\)")
_REFUSALS = {
    401: "the Hub knows no valid token; log in with `hf auth login`, or pass another token",
    403: "the token may not write there; use one that may, or name another repository",
    404: "there is no such repository for this token, or no such revision in it",
    409: "it was changed by somebody else in the meantime; look at it, and call again",
    412: "it was changed by somebody else in the meantime; look at it, and call again",
}


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publish a finished folder on the Hub: checkpoint, recipe, plan, card and whatever else is in it, as one commit.

    Nothing is visible in the repository before the commit, which is made whole or not at all. Weight files of an
    earlier output there, which the new one does not have, are deleted by it.

    After a failure the same call continues: the client asks the server which large files have arrived and sends only
    the others, each from its beginning; with Xet it sends only the chunks that have not. If the repository holds
    everything as it is here, no commit is made and its last one is returned.

    Args:
        folder: The output, as this package wrote it. Hidden files in it stay here.
        repo_id: The repository, made if absent. One with a model that this package did not make is refused, as is
            the model this one was pruned from.
        private: Whether a new repository is private; by default as its owner has set it. A public one is refused
            where this is true.
        token: Access token; by default the one of ``hf auth login``.
        revision: The branch, made if absent.
        commit_message: Of the commit.
        create_pr: Open a pull request instead of committing; only to the main branch.

    Returns:
        The commit: ``commit_url``, ``oid``, ``pr_url`` ...

    Raises:
        RequestError: If the folder is not finished, or the Hub refuses the request; nothing was published then.
        RunError: If the Hub fails, or the connection to it. The message says whether something was published.
    """
    folder = Path(folder).resolve()
    plan = _finished(folder)
    try:
        if not isinstance(repo_id, str):
            raise HFValidationError(f"it must be a text, and is {repo_id!r}")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RequestError(f"{repo_id!r} is no name of a repository: {_said(error)}.") from error
    _check_other_model(repo_id, plan)
    if create_pr and revision not in (None, "main"):
        raise RequestError(f"a pull request goes to the main branch, and revision is {revision!r}; leave one out.")
    names = Source(str(folder)).files()
    api = HfApi(token=token)
    with _explained(api, repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its owner now
        _check_other_model(repo_id, plan)
        head, branch_is_new = _head(api, repo_id, revision)
        if private and head.private is False:
            raise RequestError(
                f"{repo_id} exists and is public, and a private one is asked for; change that in its settings, or "
                "name another repository."
            )
        there = api.list_repo_files(repo_id, revision=head.sha)
        _check_replaceable(repo_id, there)
        if branch_is_new:
            api.create_branch(repo_id, branch=str(revision), revision=head.sha)
    # A left-over model.safetensors would be loaded in place of what a new index names.
    stale = sorted(name for name in set(there) - set(names) if _WEIGHTS.fullmatch(name))
    now = None if create_pr else lambda: api.model_info(repo_id, revision=revision).sha
    with _explained(api, repo_id, head.sha, now):
        # Not upload_folder: with Xet it makes one commit after another, and a model is half there in between.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale),
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names),
            ],
            commit_message=commit_message or _message(plan),
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.sha,  # what was looked at above is what is replaced
        )


def _finished(folder: Path) -> PruningPlan:
    """The plan of a finished output, all of whose weight files are there."""
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder; name the output to publish.")
    for name in (PLAN_NAME, "config.json"):
        if not (folder / name).is_file():
            raise RequestError(f"{folder} is not a finished output of this package: it has no {name}.")
        read_json(folder / name)
    Checkpoint.open(folder)
    return PruningPlan.load(folder)


def _check_other_model(repo_id: str, plan: PruningPlan) -> None:
    """Raise if a repository is that of the model the plan was made for, or of one before it."""
    known: list[Any] = []
    provenance: Any = plan.provenance
    while isinstance(provenance, dict):  # plans are edited by hand
        model, parent = provenance.get("model"), provenance.get("parent")
        known.append(model.get("name_or_path") if isinstance(model, dict) else None)
        provenance = parent.get("provenance") if isinstance(parent, dict) else None
    # The Hub takes names in whatever case.
    if repo_id.casefold() in (str(name).casefold() for name in known if name is not None):
        raise RequestError(
            f"{repo_id} is the model that this one was pruned from, and would be overwritten; name another repository."
        )


def _head(api: HfApi, repo_id: str, revision: str | None) -> tuple[ModelInfo, bool]:
    """The last commit of a branch, or of the main one where it is absent; and whether it is."""
    try:
        return api.model_info(repo_id, revision=revision), False
    except RevisionNotFoundError:
        return api.model_info(repo_id), True


def _check_replaceable(repo_id: str, there: Iterable[str]) -> None:
    """Raise if the files of a repository are those of something that this package did not make."""
    found = sorted(set(there) - _NO_MODEL)
    if found and PLAN_NAME not in found:
        shown = next((name for name in found if _WEIGHTS.fullmatch(name)), found[0])
        raise RequestError(
            f"{repo_id} holds something that this package did not make ({shown}, and no {PLAN_NAME}) and is not "
            "overwritten; name another repository."
        )


def _message(plan: PruningPlan) -> str:
    kept, total = sum(plan.num_experts.values()), sum(plan.original_num_experts.values())
    return f"Pruned by {' '.join(plan.method.split())}: {kept} of {total} experts retained"


# ------------------------------------------------------------------------------------------- what went wrong


@contextlib.contextmanager
def _explained(
    api: HfApi, repo_id: str, before: str | None = None, now: Callable[[], str | None] | None = None
) -> Iterator[None]:
    """Errors of the client as errors of this package.

    Args:
        api: The client.
        repo_id: The repository.
        before: The last commit there.
        now: Asks for it again, where that tells what became of a commit whose answer did not come.
    """
    try:
        yield
    except MoEPruneError:
        raise
    except OfflineModeIsEnabled as error:
        raise RequestError(
            f"publishing {repo_id} needs the Hub, and the offline mode is on; unset HF_HUB_OFFLINE."
        ) from error
    except LocalTokenNotFoundError as error:
        raise RequestError(f"{repo_id} cannot be published: {_REFUSALS[401]}.") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # as many as there are layers below
        status, by_hub = _status(error, str(api.endpoint))
        # What the storage refuses is another matter: an address to send a file to may have expired.
        if status is not None and by_hub and 400 <= status < 500 and status not in _LATER:
            reason = _REFUSALS.get(status, "the Hub refuses the request")
            raise RequestError(
                f"{repo_id} cannot be published: {reason} ({status}: {_said(error)}). Nothing was published."
            ) from error
        if _asked_for_commit(error, repo_id):
            outcome = _outcome(repo_id, before, now)
        else:
            outcome = _NOTHING
        answered = "" if status is None else f" ({status})"
        raise RunError(f"publishing {repo_id} failed: {_said(error)}{answered}. {outcome}") from error


def _outcome(repo_id: str, before: str | None, now: Callable[[], str | None] | None) -> str:
    """What became of a commit that was asked for and not answered: servers have said 500 and made it."""
    found = None
    if now is not None:
        with contextlib.suppress(HTTPError, OSError, ValueError):
            found = now()
    if found is None:
        return (
            f"Whether {repo_id} has the commit is not known: it is made whole or not at all. Look there; if it is "
            "absent, the same call makes it, and sends nothing again that has arrived."
        )
    if found == before:
        return _NOTHING
    return f"But {repo_id} has a new commit, {found}; the same call makes no other if it is this one."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException, endpoint: str) -> tuple[int | None, bool]:
    """The status that was answered, if there was an answer; and whether it was the Hub's."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code, str(cause.response.url).startswith(f"{endpoint}/")
        if isinstance(cause, ConnectionError) and (found := _XET_REFUSED.search(str(cause))):
            return int(found[1]), True
    return None, False


def _asked_for_commit(error: BaseException, repo_id: str) -> bool:
    """Whether what failed is the request that makes the commit."""
    with contextlib.suppress(RuntimeError, AttributeError):  # there was no request
        return f"/{repo_id}/commit/" in str(error.request.url)  # type: ignore[attr-defined]
    return False


def _said(error: BaseException) -> str:
    """What the client and the server said, in one line."""
    if isinstance(error, json.JSONDecodeError):
        return "the answer was no JSON, as from a gateway whose server does not answer"
    lines = []
    for cause in _causes(error):
        lines.append(getattr(cause, "server_message", None) or _first_line(cause))
        if isinstance(cause, HfHubHTTPError) or len(lines) == 2:  # what is below says no more
            break
    said = "; ".join(" ".join(line.split()).rstrip(".") for line in lines)
    return said if len(said) <= _LONGEST else said[: _LONGEST - 3] + "..."


def _first_line(error: BaseException) -> str:
    """The first line that says something; the client may begin with the number of the request alone."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not _REQUEST.fullmatch(line)), type(error).__name__)
