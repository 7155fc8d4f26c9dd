# SPDX-License-Identifier: Apache-2.0
"""Chats: messages and tools in the forms people have them -> the form that chat templates expect, and their text.

Messages have ``role`` and ``content`` (OpenAI), or ``from`` and ``value`` (ShareGPT). Parts of a content are joined by
line breaks where the template takes text alone, as servers do. Arguments of calls are objects, as templates expect
them, or JSON text where that is what the template writes out; the same for a content that is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..storage.values import Json, Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_return": "tool",
}
"""Other names of roles; any other is left to the template."""
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Parts that are text, and where it stands."""
MEDIA = re.compile("image|audio|video|file|document")


@dataclass(frozen=True)
class Chat:
    """Messages as templates expect them.

    Attributes:
        messages: Each with ``role`` and ``content``: text, parts that are text, or None.
        tools: Tools that may be called, as JSON schemas of functions.
        plain: The text in place of them where the tokenizer has no chat template.
    """

    messages: list[Json]
    tools: list[Json] = field(default_factory=list)
    plain: str | None = None

    @property
    def is_blank(self) -> bool:
        """Whether nobody says or calls anything."""
        return not any(m.get("tool_calls") or _text_of(m.get("content")).strip() for m in self.messages)


# --------------------------------------------------------------------------------------- what people have


def messages_of(messages: Sequence[Any]) -> list[Json]:
    """Messages in the form that templates expect.

    Raises:
        ValueError: If one is no message, or holds something else than text; says which.
    """
    return [_message(message, number) for number, message in enumerate(messages)]


def tools_of(tools: Any, functions: Any = None) -> list[Json]:
    """The tools of a record, given as a list or as JSON text, each as ``{"type": "function", "function": {...}}``.

    Raises:
        ValueError: If they are something else.
    """
    name, given = ("tools", tools) if tools not in (None, "", []) else ("functions", functions)
    if given in (None, "", []):
        return []
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"holds text in {name!r} that is not JSON: {error}") from error
    given = [given] if isinstance(given, Mapping) else given
    if given is None:
        return []
    if not isinstance(given, Sequence) or not all(isinstance(tool, Mapping) for tool in given):
        raise ValueError(f"holds {name} that are no list of objects")
    return [dict(tool) if "name" not in tool else {"type": "function", "function": dict(tool)} for tool in given]


def _message(message: Any, number: int) -> Json:
    if not isinstance(message, Mapping):
        raise ValueError(f"has a {type(message).__name__} as message {number}, and not an object with a role")
    told = {key: value for key, value in message.items() if value is not None}  # tables fill columns with nulls
    role = told.get("role", told.get("from"))
    if not isinstance(role, str):
        raise ValueError(f"has no role in message {number}; its keys: {', '.join(map(str, message)) or 'none'}")
    content = next((told[key] for key in ("content", "value", "text") if key in told), None)
    calls = _calls(told, role, content, number)
    if calls and role == "function_call":
        content = None
    if content is None and not calls and set(message) <= {"role", "from"}:
        raise ValueError(f"has neither content nor tool calls in message {number}")
    kept = {key: value for key, value in told.items() if key not in ("from", "value", "text", "function_call")}
    found: Json = {**kept, "role": ROLES.get(role, role), "content": _content(content, role, number)}
    if calls:
        found["tool_calls"] = calls
    else:
        found.pop("tool_calls", None)
        found["content"] = "" if found["content"] is None else found["content"]
    return found


