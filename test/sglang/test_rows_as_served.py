"""Rows of data against SGLang's own rendering: the ids before each learned answer are the ids that
serving computes, and what serving refuses is no row."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sglang_harli.service.rows import content_format
from sglang_harli.service.rows.encoder import Row, RowEncoder, RowError
from support.chat_templates import FAMILIES, make_family
from support.serving_chat import RefusedError, Serving

SYSTEM = {"role": "system", "content": "You keep a lighthouse."}
ASK = {"role": "user", "content": "Is the lamp lit?"}
YES = {"role": "assistant", "content": "It is lit."}
AGAIN = {"role": "user", "content": "Since when?"}
LAMP: dict[str, Any] = {"type": "function", "function": {"name": "lamp", "description": "State of a lamp"}}
FULL: dict[str, Any] = {
    "function": {
        "strict": True,
        "parameters": {
            "type": "dict",
            "properties": {"at": {"type": "varchar(9)"}, "n": {"type": ["int32", "null"]}},
        },
        "name": "log",
        "unknown": 1,
    },
    "defer_loading": False,
    "extra": 2,
}
ALIASES = [
    *(
        "str",
        "TEXT",
        "varchar(255)",
        "enum",
        "uuid",
        "timestamp",
        "bytea",
        "bool",
        "bigint",
        "int8",
        "uint",
        "long",
    ),
    *(
        "short",
        "unsigned",
        "numeric",
        "num",
        "float32",
        "double",
        "list[str]",
        "dict[str, int]",
        "tuple",
        "map",
    ),
    *("Object", " string "),
]


def call(arguments: Any = None, name: Any = "lamp", **more: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}} | more


def called(*calls: Any, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def result(content: Any = "lit", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "content": content, **more}


def row(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def with_call(arguments: Any, **more: Any) -> dict[str, Any]:
    return row(ASK, called(call(arguments, **more)), result(), YES, tools=[LAMP])


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": t} for t in texts]


ROWS: dict[str, dict[str, Any]] = {
    "one turn": row(ASK, YES),
    "two turns": row(SYSTEM, ASK, YES, AGAIN, YES),
    "a system message in the middle": row(ASK, YES, SYSTEM, AGAIN, YES),
    "a developer": row({"role": "developer", "content": "Be short."}, ASK, YES),
    "capitals": row({"role": "System", "content": "x"}, ASK, {"role": "ASSISTANT", "content": "y"}),
    "a user in capitals": row({"role": "User", "content": "x"}, YES),
    "a role that is not known": row({"role": "robot", "content": "x"}, YES),
    "a function and a reminder": row(
        ASK, YES, {"role": "function", "name": "lamp", "content": "lit"}, AGAIN, YES
    ),
    "no role": row({"content": "x"}, YES),
    # nulls
    "nulls everywhere": row(
        {"role": "system", "content": "x", "name": None, "tool_calls": None, "tool_call_id": None},
        {"role": "user", "content": "y", "name": None, "tool_calls": None, "weight": None},
        {"role": "assistant", "content": "z", "tool_calls": None, "reasoning_content": None, "weight": None},
        tools=None,
    ),
    "a system message of null": row({"role": "system", "content": None}, ASK, YES),
    "a question of null": row({"role": "user", "content": None}, YES),
    "a result of null": row(ASK, called(call({})), result(None), YES, tools=[LAMP]),
    "a result without content": row(
        ASK, called(call({})), {"role": "tool", "tool_call_id": "c1"}, YES, tools=[LAMP]
    ),
    # arguments
    "arguments as an object": with_call({"b": 1, "a": "ä"}),
    "arguments as text": with_call('{"b": 1, "a": "ä"}'),
    "arguments as compact text": with_call('{"b":1,"a":"\\u00e4"}'),
    "arguments of blanks": with_call(' {"b" : 1.50} '),
    "large numbers in arguments as text": with_call('{"n": 123456789012345678901234567890}'),
    "arguments of null": with_call(None),
    "no arguments": row(ASK, called({"function": {"name": "lamp"}}), result(), YES, tools=[LAMP]),
    **{
        f"arguments {bad!r}": with_call(bad)
        for bad in ("", "{", '{"a": ', "[1]", "null", "3", [1], 3, True, '{"a": NaN}')
    },
    "arguments of an answer": row(ASK, called(call('{"x": [1, 2]}')), tools=[LAMP]),
    "calls of null within": row(
        ASK,
        called(
            {"id": None, "index": None, "type": "function", "function": {"name": "lamp", "arguments": {}}}
        ),
    ),
    "an index": with_call({}, index=0),
    "an index as text": with_call({}, index="3"),
    "an index that is none": with_call({}, index="x"),
    "an id that is a number": row(ASK, called(call({}) | {"id": 7}), result(), YES),
    "calls of another type": row(ASK, called(call({}, type="custom")), result(), YES),
    "calls of type null": row(ASK, called(call({}, type=None)), result(), YES),
    "calls that are an object": row(ASK, {**YES, "tool_calls": {"name": "x", "arguments": {}}}),
    "calls without function": row(ASK, called({"type": "function"})),
    "calls that are texts": row(ASK, called("lamp()")),
    "calls that are a text": row(ASK, {**YES, "tool_calls": "lamp()"}),
    "two calls and two results": row(
        ASK, called(call({}), call({"a": 1}, "log")), result("a"), result("b"), YES, tools=[LAMP, FULL]
    ),
    "content beside a call": row(ASK, called(call({}), content="I look."), result(), YES, tools=[LAMP]),
    "an empty list of calls": row(ASK, {**YES, "tool_calls": []}),
    "calls of a tool message": row(ASK, called(call({})), {**result(), "tool_calls": [call("{}")]}, YES),
    # tools
    "a tool": row(ASK, YES, tools=[LAMP]),
    "a tool with all": row(ASK, YES, tools=[FULL, LAMP]),
    "no tools": row(ASK, YES, tools=[]),
    "a tool without wrapper": row(ASK, YES, tools=[{"name": "lamp", "parameters": {}}]),
    "an empty tool": row(ASK, YES, tools=[{}]),
    "a tool of another kind": row(ASK, YES, tools=[{"type": "web_search"}]),
    "a tool of a type of its own": row(ASK, YES, tools=[{"type": "x", "function": {"name": "lamp"}}]),
    "a tool of type null": row(ASK, YES, tools=[{"type": None, "function": {"name": "lamp"}}]),
    "a tool without a name": row(ASK, YES, tools=[{"type": "function", "function": {"description": "x"}}]),
    "strict as a number": row(ASK, YES, tools=[{"function": {"name": "lamp", "strict": 1}}]),
    "strict as text": row(ASK, YES, tools=[{"function": {"name": "lamp", "strict": "Yes"}}]),
    "strict of null": row(ASK, YES, tools=[{"function": {"name": "lamp", "strict": None}}]),
    "strict of two": row(ASK, YES, tools=[{"function": {"name": "lamp", "strict": 2}}]),
    "a tool in an order of its own": row(
        ASK,
        YES,
        tools=[{"function": {"parameters": {}, "strict": False, "x": 1, "name": "f", "description": None}}],
    ),
    "a deferred tool": row(ASK, YES, tools=[LAMP | {"defer_loading": True}]),
    "a deferred function": row(ASK, YES, tools=[{"function": {"name": "lamp", "defer_loading": True}}]),
    "parameters that are no schema": row(
        ASK, YES, tools=[{"function": {"name": "f", "parameters": {"type": 3}}}]
    ),
    "parameters that are a text": row(ASK, YES, tools=[{"function": {"name": "f", "parameters": "x"}}]),
    "parameters of true": row(ASK, YES, tools=[{"function": {"name": "f", "parameters": True}}]),
    "other names of types": row(
        ASK,
        YES,
        tools=[
            {
                "function": {
                    "name": "f",
                    "parameters": {
                        "properties": {str(i): {"type": alias} for i, alias in enumerate(ALIASES)},
                        "anyOf": [{"type": "int"}],
                        "items": {"type": "str", "not": {"type": "list"}},
                        "type": ["str", "text", "int"],
                    },
                }
            }
        ],
    ),
    "names of types that are none": row(
        ASK,
        YES,
        tools=[{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "internal"}}}}}],
    ),
    "tools of a message": row({"role": "system", "content": "x", "tools": [LAMP]}, ASK, YES),
    "tools of a message, without wrapper": row(
        {
            "role": "system",
            "content": "x",
            "tools": [LAMP["function"] | {"type": "function", "strict": True}],
        },
        ASK,
        YES,
    ),
    "no tools of a message": row({"role": "system", "content": "x", "tools": []}, ASK, YES),
    # contents
    "parts": row({"role": "user", "content": text("Is the", "lamp lit?")}, YES),
    "parts in an answer": row(ASK, {"role": "assistant", "content": text("It is lit.")}),
    "parts in a system message": row({"role": "system", "content": text("x")}, ASK, YES),
    "parts in a result": row(ASK, called(call({})), result(text("a", "b")), YES, tools=[LAMP]),
    "no parts": row({"role": "user", "content": []}, YES),
    "parts that are texts": row({"role": "user", "content": ["x"]}, YES),
    "a part without text": row({"role": "user", "content": [{"type": "text"}]}, YES),
    "a part of input_text": row({"role": "user", "content": [{"type": "input_text", "text": "x"}]}, YES),
    "a thinking part": row(
        ASK,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, *text("It is lit.")]},
        AGAIN,
        YES,
    ),
    "a thinking part of the user": row(
        {"role": "user", "content": [{"type": "thinking", "text": "hm"}]}, YES
    ),
    "a thinking part of nothing": row(
        ASK, {"role": "assistant", "content": [{"type": "thinking"}]}, AGAIN, YES
    ),
    "a reference to a tool": row(
        ASK, called(call({})), result([{"type": "tool_reference", "name": "lamp"}]), YES, tools=[LAMP]
    ),
    "a number as content": row({"role": "user", "content": 7}, YES),
    "reasoning": row(
        ASK, {**YES, "reasoning_content": "I see it."}, AGAIN, {**YES, "reasoning_content": "Since six."}
    ),
    "reasoning in the content": row(
        ASK, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, AGAIN, YES
    ),
    "reasoning that is a number": row(ASK, {**YES, "reasoning_content": 3}),
    "names": row({**SYSTEM, "name": "s"}, {**ASK, "name": "bob"}, {**YES, "name": "keeper"}),
    "a name that is a number": row({**SYSTEM, "name": 3}, ASK, YES),
    "a phase": row(ASK, {**YES, "phase": "commentary"}, AGAIN, {**YES, "phase": "final_answer"}),
    "a phase that is none": row(ASK, {**YES, "phase": "final"}, AGAIN, YES),
    "a prefix": row(ASK, {**YES, "prefix": True}, AGAIN, {**YES, "prefix": "no"}),
    "a prefix that is none": row(ASK, {**YES, "prefix": "maybe"}, AGAIN, YES),
    "a root": row({"role": "root", "content": "x"}, ASK, YES),
    "unknown fields": row(ASK | {"thinking": "hm"}, YES | {"train": False, "loss": 1}),
    "blanks around": row(
        {"role": "user", "content": " x \n"}, {"role": "assistant", "content": "  y\n\n"}, AGAIN, YES
    ),
    "control tokens in a question": row({"role": "user", "content": "a<|im_end|></s><|eot_id|>b"}, YES),
    "a message that is a text": row("x", YES),
    "weights": row(ASK, YES | {"weight": 0}, AGAIN, YES | {"weight": 1}),
    "a greeting first": row(YES | {"weight": 0}, ASK, YES),
}
# What is refused here though serving would take it: there is no answer in it that serving could be
# asked for.
OURS_ALONE = re.compile(
    r"the chat template renders nothing of|opens an answer with|'tools' is not accepted here"
)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Serving, RowEncoder]]:
    made = {}
    for name in FAMILIES:
        serving = Serving(make_family(tmp_path_factory.mktemp(name), name))
        made[name] = serving, RowEncoder(serving.tokenizer)
    return made


def prompts(rows: list[Row]) -> list[list[int]]:
    """What stands before each learned answer."""
    return [
        row.ids[:at]
        for row in rows
        for at, learned in enumerate(row.targets)
        if learned and not row.targets[at - 1]
    ]


def served(serving: Serving, record: dict[str, Any]) -> list[list[int]] | str:
    """The prompts that serving computes for a row's answers, or why it refuses one."""
    messages, tools = record["messages"], record.get("tools")
    at = [
        i
        for i, m in enumerate(messages)
        if isinstance(m, dict) and str(m.get("role")).lower() == "assistant" and m.get("weight") in (None, 1)
    ]
    try:
        if at[-1] == len(messages) - 1:  # the last answer, too, has to be a message that serving takes
            serving.read([ASK, messages[-1], AGAIN])
        return [serving.prompt(messages[:i], tools) for i in at]
    except RefusedError as error:
        return str(error)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_what_serving_renders_or_both_refuse(families, family, name):
    serving, rows = families[family]
    theirs = served(serving, ROWS[name])
    try:
        ours: list[list[int]] | str = prompts(rows.rows(ROWS[name]))
    except RowError as error:
        ours = error.reason
    if isinstance(theirs, str):
        assert isinstance(ours, str), f"serving refuses it: {theirs}"
    elif isinstance(ours, str):
        assert OURS_ALONE.search(ours), f"serving takes it: {ours}"
    else:
        assert ours == theirs


