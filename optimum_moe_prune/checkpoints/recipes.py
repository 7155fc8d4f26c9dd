# SPDX-License-Identifier: Apache-2.0
"""Where a recipe is read from: a file of one's own, or a folder or repository that holds one."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import RequestError
from ..storage.nearby import absent, looks_like_path
from ..storage.values import Json, Values, read_json

_YAML = (".yaml", ".yml")


def read_recipe(name_or_path: str | os.PathLike, file_name: str, hub: Values) -> tuple[Path, Json]:
    """The file of a recipe, and what it says, unchecked.

    Args:
        name_or_path: A ``.json`` or ``.yaml`` file; or a folder or a repository on the Hub.
        file_name: What is read in the latter two.
        hub: ``revision``, ``token``, ``cache_dir``.

    Raises:
        RequestError: If there is none, or it cannot be read.
    """
    path = Path(name_or_path)
    if not path.is_file():
        from .source import Source

        if not path.exists() and (looks_like_path(str(name_or_path)) or path.suffix in (".json", *_YAML)):
            raise RequestError(absent(name_or_path))
        try:
            found = Source(str(name_or_path), **hub).find(file_name)
        except (OSError, ValueError) as error:
            raise RequestError(f"no recipe can be read from {str(name_or_path)!r}: {error}") from error
        if found is None:
            raise RequestError(f"{name_or_path} has no {Path(file_name).name}.")
        path = found
    if path.suffix.lower() not in _YAML:
        return path, read_json(path)
    from ..storage.yaml_files import read_yaml

    return path, read_yaml(path)
