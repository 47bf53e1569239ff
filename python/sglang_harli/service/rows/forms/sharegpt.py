"""ShareGPT's rows as conversations: turns with ``from`` and ``value``, and a system text and tools
beside them, as LLaMA-Factory has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from sglang_harli.service.rows.error import RowError, kind

READ_AS = "turns of human as the user's messages, of gpt and function_call as answers, of observation as tools' results"
CALL = "function_call"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    CALL: "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
_READ = ("from", "value", "weight")


def messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Raises RowError: a turn (counted from 1) or the system text is not accepted."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        problem = f"it is {kind(turns)}" if turns != [] else "it is empty"
        raise RowError(f"field 'conversations' must be a list of turns, {problem}", "conversations")
    made = list(_system(record.get("system"), turns[0]))
    made += [_message(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]
    if made[-1]["role"] != "assistant":
        raise RowError(
            f"the last turn is of {turns[-1]['from']!r}: it must be of 'gpt' or '{CALL}'", "conversations"
        )
    return made


def _system(text: Any, first: Any) -> Iterator[dict[str, Any]]:
    if text is None or text == "":
        return
    if not isinstance(text, str):
        raise RowError(f"field 'system' must be a string, it is {kind(text)}", "system")
    if isinstance(first, dict) and first.get("from") == "system":
        raise RowError("field 'system' and the first turn are both a system text: give one", "system")
    yield {"role": "system", "content": text}


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"{where} must be an object, it is {kind(turn)}", "conversations")
    who, value = turn.get("from"), turn.get("value")
    if not isinstance(who, str) or who not in ROLES:
        problem = "is missing" if who is None else f"is {who!r}"
        raise RowError(f"{where}: field 'from' {problem}; accepted: {', '.join(ROLES)}", "conversations")
    if not isinstance(value, str):
        problem = "is missing" if value is None else f"must be a string, it is {kind(value)}"
        raise RowError(f"{where}: field 'value' {problem}", "conversations")
    made: dict[str, Any] = {"role": ROLES[who], "content": value}
    if who == CALL:
        made |= {"content": None, "tool_calls": _calls(value, where)}
    elif ROLES[who] == "assistant" and not value:
        raise RowError(f"{where}: field 'value' is empty: there is nothing to learn", "conversations")
    if turn.get("weight") is not None:
        made["weight"] = turn["weight"]
    return made


def _calls(text: str, where: str) -> list[dict[str, Any]]:
    """The calls in a turn's text: a JSON object with name and arguments, or a list of them."""
    form = '{"name": ..., "arguments": {...}}, or a list of them'
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowError(
            f"{where}: its call is not JSON ({error.msg}): write {form}", "conversations"
        ) from error
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise RowError(f"{where}: a call has no name or no arguments: write {form}", "conversations")
    if not calls:
        raise RowError(f"{where}: its list of calls is empty: write {form}", "conversations")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in calls
    ]


def tools(raw: Any) -> Any:
    """A row's tools in OpenAI's form: from JSON text or a list, each tool with or without its
    ``type`` around it.  What is no list of objects is returned as it is; raises RowError."""
    if isinstance(raw, str):
        if not raw.strip():
            return None
        try:
            raw = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise RowError(
                f"field 'tools' is not JSON ({error.msg}): write a list of tools", "tools"
            ) from error
    if not isinstance(raw, list):
        return raw
    return [
        {"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
        for tool in raw
    ]


def unknown_fields(turns: list[dict[str, Any]]) -> set[str]:
    """Keys of turns that are not read; one that is null says nothing."""
    return {key for turn in turns for key, value in turn.items() if value is not None and key not in _READ}