def _content(content: Any, role: str, number: int) -> str | list[Json] | None:
    """Text, parts that are text, or None."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Mapping) and "type" in content:
        content = [content]
    is_parts = isinstance(content, Sequence) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and ("type" in part or "text" in part)) for part in content
    )
    if not is_parts and ROLES.get(role, role) == "tool":
        return json.dumps(content, ensure_ascii=False)  # what a tool gave back
    if not is_parts:
        raise ValueError(f"holds a {type(content).__name__} as content of message {number}, and not text")
    return [{"type": "text", "text": _part(part, number)} for part in content]


def _part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    kind = str(part.get("type") or "text")
    text = part.get(TEXTS.get(kind, "text"), part.get("content"))
    if kind in TEXTS and isinstance(text, str):
        return text
    if MEDIA.search(kind):
        raise ValueError(f"holds {kind!r} in message {number}, and text alone is calibrated")
    raise ValueError(f"has a part of type {kind!r} in message {number} that is not text")


def _calls(message: Values, role: str, content: Any, number: int) -> list[Json]:
    calls = message.get("tool_calls") or message.get("function_call")
    if role == "function_call" and not calls:
        calls = content
    if not calls:
        return []
    try:
        calls = json.loads(calls) if isinstance(calls, str) else calls
    except ValueError as error:
        if role == "function_call":
            return []  # it stays the text that it is
        raise ValueError(f"holds tool calls in message {number} that are not JSON: {error}") from error
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"holds tool calls in message {number} that are no list of objects")
    return [_call(call) for call in calls]


def _call(call: Values) -> Json:
    """A call with its function's name and arguments, which are an object where they are JSON of one."""
    found = dict(call) if "function" in call else {"type": "function", "function": dict(call)}
    if not isinstance(found["function"], Mapping):
        return found
    function = dict(found["function"])
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):
        return {**found, "function": function}
    if isinstance(arguments, dict):
        function["arguments"] = arguments
    return {**found, "function": function}


# ----------------------------------------------------------------------------------- what a template makes of it


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template and what is passed to it.

    Attributes:
        tokenizer: The tokenizer.
        arguments: Further arguments.
        takes_text: Whether it writes out contents that are text.
        takes_parts: Whether it writes out contents of parts as well.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Json
    takes_text: bool = True
    takes_parts: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, arguments: Values) -> Template:
        """The template of a tokenizer, tried with a word."""
        template = cls(tokenizer, dict(arguments))
        word = "calibration"

        def shown(content: Any) -> str:
            try:
                return template._rendered([{"role": "user", "content": content}], [])
            except Exception:  # whatever a template does not like; the record that it does not like is named later
                return ""

        text, parts = shown(word), shown([{"type": "text", "text": word}])
        return cls(tokenizer, dict(arguments), word in text or word not in parts, word in parts and parts == text)

    def text(self, chat: Chat) -> str:
        """The text of a chat.

        Raises:
            Exception: Whatever the template raises.
        """
        messages = [{**m, "content": self._content(m.get("content"))} for m in chat.messages]
        if not any(m.get("tool_calls") for m in messages):
            return self._with_contents(messages, chat.tools)
        written = [_arguments(m, as_text=True) for m in messages]
        try:
            text = self._with_contents(messages, chat.tools)
        except Exception:
            if written == messages:
                raise
            return self._with_contents(written, chat.tools)
        # Python's way to write an object, which is nobody's: it wants text.
        objects = [arguments for m in messages for arguments in _objects(m)]
        if any(arguments and str(arguments) in text for arguments in objects):
            return self._with_contents(written, chat.tools)
        return text

    def mentions(self, name: str, tools: bool = False) -> bool:
        """Whether the template has this word in it."""
        try:
            source = self.tokenizer.get_chat_template(self.arguments.get("chat_template"), [{}] if tools else None)
        except ValueError:
            return True
        return re.search(rf"\b{re.escape(name)}\b", source) is not None

    def _content(self, content: Any) -> Any:
        if isinstance(content, list):
            return content if self.takes_parts or not self.takes_text else _text_of(content)
        return content if self.takes_text or content is None else [{"type": "text", "text": content}]

    def _with_contents(self, messages: list[Json], tools: list[Json]) -> str:
        """Contents that are missing stay so, unless the template minds them or writes ``None``."""
        filled = [{**m, "content": ""} if m["content"] is None else m for m in messages]
        if filled == messages:
            return self._rendered(messages, tools)
        try:
            text = self._rendered(messages, tools)
        except Exception:
            return self._rendered(filled, tools)
        try:
            other = self._rendered(filled, tools)
        except Exception:
            return text
        return other if text.count("None") > other.count("None") else text

    def _rendered(self, messages: list[Json], tools: list[Json]) -> str:
        tokenizer: Any = self.tokenizer
        text: str = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, **self.arguments)
        return text


def _text_of(content: Any) -> str:
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _objects(message: Values) -> list[Json]:
    functions = [call["function"] for call in message.get("tool_calls") or () if isinstance(call["function"], dict)]
    return [f["arguments"] for f in functions if isinstance(f.get("arguments"), dict)]


def _arguments(message: Json, as_text: bool) -> Json:
    """The message, arguments of its calls as JSON text."""
    if not _objects(message):
        return message

    def written(call: Json) -> Json:
        function = call["function"]
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
