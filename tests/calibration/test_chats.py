# SPDX-License-Identifier: Apache-2.0
"""Records as people have them: chats, tools, parts, questions and answers; and what templates make of them."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pytest
from conftest import make_tokenizer
from transformers import PreTrainedTokenizerBase

from optimum_moe_prune import CalibrationSet, RequestError
from optimum_moe_prune.calibration.chats import Chat, Template, messages_of, tools_of
from optimum_moe_prune.calibration.records import Origin, Reading, record_of
from optimum_moe_prune.calibration.texts import needs_tokenizer

PLAIN = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
CALLS = (
    "{% for t in tools or [] %}<{{ t.function.name }}> {% endfor %}"
    "{% for m in messages %}{{ m['content'] }}{% for c in m.tool_calls or [] %} {{ c.function.name }}"
    " {{ c.function.arguments | tojson }}{% endfor %} {% endfor %}"
)
WEATHER = {"name": "weather", "parameters": {"type": "object"}}
ASKED = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def with_template(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def shown(record: Any, template: str = PLAIN, **arguments: Any) -> str:
    """The text of a record's chat."""
    content = record_of(record, Origin("record 0"), "d").content
    return content if isinstance(content, str) else Template.of(with_template(template), arguments).text(content)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED},
        {"messages": json.dumps(ASKED)},
        {"messages": {"role": ["user", "assistant"], "content": ["w1", "w2"]}},
        {"text": None, "messages": ASKED},
        {"text": " ", "messages": ASKED},
        {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
        {"conversation": [{"role": "human", "content": "w1"}, {"role": "bot", "content": "w2"}]},
        {"trajectory": [{"role": "user", "text": "w1"}, {"role": "ai", "text": "w2"}]},
        {"prompt": "w1", "completion": "w2"},
        {"prompt": [ASKED[0]], "completion": [ASKED[1]]},
        {"prompt": [ASKED[0]], "completion": "w2"},
        {"prompt": "w1", "chosen": ASKED, "rejected": ASKED[:1]},
        {"chosen": ASKED, "rejected": ASKED[:1]},
        {"instruction": "w1", "input": "", "output": "w2"},
        {"question": "w1", "answer": "w2"},
        {"problem": "w1", "solution": "w2", "answer": "w3"},
        {"query": "w1", "response": "w2"},
        {"inputs": "w1", "targets": "w2"},
        {"input": "w1", "output": "w2"},
        ASKED,
    ],
)
def test_every_form_of_a_chat_is_the_same_one(record: Any) -> None:
    assert shown(record) == "user w1 assistant w2 "


def test_without_a_template_questions_and_answers_are_text_and_chats_are_refused() -> None:
    tokenizer = with_template(None)

    def text(record: dict[str, Any]) -> str:
        (ids,) = CalibrationSet.build([record], tokenizer).token_ids
        return tokenizer.decode(ids)

    assert text({"instruction": "w1", "input": "w2", "output": "w3"}) == "<s> w1 w2 w3"
    assert text({"prompt": "w1 ", "completion": "w2"}) == text({"question": "w1", "answer": "w2"}) == "<s> w1 w2"
    assert record_of({"prompt": "a ", "completion": "b"}, Origin(""), "d").content.plain == "a b"
    assert record_of({"prompt": "a", "completion": "b"}, Origin(""), "d").content.plain == "a\n\nb"
    assert text({"prompt": "w1 w2"}) == text({"prompt": "w1 w2", "completion": None}) == "<s> w1 w2"
    with pytest.raises(RequestError, match="record 1 holds chat messages, and the tokenizer has no chat template"):
        CalibrationSet.build([{"text": "w1 w2"}, {"messages": ASKED}], tokenizer, skip_bad=True)


def test_other_texts_and_systems() -> None:
    assert shown({"content": "w1"}) == shown({"text": "w1", "messages": ASKED}) == shown("w1") == "w1"
    assert shown({"system": "w9", "conversations": [{"from": "human", "value": "w1"}]}) == "system w9 user w1 "
    assert shown({"system": "w9", "messages": [{"role": "system", "content": "w8"}]}) == "system w8 "
    assert shown({"instruction": "w1", "input": "w2", "output": "w3"}) == "user w1\n\nw2 assistant w3 "
    assert shown({"answer": "w2", "question": "w1", "text": ""}) == "user w1 assistant w2 "


