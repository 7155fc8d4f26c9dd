# SPDX-License-Identifier: Apache-2.0
"""Plain values that people write by hand, as YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from ..errors import RequestError


class _Loader(yaml.SafeLoader):
    """Plain values alone. Aliases are refused, with which a small file can stand for any amount of memory; so are keys
    that are there twice, of which YAML would silently take the last."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*) are not taken", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is no plain value", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RequestError: If the file is not YAML, with the line, or holds something else than a mapping.
    """
    path = Path(path)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise RequestError(f"{path}{line} cannot be read as YAML: {error.problem or error.context}.") from error
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(value, dict):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise RequestError(f"{path} must hold settings, as 'num_experts: 4', and holds {kind}.")
    return {str(key): each for key, each in value.items()}
