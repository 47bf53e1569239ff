"""A conversation as serving reads it from a request, and what of it reaches the chat template.

Follows SGLang without importing it (test/sglang/test_rows_as_served.py compares): the models
ChatCompletionMessageGenericParam, ChatCompletionMessageUserParam, ToolCall and Tool of
``openai/protocol.py``, ``OpenAIServingChat._validate_request`` and ``_apply_jinja_template``, and
``jinja_template_utils.process_content_for_template_format``.  Where its versions differ:
sglang_versions' chat_fields.
"""

from __future__ import annotations

from typing import Any

import orjson

from sglang_harli.service.rows import schema_types
from sglang_harli.service.rows.error import RowError, kind
from sglang_harli.sglang_versions.current import chat_fields

USER_FIELDS = ("role", "content")
TOOL_FIELDS = ("type", "function", "defer_loading")
FUNCTION_FIELDS = ("description", "name", "parameters", "strict", "defer_loading")
_MEDIA = ("image_url", "video_url", "audio_url", "input_image", "input_audio", "image", "video", "audio")
_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")


# ------------------------------------------------------------------ messages
def read_messages(raw: Any) -> list[dict[str, Any]]:
    """The messages as serving's request model dumps them: known fields, null where one is absent.
    Raises RowError: the message (counted from 1), the field and what is accepted."""
    if not isinstance(raw, list) or not raw:
        raise RowError("field 'messages' must be a list of at least one message", "messages")
    return [_message(message, f"message {number}") for number, message in enumerate(raw, 1)]


