"""What a request's messages and tools may hold, and what a template gets of them, on SGLang 0.5.23.

Pure: the finetune service, which does not import sglang, reads it too.
"""

from __future__ import annotations

from typing import Any

FORM = "0.5.23"  # in a tokenizer's fingerprint: rows of another form may have other ids
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "latest_reminder", "root")
# Of a message that is not the user's, as serving's model dumps them.
FIELDS = (
    *("role", "content", "tool_call_id", "name", "phase", "reasoning_content", "tool_calls", "tools"),
    "prefix",
)
PHASES = ("commentary", "final_answer")
NULL_STRICT = True  # whether a tool's ``strict`` may be null


def described(function: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A tool's function as the template gets it: in the client's order, fields that it left out
    behind, without ``strict`` where that is not said.

    Args:
        function: all fields, None where one is absent; given: the function as the client sent it.
    """
    order = ("description", "name", "parameters", "strict", "defer_loading")
    left_out = {name for name in ("strict", "defer_loading") if function[name] is None}
    shown = [name for name in order if name not in left_out]
    first = [name for name in given if name in shown]
    return {name: function[name] for name in (*first, *(name for name in shown if name not in first))}
