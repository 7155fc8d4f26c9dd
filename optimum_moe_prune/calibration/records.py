# SPDX-License-Identifier: Apache-2.0
"""Records as people have them -> text or a chat, each with its domain.

A record's text is, in this order: the column that is named (``text_column``); ``text``; a chat (``messages``,
``conversations``, ``conversation``, ``trajectory``: a list, or the same as JSON text); a question and its answer
(``prompt``/``completion``, ``instruction``/``input``/``output``, ``question``/``answer`` and the like), two turns
where the tokenizer has a chat template and plain text where it has none; ``chosen`` of a preference; ``content``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import RequestError
from ..storage.values import Json, Values, no_constant
from .chats import Chat, messages_of, tools_of

DEFAULT_DOMAIN = "default"

CHATS = ("messages", "conversations", "conversation", "trajectory")
PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("prompt", ("completion", "chosen", "response", "output", "answer")),
    ("instruction", ("output", "response", "completion", "answer")),
    ("question", ("answer", "response", "solution", "output")),
    ("problem", ("solution", "answer", "response")),
    ("query", ("response", "answer", "answers", "output")),
    ("inputs", ("targets",)),
    ("input", ("output", "response")),
)
"""Columns that ask, each with those that answer, the first that a record has."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
COLUMNS = frozenset(
    {"text", "domain", "tools", "functions", "system", "system_prompt", "input", "content", "chosen", *CHATS, *MEDIA}
    | {name for ask, answers in PAIRS for name in (ask, *answers)}
)
"""Every column that is looked at where none is named."""


@dataclass(frozen=True)
class Reading:
    """How records are read.

    Attributes:
        text_column: The column that holds the text, where it is none of the usual ones.
        template_args: Further arguments of the chat template, such as ``{"enable_thinking": False}``.
        skip_bad: Whether records that cannot be used are left out and counted; by default they are refused.
    """

    text_column: str | None = None
    template_args: Json = field(default_factory=dict)
    skip_bad: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a record stands: its place, in a file or in what was passed."""

    place: str
    path: Path | None = None

    def __str__(self) -> str:
        return self.place if self.path is None else f"{self.path}, {self.place}"

    @property
    def public(self) -> str:
        """The same without the file's folders, which are nobody else's business."""
        return self.place if self.path is None else f"{self.path.name}, {self.place}"


class BadRecord(RequestError):
    """One record cannot be used; the others may.

    Attributes:
        origin: Where it stands.
        reason: What is wrong with it, as a sentence that goes on from there.
    """

    def __init__(self, origin: Origin, reason: str, what: str = "") -> None:
        reason = "".join(c if c.isprintable() else repr(c)[1:-1] for c in reason)  # it may quote the record
        super().__init__(f"{what}{origin} {reason} To leave such records out, pass skip_bad=True.")
        self.origin, self.reason = origin, reason


@dataclass(frozen=True)
class Record:
    """One sample before tokenisation: text, a chat or token ids, and where it came from."""

    origin: Origin
    content: str | Chat | Tensor
    domain: str
    labelled: bool = False
    """Whether the record itself says its domain."""

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing in it."""
        if isinstance(self.content, Tensor):
            return len(self.content) == 0
        return not self.content.strip() if isinstance(self.content, str) else self.content.is_blank

    def is_likely(self, skip_bad: bool = False) -> bool:
        """Whether it makes a sample in all likelihood, as told without a tokenizer.

        Args:
            skip_bad: Whether chats that do not suit the template are left out.
        """
        if isinstance(self.content, str):
            return len(self.content) > 32 or len(self.content.split(None, 2)) > 1
        return len(self.content) > 1 if isinstance(self.content, Tensor) else not skip_bad


def said_domain(row: Mapping[str, Any]) -> Any:
    """The domain that a row says; None where it says none, or a blank one."""
    label = row.get("domain")
    return None if isinstance(label, str) and not label.strip() else label


def record_of(row: Any, origin: Origin, domain: str, reading: Reading = Reading()) -> Record:
    """The record in a row of data; one that holds nothing is blank.

    Args:
        row: An object with one of the known columns, a text, or a list of messages.
        origin: Where it stands.
        domain: Its domain where it does not say one.
        reading: How it is read.

    Raises:
        BadRecord: If it has none of the columns, or what they hold is not what they are for.
    """
    if isinstance(row, str):
        return Record(origin, row, domain)
    if _is_chat(row):
        return Record(origin, _read(origin, lambda: Chat(messages_of(row))), domain)
    if not isinstance(row, Mapping):
        raise BadRecord(origin, f"must be an object with 'text' or 'messages', and is a {type(row).__name__}.")
    label = said_domain(row)
    content = _read(origin, lambda: _named(row, reading.text_column) if reading.text_column else _content(row))
    name = checked(str(domain if label is None else label), origin, "the domain of ")
    return Record(origin, content, name, label is not None)


