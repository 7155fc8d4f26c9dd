# SPDX-License-Identifier: Apache-2.0
"""Records -> token ids: texts by the tokenizer, chats by its template, and of long texts no more than is used."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import RequestError
from .chats import Chat, Template
from .records import BadRecord, Reading, Record, checked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 8
"""So many characters of a long text are tried first for each token that is wanted; then twice as many, and so on."""
MARGIN = 64
"""Tokens beyond the wanted ones that a beginning must have: where it ends, it is cut into tokens in another way."""
RESULTS = ("conversation", "messages", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask",
           "padding", "truncation", "max_length", "tokenizer_kwargs", "tools")  # fmt: skip
"""Arguments of ``apply_chat_template`` that are no arguments of the template."""


@dataclass
class Encoder:
    """A tokenizer and what it is used with.

    Attributes:
        tokenizer: The tokenizer, or None where there are token ids alone.
        reading: How records are read.
        seen: What was found about records on the way, by its name, for the notes.
    """

    tokenizer: PreTrainedTokenizerBase | None
    reading: Reading = Reading()
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for name in self.reading.template_args:
            if name in RESULTS:
                raise RequestError(f"template_args: {name!r} is no argument of a chat template.")

    def encode(self, record: Record, limit: int | None = None) -> Tensor:
        """Token ids of a record, int64.

        Args:
            record: The record.
            limit: How many are used: of a text that is much longer, only its beginning is tokenised, and at least one
                more is returned.

        Raises:
            BadRecord: If its text or its chat cannot be used.
            RequestError: If there is no tokenizer for it, or no chat template.
        """
        if isinstance(record.content, Tensor):
            return record.content
        if self.tokenizer is None:
            raise RequestError(
                "a tokenizer is needed for texts, and this model's folder has none; pass token tensors instead."
            )
        text, special = (record.content, True) if isinstance(record.content, str) else self._chat(record)
        checked(text, record.origin)
        return torch.tensor(first_tokens(text, self._ids(special), limit), dtype=torch.int64)

    def _ids(self, special: bool) -> Callable[[str], list[int]]:
        tokenizer: Any = self.tokenizer
        if special:
            return lambda text: tokenizer(text, verbose=False)["input_ids"]
        return lambda text: tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]

    def _chat(self, record: Record) -> tuple[str, bool]:
        """The text of a chat, and whether special tokens are still to be added to it."""
        chat = record.content
        assert isinstance(chat, Chat)
        if not getattr(self.tokenizer, "chat_template", None):
            if chat.plain is not None:
                return chat.plain, True
            raise RequestError(
                f"{record.origin} holds chat messages, and the tokenizer has no chat template; give 'text'."
            )
        self.seen["chats"] += 1
        self.seen["with tools"] += bool(chat.tools)
        try:
            return self.template.text(chat), False
        except Exception as error:  # a template raises whatever its author, or the language it is written in, likes
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadRecord(record.origin, f"does not suit the chat template: {reason.rstrip('.')}.") from error

    @functools.cached_property
    def template(self) -> Template:
        """The tokenizer's chat template."""
        assert self.tokenizer is not None
        return Template.of(self.tokenizer, self.reading.template_args)

    def notes(self) -> list[str]:
        """What was passed to the chat template and had no effect, as sentences."""
        given = ", ".join(sorted(self.reading.template_args))
        if not self.seen["chats"]:
            return [f"No sample went through a chat template: {given} had no effect."] if given else []
        special = ("add_generation_prompt", "chat_template", "continue_final_message", "documents")
        unused = [
            name
            for name in sorted(self.reading.template_args)
            if name not in special and not self.template.mentions(name)
        ]
        notes = [f"The chat template does not mention {name}, which had no effect." for name in unused]
        if self.seen["with tools"] and not self.template.mentions("tools", tools=True):
            notes.append(f"The chat template has no place for tools: those of {self.seen['with tools']} samples are "
                         "not in them.")  # fmt: skip
        return notes


def first_tokens(text: str, ids: Callable[[str], list[int]], limit: int | None) -> list[int]:
    """The token ids of a text; of one that is much longer than ``limit`` tokens, its first ones, and one more.

    They are those that the whole text has: a beginning is tokenised that gives more than are wanted, and one twice as
    long, until both begin with the same.
    """
    size = CHARACTERS_PER_TOKEN * ((limit or 0) + MARGIN)
    if limit is None or len(text) <= 2 * size:
        return ids(text)
    before: list[int] = []
    while size < len(text):
        found = ids(text[:size])
        enough = len(found) > limit + MARGIN
        if enough and found[: limit + 1] == before:
            return before
        before = found[: limit + 1] if enough else []
        size *= 2
    return ids(text)
