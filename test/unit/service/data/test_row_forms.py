"""Rows in Alpaca's and ShareGPT's forms are the conversations that they stand for; a file has one
form."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_harli.service.rows.encoder import RowEncoder, RowError
from support.chat_templates import make_family
from support.data_files import PAIR, B, lines_of, reasons, refusal, scan, tokenizer
from support.tokenizer import load_tokenizer

__all__ = ["scan", "tokenizer"]  # fixtures

TOOL = {"name": "lamp", "description": "Is it lit?", "parameters": {"type": "object", "properties": {}}}
OPENAI_TOOL = {"type": "function", "function": TOOL}


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


def turns(*said: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"from": who, "value": text} for who, text in said]


def call(name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory) -> RowEncoder:
    return RowEncoder(load_tokenizer(make_family(tmp_path_factory.mktemp("qwen3"), "qwen3")))


ALPACA = {"instruction": "Say it", "input": "in German", "output": "Gut"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (ALPACA, said(("user", "Say it\nin German"), ("assistant", "Gut"))),
        (ALPACA | {"input": "", "text": "all of it"}, said(("user", "Say it"), ("assistant", "Gut"))),
        (
            ALPACA | {"input": None, "system": None, "history": None},
            said(("user", "Say it"), ("assistant", "Gut")),
        ),
        (ALPACA | {"instruction": ""}, said(("user", "in German"), ("assistant", "Gut"))),
        (
            ALPACA | {"system": "Be short.", "history": [["a", "b"], ["c", "d"]]},
            said(
                *(
                    ("system", "Be short."),
                    ("user", "a"),
                    ("assistant", "b"),
                    ("user", "c"),
                    ("assistant", "d"),
                ),
                *(("user", "Say it\nin German"), ("assistant", "Gut")),
            ),
        ),
    ],
)
def test_alpaca(tokenizer, row, messages):
    assert tokenizer.rows(row) == tokenizer.rows({"messages": messages})


@pytest.mark.parametrize(
    ("row", "messages", "tools"),
    [
        (
            {"conversations": turns(("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d"))},
            said(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            None,
        ),
        (
            {"conversations": turns(("system", "s"), ("human", "a"), ("gpt", "b")), "system": ""},
            said(("system", "s"), ("user", "a"), ("assistant", "b")),
            None,
        ),
        (
            {
                "system": "s",
                "conversations": [
                    *turns(("human", "a")),
                    {"from": "gpt", "value": "b", "weight": 0},
                    *turns(("human", "c"), ("gpt", "d")),
                ],
            },
            [
                *said(("system", "s"), ("user", "a")),
                {"role": "assistant", "content": "b", "weight": 0},
                *said(("user", "c"), ("assistant", "d")),
            ],
            None,
        ),
        (
            {
                "conversations": turns(
                    ("human", "lit?"),
                    ("function_call", '{"name": "lamp", "arguments": {"at": 3}}'),
                    ("observation", "lit"),
                    ("gpt", "It is lit."),
                ),
                "tools": '[{"name": "lamp", "description": "Is it lit?", "parameters": {"type": "object", "properties": {}}}]',
            },
            [
                *said(("user", "lit?")),
                call("lamp", {"at": 3}),
                *said(("tool", "lit"), ("assistant", "It is lit.")),
            ],
            [OPENAI_TOOL],
        ),
        (
            {
                "conversations": turns(
                    ("human", "lit?"), ("function_call", '[{"name": "lamp", "arguments": "{}"}]')
                ),
                "tools": [OPENAI_TOOL],
            },
            [*said(("user", "lit?")), call("lamp", "{}")],
            [OPENAI_TOOL],
        ),
    ],
)
def test_sharegpt(with_tools, row, messages, tools):
    assert with_tools.rows(row) == with_tools.rows({"messages": messages, "tools": tools})


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        (ALPACA | {"output": ""}, "field 'output' is empty: there is nothing to learn", "output"),
        (ALPACA | {"output": None}, "field 'output' is null", "output"),
        (ALPACA | {"output": ["Gut"]}, "field 'output' must be a string, it is a list", "output"),
        (ALPACA | {"input": 3}, "field 'input' must be a string, it is a number", "input"),
        (
            ALPACA | {"input": "", "instruction": ""},
            "fields 'instruction' and 'input' are empty",
            "instruction",
        ),
        (ALPACA | {"history": "x"}, "field 'history' must be a list of pairs", "history"),
        (ALPACA | {"history": [["a"]]}, "field 'history[0]' is no pair of two texts", "history"),
        (ALPACA | {"history": [["a", ""]]}, "field 'history[0]' has an empty answer", "history"),
        (
            {"conversations": []},
            "field 'conversations' must be a list of turns, it is empty",
            "conversations",
        ),
        ({"conversations": ["a"]}, "turn 1 must be an object, it is a string", "conversations"),
        (
            {"conversations": turns(("robot", "a"))},
            "turn 1: field 'from' is 'robot'; accepted: human",
            "conversations",
        ),
        ({"conversations": [{"value": "a"}]}, "turn 1: field 'from' is missing", "conversations"),
        ({"conversations": [{"from": "human"}]}, "turn 1: field 'value' is missing", "conversations"),
        (
            {"conversations": [{"from": "human", "value": 3}]},
            "must be a string, it is a number",
            "conversations",
        ),
        (
            {"conversations": turns(("human", "a"))},
            "the last turn is of 'human': it must be of 'gpt'",
            "conversations",
        ),
        (
            {"conversations": turns(("human", "a"), ("gpt", ""))},
            "turn 2: field 'value' is empty",
            "conversations",
        ),
        ({"conversations": turns(("gpt", "a"))}, "the first message is an answer", "conversations"),
        (
            {"conversations": turns(("system", "a"), ("human", "b"), ("gpt", "c")), "system": "d"},
            "field 'system' and the first turn are both a system text",
            "system",
        ),
        (
            {"conversations": turns(("human", "a"), ("function_call", "x"))},
            "its call is not JSON",
            "conversations",
        ),
        (
            {"conversations": turns(("human", "a"), ("function_call", "[]"))},
            "its list of calls is empty",
            "conversations",
        ),
        (
            {"conversations": turns(("human", "a"), ("function_call", "{}"))},
            "a call has no name",
            "conversations",
        ),
        (
            {"conversations": turns(("human", "a"), ("gpt", "b")), "tools": "{x"},
            "field 'tools' is not JSON",
            "tools",
        ),
        (
            {"conversations": turns(("human", "a"), ("gpt", "b")), "tools": "{}"},
            "field 'tools' must be a list",
            "tools",
        ),
    ],
)
def test_reasons(tokenizer, row, reason, field):
    with pytest.raises(RowError) as caught:
        tokenizer.rows(row)
    assert reason in caught.value.reason and caught.value.field == field


# ------------------------------------------------------------------ a file
def test_the_form_is_said_with_what_is_learned(scan):
    summary, _ = scan(lines_of(ALPACA, ALPACA | {"id": 3}))
    assert (summary.format, summary.file_format, summary.ignored_fields) == ("alpaca", "jsonl", ["id"])
    assert (
        "format: alpaca (instruction and input as the user's message, output as the answer) in JSONL"
        in summary.text()
    )
    summary, _ = scan(
        lines_of({"conversations": [{"from": "human", "value": "a", "loss": 1}, *turns(("gpt", "b"))]})
    )
    assert summary.format == "sharegpt" and [note.names for note in summary.notes] == [["loss"]]


def test_fields_of_another_form_are_ignored_and_may_hold_anything(scan):
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "input": NaN}'
    assert scan(row)[0].ignored_fields == ["input"]
    assert reasons(scan, '{"instruction": "a", "input": NaN, "output": "b"}') == {
        1: "field 'input' is NaN, which JSON has not"
    }
    assert reasons(scan, '{"conversations": [{"from": "human", "value": "\\ud800"}]}') == {
        1: "turn 1: field 'value' holds half of a surrogate pair (\\ud800, character 1): write both halves or none"
    }


def test_a_file_that_mixes_forms_is_refused_with_the_first_row_that_differs(scan):
    error = refusal(scan, lines_of(PAIR) + "\n{}\n" + lines_of(PAIR, ALPACA, B))
    assert error.message == (
        "data.jsonl: it mixes formats: line 5 has the format alpaca, line 1 has prompt_completion; "
        "put rows of one format into one file"
    )
    assert [row["line"] for row in error.details] == [3]


def test_a_row_that_lacks_a_field_of_its_files_form_is_named_so(scan):
    found = reasons(scan, lines_of(ALPACA, {"instruction": "x"}, {"conversations": None}))
    assert found == {
        2: "field 'output' is missing: there is nothing to learn",
        3: "fields 'instruction' and 'input' are empty: there is no question",
    }