def _message(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RowError(f"{where} must be an object, it is {kind(raw)}", "messages")
    role = _role(raw.get("role"), where)
    content = _content(raw, role, where)
    if role == "user":
        return {"role": role, "content": content}
    calls = _items(raw.get("tool_calls"), where, "tool_calls")
    tools = _items(raw.get("tools"), where, "tools")
    if tools:  # serving takes another form here than beside the messages
        raise RowError(f"{where}: field 'tools' is not accepted here: give it beside 'messages'", "messages")
    read = {
        "role": role,
        "content": content,
        "tool_call_id": _text(raw.get("tool_call_id"), where, "tool_call_id"),
        "name": _text(raw.get("name"), where, "name"),
        "reasoning_content": _text(raw.get("reasoning_content"), where, "reasoning_content"),
        "tool_calls": calls and [_call(c, role, f"{where}: tool_calls[{i}]") for i, c in enumerate(calls)],
        "tools": tools,
    }
    if "phase" in chat_fields.FIELDS:
        read["phase"] = _phase(raw.get("phase"), where)
    if "prefix" in chat_fields.FIELDS:
        read["prefix"] = _boolean(raw.get("prefix"), where, "prefix", "messages")
    return {name: read[name] for name in chat_fields.FIELDS}


def _phase(phase: Any, where: str) -> str | None:
    if phase is None or phase in chat_fields.PHASES:
        return phase
    accepted = ", ".join(chat_fields.PHASES)
    raise RowError(f"{where}: field 'phase' is {phase!r}; accepted: {accepted}", "messages")


def _role(role: Any, where: str) -> str:
    if role == "user":
        return role
    if isinstance(role, str) and role.lower() in chat_fields.ROLES and role.lower() != "user":
        return role.lower()
    problem = "is missing" if role is None else f"is {role!r}"
    accepted = ", ".join(chat_fields.ROLES)
    raise RowError(f"{where}: field 'role' {problem}; accepted: {accepted}", "messages")


def _content(raw: dict[str, Any], role: str, where: str) -> str | list[dict[str, Any]] | None:
    content = raw.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if role == "user":
            problem = "is null" if "content" in raw else "is missing"
            raise RowError(f"{where}: field 'content' {problem}", "messages")
        return None
    if not isinstance(content, list):
        problem = f"must be a string or a list of text parts, it is {kind(content)}"
        raise RowError(f"{where}: field 'content' {problem}", "messages")
    return [_part(part, role, f"{where}: content[{i}]") for i, part in enumerate(content)]


def _part(raw: Any, role: str, where: str) -> dict[str, Any]:
    """A part of a content, as serving's models of parts dump it."""
    if not isinstance(raw, dict):
        problem = f"must be an object such as {{'type': 'text', 'text': ...}}, it is {kind(raw)}"
        raise RowError(f"{where} {problem}", "messages")
    type_ = raw.get("type")
    if type_ == "text":
        return {"type": "text", "text": _needed_text(raw, "text", where)}
    if type_ in ("thinking", "reasoning"):
        if role != "assistant":
            raise RowError(
                f"{where}: a part of type {type_!r} is accepted of the assistant alone", "messages"
            )
        thinking, text = _text(raw.get("thinking"), where, "thinking"), _text(raw.get("text"), where, "text")
        if (thinking is None) == (text is None):
            raise RowError(f"{where}: a part of type {type_!r} has either 'thinking' or 'text'", "messages")
        return {"type": type_, "thinking": thinking, "text": text}
    if type_ == "tool_reference":
        return {"type": type_, "name": _needed_text(raw, "name", where)}
    if type_ in _MEDIA:
        raise RowError(f"{where}: a part of type {type_!r} cannot be trained on: text alone can", "messages")
    accepted = "accepted: text, thinking, reasoning, tool_reference"
    raise RowError(f"{where}: field 'type' is {type_!r}; {accepted}", "messages")


def _call(raw: Any, role: str, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RowError(f"{where} must be an object, it is {kind(raw)}", "messages")
    if raw.get("type", "function") != "function":
        raise RowError(f"{where}: field 'type' is {raw['type']!r}; accepted: function", "messages")
    function = raw.get("function")
    if not isinstance(function, dict):
        problem = "is missing" if "function" not in raw else f"must be an object, it is {kind(function)}"
        raise RowError(f"{where}: field 'function' {problem}", "messages")
    arguments = function.get("arguments")
    at = f"{where}.function"
    if arguments is not None and not isinstance(arguments, str | dict):
        problem = f"must be an object or its JSON text, it is {kind(arguments)}"
        raise RowError(f"{at}: field 'arguments' {problem}", "messages")
    if isinstance(arguments, str) and role == "assistant":
        arguments = _parsed(arguments, at)
    return {
        "id": _text(raw.get("id"), where, "id"),
        "index": _integer(raw.get("index"), where, "index"),
        "type": "function",
        "function": {"name": _text(function.get("name"), at, "name"), "arguments": arguments},
    }


def _parsed(arguments: str, where: str) -> dict[str, Any]:
    """Arguments that came as text, as the object that the template gets."""
    try:
        parsed = orjson.loads(arguments)
    except orjson.JSONDecodeError as error:
        text = f"{where}: field 'arguments' is not JSON ({error.msg}): {arguments[:60]!r}"
        raise RowError(text, "messages") from error
    if not isinstance(parsed, dict):
        problem = f"must be the JSON text of an object, it is that of {kind(parsed)}"
        raise RowError(f"{where}: field 'arguments' {problem}", "messages")
    return parsed


# ------------------------------------------------------------------ tools
def read_tools(raw: Any) -> list[dict[str, Any]] | None:
    """The tools as the template gets them, None: no tools; RowError where serving answers 400."""
    if raw is not None and not isinstance(raw, list):
        raise RowError(f"field 'tools' must be a list, it is {kind(raw)}", "tools")
    if not raw:
        return None
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(raw)]
    for i, tool in enumerate(tools):
        function = tool["function"]
        if function["parameters"] is not None:
            function["parameters"] = schema_types.checked(
                function["parameters"], f"tools[{i}].function: field 'parameters'"
            )
    return tools


def _tool(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RowError(f"{where} must be an object, it is {kind(raw)}", "tools")
    function = raw.get("function")
    if not isinstance(function, dict):
        problem = "is missing" if "function" not in raw else f"must be an object, it is {kind(function)}"
        form = '{"type": "function", "function": {"name": ...}}'
        raise RowError(f"{where}: field 'function' {problem}; a tool has the form {form}", "tools")
    type_ = raw.get("type", "function")
    if not isinstance(type_, str):
        raise RowError(f"{where}: field 'type' must be a string, it is {kind(type_)}", "tools")
    at = f"{where}.function"
    deferred = _boolean(raw.get("defer_loading"), where, "defer_loading")
    own = _boolean(function.get("defer_loading"), at, "defer_loading")
    own = deferred if own is None else own
    strict = _boolean(function.get("strict"), at, "strict")
    if strict is None and "strict" in function and not chat_fields.NULL_STRICT:
        raise RowError(f"{at}: field 'strict' is null; accepted: true, false", "tools")
    read: dict[str, Any] = {
        "description": _text(function.get("description"), at, "description", "tools"),
        "name": _needed_text(function, "name", at, "tools"),
        "parameters": function.get("parameters"),
        "strict": strict,
        "defer_loading": own,
    }
    described = chat_fields.described(read, function)
    return {"type": type_, "function": described, "defer_loading": deferred}


# ------------------------------------------------------------------ what the template gets
def for_template(message: dict[str, Any], content_format: str) -> dict[str, Any]:
    """A read message as the template gets it: nulls left out, an absent content empty, parts joined
    or kept by ``content_format``."""
    content = "" if message["content"] is None else message["content"]
    kept = {name: value for name, value in message.items() if value is not None}
    kept["content"] = content
    if isinstance(content, str):
        return {name: kept[name] for name in message if name in kept}
    texts = [part["text"] for part in content if part["type"] == "text"]
    if content_format == "string":
        kept["content"] = " ".join(texts)
        return kept
    del kept["content"]  # it goes to the end, as there
    kept["content"] = [part for part in content if part["type"] in ("text", "tool_reference")]
    if message["role"] == "tool" and len(texts) == len(kept["content"]):
        kept["content"] = " ".join(texts)
    return kept


def text_of(message: dict[str, Any]) -> str:
    """The text of a read message's content."""
    content = message["content"] or ""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def unknown_fields(message: dict[str, Any]) -> set[str]:
    """Keys of a raw message that serving drops; one that is null says nothing."""
    known = USER_FIELDS if message.get("role") == "user" else chat_fields.FIELDS
    return {key for key, value in message.items() if value is not None and key not in known}


def unknown_tool_fields(tools: list[Any]) -> set[str]:
    """Keys of raw tools that serving drops."""
    found: set[str] = set()
    for tool in tools:
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
            for given, known in ((tool, TOOL_FIELDS), (tool["function"], FUNCTION_FIELDS)):
                found |= {key for key, value in given.items() if value is not None and key not in known}
    return found


# ------------------------------------------------------------------ values
def _text(value: Any, where: str, field: str, about: str = "messages") -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise RowError(f"{where}: field '{field}' must be a string, it is {kind(value)}", about)


def _needed_text(raw: dict[str, Any], field: str, where: str, about: str = "messages") -> str:
    value = _text(raw.get(field), where, field, about)
    if value is None:
        problem = "is null" if field in raw else "is missing"
        raise RowError(f"{where}: field '{field}' {problem}", about)
    return value


def _items(value: Any, where: str, field: str) -> list[Any] | None:
    if value is None or isinstance(value, list):
        return value
    raise RowError(f"{where}: field '{field}' must be a list, it is {kind(value)}", "messages")


def _integer(value: Any, where: str, field: str) -> int | None:
    if value is None or isinstance(value, int):
        return None if value is None else int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().isdecimal():
        try:
            return int(value)
        except ValueError as error:  # over 4,300 digits: neither Python nor serving reads it
            problem = f"must be an integer, it is a text of {len(value.strip())} digits"
            raise RowError(f"{where}: field '{field}' {problem}", "messages") from error
    raise RowError(f"{where}: field '{field}' must be an integer, it is {value!r}", "messages")


def _boolean(value: Any, where: str, field: str, about: str = "tools") -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise RowError(f"{where}: field '{field}' is {value!r}; accepted: true, false", about)
