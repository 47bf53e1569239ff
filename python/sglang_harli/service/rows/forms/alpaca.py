"""Alpaca's rows as conversations: instruction and input are the user's message, output the answer.

As LLaMA-Factory reads them: ``system`` and ``history`` (pairs of an instruction and its answer) may
be there, and the answers of the history are learned too.
"""

from __future__ import annotations

from typing import Any

from sglang_harli.service.rows.error import RowError, kind

READ_AS = "instruction and input as the user's message, output as the answer"


def messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Raises RowError: a field is missing or no text."""
    asked = [text for name in ("instruction", "input") if (text := _text(record, name))]
    if not asked:
        raise RowError("fields 'instruction' and 'input' are empty: there is no question", "instruction")
    output = _text(record, "output")
    if not output:
        problem = "is empty" if output == "" else "is null" if "output" in record else "is missing"
        raise RowError(f"field 'output' {problem}: there is nothing to learn", "output")
    system = _text(record, "system")
    made = [{"role": "system", "content": system}] if system else []
    for question, answer in _history(record.get("history")):
        made += _turn(question, answer)
    return made + _turn("\n".join(asked), output)


def _turn(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(record: dict[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is None or isinstance(value, str):
        return value
    raise RowError(f"field '{name}' must be a string, it is {kind(value)}", name)


def _history(raw: Any) -> list[tuple[str, str]]:
    if raw is None:
        return []
    form = "a list of pairs [instruction, answer]"
    if not isinstance(raw, list):
        raise RowError(f"field 'history' must be {form}, it is {kind(raw)}", "history")
    for at, pair in enumerate(raw):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError(f"field 'history[{at}]' is no pair of two texts: history is {form}", "history")
        if not pair[1]:
            raise RowError(f"field 'history[{at}]' has an empty answer", "history")
    return [(question, answer) for question, answer in raw]