def test_a_column_by_name() -> None:
    reading = Reading(text_column="body")
    assert record_of({"body": "w1", "text": "w2"}, Origin(""), "d", reading).content == "w1"
    assert record_of({"body": None}, Origin(""), "d", reading).is_blank
    assert record_of({"body": ASKED}, Origin(""), "d", reading).content.messages == ASKED
    with pytest.raises(RequestError, match="row 3 has no column 'body'; its keys: text"):
        record_of({"text": "w2"}, Origin("row 3"), "d", reading)
    with pytest.raises(RequestError, match="row 3 holds a int in 'body', and not text"):
        record_of({"body": 5}, Origin("row 3"), "d", reading)


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [{"type": "function", "function": WEATHER}]},
        {"tools": json.dumps([WEATHER])},
        {"tools": [WEATHER]},
        {"functions": [WEATHER]},
        {"functions": json.dumps(WEATHER)},
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([{"name": "f", "arguments": {"a": 1}}])},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    ],
)
def test_tools_and_calls_reach_the_template(tools: dict[str, Any], call: dict[str, Any]) -> None:
    assert tools_of(tools.get("tools"), tools.get("functions")) == [{"type": "function", "function": WEATHER}]
    record = {"messages": [{"role": "user", "content": "w1"}, call], **tools}
    assert shown(record, CALLS) == '<weather> w1  f {"a": 1} '
    # A template that writes arguments out as they are is given text.
    assert shown(record, CALLS.replace(" | tojson", "")) == '<weather> w1  f {"a": 1} '
    # So is one that joins them to text, and one that minds contents that are missing.
    joined = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ 'with ' + c.function.arguments }}")
    assert shown(record, joined.replace("{{ m['content'] }}", "{{ m['content'] + '.' }}")).endswith('f with {"a": 1} ')


def test_calls_of_a_record_that_has_them_for_an_answer() -> None:
    answers = json.dumps([{"name": "f", "arguments": {"a": 1}}])
    record = {"query": "w1", "answers": answers, "tools": json.dumps([WEATHER])}
    assert shown(record, CALLS) == '<weather> w1  f {"a": 1} '


def test_contents_of_parts_become_text_or_stay_as_the_template_takes_them() -> None:
    parts = [{"type": "text", "text": "w1"}, {"text": "w2"}, "w3", {"type": "input_text", "text": "w4"}]
    record = {"messages": [{"role": "user", "content": parts}]}
    assert shown(record) == "user w1\nw2\nw3\nw4 "
    both = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    assert shown(record, both) == "w1w2w3w4"
    only = "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}"
    assert shown(record, only) == "w1;w2;w3;w4;"
    assert shown({"messages": ASKED}, only) == "w1;w2;"
    tool = {"messages": [{"role": "tool", "content": {"degrees": 20}}]}
    assert shown(tool) == 'tool {"degrees": 20} '


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "holds 'image' in message 0, and text alone",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "holds 'input_audio' in message 0"),
        ({"conversations": [{"from": "human", "value": "<image> w1"}], "images": ["a.png"]}, "holds images beside"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]},
            "a part of type 'tool_use' in message 0",
        ),
        ({"messages": [{"content": "w1"}]}, "has no role in message 0; its keys: content"),
        ({"messages": [{"role": "assistant"}]}, "has neither content nor tool calls in message 0"),
        ({"messages": [{"role": "user", "content": 5}]}, "holds a int as content of message 0, and not text"),
        ({"messages": ["w1"]}, "has a str as message 0"),
        ({"messages": "w1"}, "holds text in 'messages' that is not JSON"),
        ({"messages": 5}, r"must have 'text' \(a string\) or 'messages' \(a list\); its 'messages' is a int"),
        ({"messages": ASKED, "tools": "{"}, "holds text in 'tools' that is not JSON"),
        ({"messages": ASKED, "tools": [5]}, "holds tools that are no list of objects"),
        ({"prompt": 5, "completion": "w2"}, "holds a int in 'prompt', and not text or messages"),
        ({"a\x1b": 5}, r"its keys: a\\x1b"),
    ],
)
def test_records_that_hold_something_else_are_named_or_left_out(record: dict[str, Any], message: str) -> None:
    tokenizer = with_template(PLAIN)
    with pytest.raises(RequestError, match=f"^record 1 .*{message}") as error:
        CalibrationSet.build([{"text": "w1 w2"}, record], tokenizer)
    assert "skip_bad=True" in str(error.value) and "\n" not in str(error.value)
    samples = CalibrationSet.build([{"text": "w1 w2"}, record], tokenizer, skip_bad=True)
    assert (len(samples), samples.counts.bad) == (1, 1)
    assert samples.notes()[0].startswith("1 of 2 records is left out as unusable; the first: record 1 ")