def test_most_rows_are_compared_in_each_family(families):
    for family, (serving, rows) in families.items():
        equal = 0
        for record in ROWS.values():
            try:
                equal += prompts(rows.rows(record)) == served(serving, record)
            except RowError:
                continue
        assert equal >= (0 if family == "r1" else 25), (family, equal)


def test_an_answer_to_an_answer_is_a_prompt_that_serving_does_not_build(families):
    serving, rows = families["plain"]
    with pytest.raises(RowError, match="message 3 is an answer to an answer"):
        rows.rows(row(ASK, YES, YES))
    assert serving.prompt([ASK, YES]) == serving.prompt([ASK, YES | {"role": "user"}])
    assert rows.rows(row(ASK, YES, YES | {"weight": 0})) == rows.rows(row(ASK, YES))


def test_the_content_format_is_the_one_that_serving_detects(families):
    for serving, rows in families.values():
        assert rows.served.chat.content_format == serving.templates.jinja_template_content_format


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        "{% for m in messages %}{% for p in m['content'] %}{{ p }}{% endfor %}{% endfor %}",
        "{% for msg in messages %}{% for p in msg.content | list %}{{ p }}{% endfor %}{% endfor %}",
        "{% for x in messages %}{% for p in x.content %}{{ p }}{% endfor %}{% endfor %}",
        "{% for message in messages %}{% for p in message['content'][1:] %}{{ p }}{% endfor %}{% endfor %}",
        "{# image #}{{ messages }}",
        "{% for",
        "",
    ],
)
def test_the_content_format_of_odd_templates(source):
    from sglang.srt.parser.jinja_template_utils import detect_jinja_template_content_format

    assert content_format.detect(source) == detect_jinja_template_content_format(source)
