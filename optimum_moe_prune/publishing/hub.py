# SPDX-License-Identifier: Apache-2.0
"""Publish a finished folder on the Hub: everything in it, as one commit."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, errors
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.source import Source
from ..compat import http_error
from ..errors import RequestError, RunError
from ..names import CARD_NAME, CONFIG_NAME, PLAN_NAME
from ..plan import PruningPlan
from ..progress import working
from ..progress.pace import size
from ..storage.values import read_json
from .facts import names_of, to_publish

logger = logging.getLogger(__name__)

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""The weight files this package writes, and the only files it deletes in a repository."""

_NO_MODEL = {".gitattributes", CARD_NAME, CONFIG_NAME}
"""What a repository may hold that nothing was published in: what the Hub begins with, and a recipe."""

_CHANGED = "it was changed by somebody else in the meantime; look at it, and call again"
_REFUSALS = {
    401: "the Hub knows no valid token; log in with `hf auth login`, or pass another token",
    403: "the token may not write there; use one that may, or name another repository",
    404: "there is no such repository for this token, or no such revision in it",
    409: _CHANGED,
    412: _CHANGED,
}
"""What the Hub means by a status."""


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

    Links that lead out of the folder are followed for weights alone; others stay here, with a warning.

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
            raise errors.HFValidationError(f"it must be a text, and is {repo_id!r}")
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise RequestError(f"{repo_id!r} is no name of a repository: {error}.") from error
    _check_other_model(repo_id, plan)
    if create_pr and revision not in (None, "main"):
        raise RequestError(f"a pull request goes to the main branch, and revision is {revision!r}; leave one out.")
    names = _published(folder)
    api = HfApi(token=token)
    with _explained(api, repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its owner now
        try:
            head, branch_is_new = api.model_info(repo_id, revision=revision), False
        except errors.RevisionNotFoundError:
            head, branch_is_new = api.model_info(repo_id), True
        there = set(api.list_repo_files(repo_id, revision=head.sha))
    _check_other_model(repo_id, plan)
    if private and head.private is False:
        raise RequestError(
            f"{repo_id} exists and is public, and a private one is asked for; change that in its settings, or name "
            "another repository."
        )
    if PLAN_NAME not in there and (found := sorted(there - _NO_MODEL)):
        shown = next(filter(_WEIGHTS.fullmatch, found), found[0])
        raise RequestError(
            f"{repo_id} holds something that this package did not make ({shown}, and no {PLAN_NAME}) and is not "
            "overwritten; name another repository."
        )
    # Plans of earlier versions name the folder on somebody's machine.
    public = to_publish(plan)
    contents = {} if public == plan else {PLAN_NAME: (json.dumps(public.to_dict(), indent=2) + "\n").encode()}
    # A left-over model.safetensors would be loaded in place of what a new index names.
    stale = sorted(filter(_WEIGHTS.fullmatch, there - set(names)))
    kept, total = sum(plan.num_experts.values()), sum(plan.original_num_experts.values())
    message = f"Pruned by {' '.join(plan.method.split())}: {kept} of {total} experts retained"
    nbytes = sum((folder / name).stat().st_size for name in names)
    with (
        working(f"publishing {size(nbytes)} as {repo_id}", None, did=f"published {repo_id}"),
        _explained(
            api, repo_id, head.sha, lambda: None if create_pr else api.model_info(repo_id, revision=revision).sha
        ),
    ):
        if branch_is_new:
            api.create_branch(repo_id, branch=str(revision), revision=head.sha)
        # Not upload_folder: with Xet it makes one commit after another, and a model is half there in between.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale),
                *(
                    CommitOperationAdd(path_in_repo=name, path_or_fileobj=contents.get(name, folder / name))
                    for name in names
                ),
            ],
            commit_message=commit_message or message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.sha,  # what was looked at above is what is replaced
        )


