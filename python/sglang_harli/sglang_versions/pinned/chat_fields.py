"""What a request's messages and tools may hold, and what a template gets of them, on SGLang 0.5.16.

Pure: the finetune service, which does not import sglang, reads it too.
"""

from __future__ import annotations

from typing import Any

FORM = ""  # in a tokenizer's fingerprint: rows of another form may have other ids
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "latest_reminder")
# Of a message that is not the user's, as serving's model dumps them.
FIELDS = ("role", "content", "tool_call_id", "name", "reasoning_content", "tool_calls", "tools")
PHASES: tuple[str, ...] = ()
NULL_STRICT = False  # whether a tool's ``strict`` may be null


def described(function: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A tool's function as the template gets it: by the model's fields, ``strict`` false by
    default.

    Args:
        function: all fields, None where one is absent; given: the function as the client sent it.
    """
    order = ("description", "name", "parameters", "strict", "defer_loading")
    made = {name: function[name] for name in order}
    made["strict"] = bool(made["strict"])
    if made["defer_loading"] is None:
        del made["defer_loading"]
    return made