def test_a_template_that_raises_is_named_with_the_record(caplog: pytest.LogCaptureFixture) -> None:
    alternate = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must\nalternate') }}{% endif %}" + PLAIN
    good = [{"messages": [{"role": "user", "content": f"w{i}"}]} for i in range(8)]
    bad = [{"messages": [{"role": "assistant", "content": f"w{i}"}]} for i in range(3)]
    records = [bad[0], *good[:3], *bad[1:], *good[3:]]
    tokenizer = with_template(alternate)
    for options in ({}, {"num_samples": 4}):
        with pytest.raises(RequestError, match=r"record 0 does not suit the chat template: roles must alternate\. To"):
            CalibrationSet.build(records, tokenizer, **options)
    caplog.clear()
    samples = CalibrationSet.build(records, tokenizer, num_samples=4, skip_bad=True)
    assert len(samples) == 4 and samples.counts.bad == 3  # the next ones take their places
    assert [r.message for r in caplog.records] == [
        "3 of 11 records are left out as unusable; the first: record 0 does not suit the chat template: roles must "
        "alternate."
    ]


def test_arguments_of_the_template() -> None:
    thinks = "{% if enable_thinking %}w9 {% endif %}" + PLAIN
    assert shown({"messages": ASKED}, thinks, enable_thinking=True).startswith("w9 user")
    tokenizer = with_template(thinks)
    records = [{"messages": ASKED}]
    without = CalibrationSet.build(records, tokenizer, template_args={"enable_thinking": False})
    assert without.fingerprint == CalibrationSet.build(records, tokenizer).fingerprint
    thinking = CalibrationSet.build(records, tokenizer, template_args={"enable_thinking": True, "typo": 1})
    assert thinking.fingerprint != without.fingerprint
    assert thinking.notes() == ("The chat template does not mention typo, which had no effect.",)
    texts = CalibrationSet.build(["w1 w2"], tokenizer, template_args={"enable_thinking": True})
    assert texts.notes() == ("No sample went through a chat template: enable_thinking had no effect.",)
    with pytest.raises(RequestError, match="template_args: 'tokenize' is no argument of a chat template"):
        CalibrationSet.build(records, tokenizer, template_args={"tokenize": False})
    tools = CalibrationSet.build([{"messages": ASKED, "tools": [WEATHER]}], tokenizer)
    assert tools.notes() == ("The chat template has no place for tools: those of 1 samples are not in them.",)


def test_the_same_tokens_as_the_template_gives_alone() -> None:
    tokenizer = with_template("{{ bos_token }} " + PLAIN)
    expected = tokenizer.apply_chat_template(ASKED, tokenize=True, return_dict=True)["input_ids"]
    assert CalibrationSet.build([{"messages": ASKED}], tokenizer).token_ids[0].tolist() == expected


def test_rows_of_datasets_lack_what_other_rows_objects_have() -> None:
    rows = [
        {"messages": [{"role": "user", "content": "w1", "tool_calls": None}], "tools": None},
        {
            "messages": [
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
            ],
            "tools": [{"name": "f", "parameters": {"city": None, "street": {"type": "string"}}}],
        },
    ]
    template = "{% for m in messages %}{{ 'w5 ' if 'tool_calls' in m else 'w6 ' }}{% endfor %}w7 w8"
    template += "{% for t in tools or [] %} w{{ t.function.parameters | length }}{% endfor %}"
    samples = CalibrationSet.build(datasets.Dataset.from_list(rows), with_template(template))
    assert sorted(ids.tolist() for ids in samples.token_ids) == [[8, 10, 11, 4], [9, 10, 11]]
    with pytest.raises(RequestError, match=r"a dataset of several splits; pass one \(train\)"):
        CalibrationSet.build(datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}), make_tokenizer())


def test_what_needs_a_tokenizer(samples: CalibrationSet) -> None:
    assert needs_tokenizer(["w1"]) and needs_tokenizer("a.txt") and not needs_tokenizer(samples)
    assert not needs_tokenizer(samples.token_ids[0]) and not needs_tokenizer(list(samples.token_ids))
    assert messages_of([{"role": "user", "content": None}]) == [{"role": "user", "content": ""}]


def test_a_content_that_is_missing_is_never_written_as_none() -> None:
    class Plain:
        """Renders as transformers did before it dropped what is None."""

        def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
            return " ".join(f"{m['role']}:{m['content']}" for m in messages)

    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert Template(Plain(), {}).text(Chat([call])) == "assistant:"