def checked(text: str, origin: Origin, what: str = "") -> str:
    """The text, unless it has half characters, which JSON can hold and UTF-8 cannot.

    Raises:
        BadRecord: If it has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(origin, f"is not valid Unicode text: {error.reason}.", what) from error
    return text


def _read(origin: Origin, read: Any) -> Any:
    try:
        return read()
    except (ValueError, RecursionError) as error:  # what is wrong with a record; where it stands is added here
        raise BadRecord(origin, f"{error}".rstrip(".") + ".") from error


def _named(row: Values, column: str) -> str | Chat:
    if column not in row:
        raise ValueError(f"has no column {column!r}; its keys: {_keys(row)}")
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if _is_chat(value):
        return _chat(row, messages_of(value))
    raise ValueError(f"holds a {type(value).__name__} in {column!r}, and not text")


def _content(row: Values) -> str | Chat:
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"must have 'text' (a string) or 'messages' (a list); its 'text' is {text!r:.40}")
    if text is not None and text.strip():
        return text
    for name in CHATS:
        if row.get(name) is not None and row[name] != "":
            return _chat(row, messages_of(_json_list(row[name], name)))
    for ask, answers in PAIRS:
        if _is_given(row.get(ask)):
            answer = next((name for name in answers if _is_given(row.get(name))), None)
            return _pair(row, ask, answer)
    if _is_given(row.get("chosen")):
        chosen = row["chosen"]
        return chosen if isinstance(chosen, str) else _chat(row, messages_of(_json_list(chosen, "chosen")))
    if isinstance(row.get("content"), str):
        return row["content"]
    known = {"text", "content", "chosen", *CHATS, *(ask for ask, _ in PAIRS)}
    if known & set(row):
        return ""
    raise ValueError(
        f"must have 'text' (a string) or 'messages' (a list); its keys: {_keys(row)}. Name the column that holds the "
        "text (text_column)"
    )


def _keys(row: Values) -> str:
    names = [str(key)[:40] for key in row][:20]
    return ", ".join(names) or "none"


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip()) and value != []


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)
    )


def _json_list(value: Any, name: str) -> Any:
    """A list, or the one in JSON text, as tables hold it."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]  # by columns
    if not isinstance(value, str):
        if not isinstance(value, Sequence):
            raise ValueError(
                f"must have 'text' (a string) or 'messages' (a list); its {name!r} is a {type(value).__name__}"
            )
        return value
    try:
        found = json.loads(value, parse_constant=no_constant)
    except ValueError as error:
        raise ValueError(f"holds text in {name!r} that is not JSON: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"holds a {type(found).__name__} as JSON in {name!r}, and not a list of messages")
    return found


def _chat(row: Values, messages: list[Json], plain: str | None = None) -> Chat:
    """A chat with the tools and the system's message that the record has beside it."""
    if media := [name for name in MEDIA if _is_given(row.get(name))]:
        raise ValueError(f"holds {media[0]} beside its chat, and text alone is calibrated")
    system = next((row[name] for name in ("system", "system_prompt") if isinstance(row.get(name), str)), "")
    if messages and system.strip() and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Chat(messages, tools_of(row.get("tools"), row.get("functions")), plain)


def _pair(row: Values, ask: str, answer: str | None) -> Chat:
    """What is asked, and what is answered, as turns; as plain text where both are."""
    question, reply = row[ask], None if answer is None else row[answer]
    context = row.get("input") if ask == "instruction" else None
    asked = _turns(question, "user", ask)
    if isinstance(context, str) and context.strip() and isinstance(question, str):
        question = f"{question}\n\n{context}"
        asked = [{"role": "user", "content": question}]
    called = _calls(reply) if row.get("tools") else None
    replied = [] if reply is None else _turns(reply if called is None else called, "assistant", str(answer))
    if len(replied) > 1 and replied[0].get("role") in ("system", "user"):
        asked = []  # the answer is the whole conversation
    both = isinstance(question, str) and isinstance(reply, (str, type(None)))
    return _chat(row, asked + replied, _joined(question, reply, ask) if both else None)


def _joined(question: str, reply: str | None, ask: str) -> str:
    """Question and answer as one text. A completion goes on where its prompt ends, if it says how they are joined."""
    if not reply:
        return question
    joined = ask == "prompt" and (question[-1].isspace() or reply[0].isspace())
    return question + reply if joined else f"{question}\n\n{reply}"


def _turns(value: Any, role: str, name: str) -> list[Json]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        value = [value]
    if _is_chat(value):
        return messages_of(value)
    raise ValueError(f"holds a {type(value).__name__} in {name!r}, and not text or messages")


def _calls(reply: Any) -> Any:
    """A reply that calls tools, as a message: a list of names and arguments, or JSON text of one."""
    try:
        calls = json.loads(reply) if isinstance(reply, str) else reply
    except ValueError:
        return None
    if not isinstance(calls, list) or not calls or not all(isinstance(c, Mapping) and "name" in c for c in calls):
        return None
    return [{"role": "assistant", "content": "", "tool_calls": calls}]