def _published(folder: Path) -> list[str]:
    """The files to publish; links that lead out of the folder are followed for weights alone."""
    source = Source(str(folder))
    out = {
        name: where for name in source.files() if (where := source.leads_out(name)) and not _WEIGHTS.fullmatch(name)
    }
    out |= {name: folder / name for name in source.linked_folders()}
    for name, where in out.items():
        logger.warning("%s of %s is not published: it is a link, to %s.", name, folder, os.path.realpath(where))
    return [name for name in source.files() if name not in out]


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
    # The Hub takes names in whatever case.
    if repo_id.casefold() in {str(name).casefold() for name in names_of(plan)}:
        raise RequestError(
            f"{repo_id} is the model that this one was pruned from, and would be overwritten; name another repository."
        )


@contextlib.contextmanager
def _explained(
    api: HfApi, repo_id: str, before: str | None = None, now: Callable[[], str | None] = lambda: None
) -> Iterator[None]:
    """Errors of the client as errors of this package, by their types and by the status that was answered.

    ``before`` is the last commit of the repository; ``now`` asks for it again.
    """
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise RequestError(
            f"publishing {repo_id} needs the Hub, and the offline mode is on; unset HF_HUB_OFFLINE."
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise RequestError(f"{repo_id} cannot be published: {_REFUSALS[401]}.") from error
    except (http_error(), OSError, RuntimeError, ValueError) as error:  # as many as there are layers below
        said, answer = _said(error)
        if answer is None and isinstance(error, (ConnectionError, PermissionError)) and error.errno is None:
            said += " (if that is a refusal, the token may lack write access)"  # Xet's, which says it in words alone
        elif answer is not None:
            status = answer.response.status_code
            # What the storage refuses is another matter: an address to send a file to may have expired.
            by_hub = str(answer.response.url).startswith(f"{api.endpoint}/")
            if by_hub and 400 <= status < 500 and status not in (408, 429):
                reason = _REFUSALS.get(status, "the Hub refuses the request")
                raise RequestError(
                    f"{repo_id} cannot be published: {reason} ({status}: {said}). Nothing was published."
                ) from error
            said += f" ({status})"
        raise RunError(f"publishing {repo_id} failed: {said}. {_outcome(error, repo_id, before, now)}") from error


def _outcome(error: BaseException, repo_id: str, before: str | None, now: Callable[[], str | None]) -> str:
    """What became of the commit; of one that was asked for and not answered too: servers have said 500 and made it."""
    asked = isinstance(error, json.JSONDecodeError)  # of whatever answer
    with contextlib.suppress(RuntimeError, AttributeError):  # there was no request
        asked = f"/{repo_id}/commit/" in str(error.request.url)  # type: ignore[attr-defined]
    found = before
    if asked:
        try:
            found = now()
        except (http_error(), OSError, ValueError):
            found = None
    if found == before:
        return "Nothing was published; the same call continues, and sends nothing again that has arrived."
    if found is None:
        return (
            f"Whether {repo_id} has the commit is not known: it is made whole or not at all. Look there; if it is "
            "absent, the same call makes it, and sends nothing again that has arrived."
        )
    return f"But {repo_id} has a new commit, {found}; the same call makes no other if it is this one."


def _said(error: BaseException) -> tuple[str, errors.HfHubHTTPError | None]:
    """What the client and the server said, in one line; and the server's answer, if there was one."""
    answer: BaseException | None = error
    while answer is not None and not isinstance(answer, errors.HfHubHTTPError):
        answer = answer.__cause__
    if isinstance(error, json.JSONDecodeError):
        return "the answer was no JSON, as from a gateway whose server does not answer", answer
    said = "" if error is answer else str(error) or type(error).__name__
    below = str(error.__cause__ or "")
    if answer is not None:
        below = answer.server_message or f"{answer.response.reason_phrase} by {answer.response.url.host}"
    lines = [text.strip().partition("\n")[0].rstrip(".") for text in (said, below) if text]
    return textwrap.shorten("; ".join(dict.fromkeys(lines)), 300, placeholder="..."), answer
