"""A record of what the loop between two steps of serving asked and was told, and what it decided;
and its replay.

A record is a list of calls in order: ``["in", method, arguments, result]`` for a call of the loop
by the scheduler, and ``["out", name, arguments, result]`` for each question that the loop asks
meanwhile (the clock, what is offered, the slack, ...).  A replay answers the questions from the
record: the loop has to ask the same ones in the same order, and to decide the same.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_harli.core import Claim, Decision, QuantumKind, QuantumOffer, Reason, StepLoad
from sglang_harli.managers.scheduler.policy.slo_ledger import Slack, Targets
from sglang_harli.managers.scheduler.policy.slotting import Slotting

QUESTIONS = (
    "queued_s",
    "saving",
    "barred",
    "offer",
    "claimed",
    "run_quantum",
    "settle",
    "cut",
    "relax",
    "yields",
)
PROPERTIES = ("queued_s", "saving", "barred")
ON_A_CPU = {"depth": 1, "expected_queued_s": 0.0}  # records are of CPU servers: not in them
_KINDS: dict[str, Any] = {
    "StepLoad": StepLoad,
    "Slack": Slack,
    "Targets": Targets,
    "QuantumOffer": QuantumOffer,
    "Decision": Decision,
}
_ENUMS: dict[str, Any] = {"Reason": Reason, "Claim": Claim, "QuantumKind": QuantumKind}


# ------------------------------------------------------------------ values as JSON
def plain(value: Any) -> Any:
    """As JSON: a dataclass as ``{"=": its name, ...}``, an enum by its name, an infinity as a
    word."""
    name = type(value).__name__
    if name in _KINDS:
        return {"=": name, **{f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if name in _ENUMS:
        return {"=": name, "name": value.name}
    if isinstance(value, float) and math.isinf(value):
        return {"=": "inf", "sign": 1 if value > 0 else -1}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    assert value is None or isinstance(value, bool | int | float | str), value
    return value


def valued(value: Any) -> Any:
    """The other way; lists become tuples."""
    if isinstance(value, list):
        return tuple(valued(each) for each in value)
    if not isinstance(value, dict):
        return value
    fields = {key: valued(each) for key, each in value.items() if key != "="}
    name = value["="]
    if name == "inf":
        return math.inf * fields["sign"]
    return _ENUMS[name][fields["name"]] if name in _ENUMS else _KINDS[name](**fields)


def read(path: Path) -> list[list[Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ------------------------------------------------------------------ replay
class Differs(AssertionError):
    """The loop asked or decided something else than in the record."""


class _Script:
    def __init__(self, calls: list[list[Any]]) -> None:
        self.calls, self.at = calls, 0

    def answer(self, name: str, *arguments: Any) -> Any:
        kind, wanted, given, result = self.calls[self.at]
        asked = plain(list(arguments))
        if (kind, wanted, given) != ("out", name, asked):
            raise Differs(f"call {self.at}: {name}{asked} is asked, the record has {kind} {wanted}{given}")
        self.at += 1
        return valued(result)


class _Training:
    def __init__(self, script: _Script) -> None:
        self._script = script

    def __getattr__(self, name: str) -> Any:
        if name in ON_A_CPU:
            return ON_A_CPU[name]
        if name in PROPERTIES:
            return self._script.answer(name)
        if name not in QUESTIONS:
            raise AttributeError(name)
        return lambda *arguments: self._script.answer(name, *arguments)


class _Serving:
    def __init__(self, script: _Script) -> None:
        self._script = script

    @property
    def targets(self) -> Targets:
        return self._script.answer("targets")

    @property
    def running(self) -> int:
        return self._script.answer("running")

    def load(self) -> StepLoad:
        return self._script.answer("load")

    def slack(self, now_s: float, queued_s: float, *, disturbed: bool) -> Slack:
        return self._script.answer("slack", now_s, queued_s, disturbed)


def replay(calls: list[list[Any]]) -> dict[str, int]:
    """Drive the loop through a record.

    Returns:
        How many decisions of each reason were made again.

    Raises:
        Differs: naming the call.
    """
    script = _Script(calls)
    clock: Callable[[], float] = lambda: script.answer("clock")  # noqa: E731
    slotting = Slotting(_Training(script), clock)  # type: ignore[arg-type]
    serving, reasons = _Serving(script), {}
    while script.at < len(calls):
        kind, method, given, result = calls[script.at]
        if kind != "in":
            raise Differs(f"call {script.at}: the record has a question {method}, and the loop asks nothing")
        script.at += 1
        values = valued(given)
        if method in ("fill", "fill_idle"):
            handed = (serving,) if method == "fill" else (serving.load, *values)
        else:
            handed = values
        found = (
            slotting.decoded(finished=values[0])
            if method == "decoded"
            else getattr(slotting, method)(*handed)
        )
        if plain(found) != result:
            raise Differs(f"call {script.at}: {method} gives {found}, the record has {result}")
    for kind, name, given, _ in calls:
        if kind == "out" and name in ("run_quantum", "yields"):
            reason = given[-1]["reason"]["name"] if name == "run_quantum" else given[0]["name"]
            reasons[reason] = reasons.get(reason, 0) + 1
    return reasons
