# SPDX-License-Identifier: Apache-2.0
"""Where each process keeps its unfinished part of shared work, so that it can go on."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from ..errors import RequestError
from ..storage.folders import working_on
from ..storage.growing import process_folder
from ..storage.kept import PROGRESS_NAME
from ..storage.workspace import Workspace
from . import Processes


def own_folder(processes: Processes, folder: Path) -> Path:
    """Where this process keeps its part of work of which one alone would keep all in a folder."""
    return folder if processes.is_alone else process_folder(folder, processes.rank)


def held(processes: Processes, folder: str | os.PathLike) -> contextlib.AbstractContextManager[object]:
    """Hold a target (``storage.folders.working_on``) inside a ``with``: the main process does, for all."""
    return working_on(folder) if processes.is_main else contextlib.nullcontext()


def own_workspace(processes: Processes, workspace: Workspace, what: str) -> Workspace:
    """The part of a workspace that is this process's.

    Args:
        processes: Which of them this is.
        workspace: That of the whole work.
        what: What the work is called in messages.

    Raises:
        RequestError: If it holds unfinished work of one process alone; ``Store`` refuses that of another number.
    """
    folder = workspace.folder
    if processes.is_alone or folder is None:
        return workspace

    def prepare() -> None:
        if workspace.restart:
            shutil.rmtree(folder, ignore_errors=True)
        elif (folder / PROGRESS_NAME).is_file():
            raise RequestError(
                f"{folder} holds an unfinished {what} of something else: processes is 1 there and {processes.count} "
                "now. Run the command that began it to continue, or begin anew (restart=True)."
            )

    processes.from_main(prepare)
    return replace(workspace, folder=own_folder(processes, folder))
