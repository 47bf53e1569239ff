"""What a check of ``harli doctor`` found: its status, what was seen, and how to mend it."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Status(enum.StrEnum):
    OK = "ok"
    SKIPPED = "skipped"  # there was nothing to look at
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """``found``: one clause or more; ``mend``: what to do, a sentence; empty where all is well."""

    status: Status
    found: str
    mend: str = ""


def ok(found: str) -> Finding:
    return Finding(Status.OK, found)


def skipped(found: str, mend: str) -> Finding:
    """``mend``: what would let the check look."""
    return Finding(Status.SKIPPED, found, mend)


def warning(found: str, mend: str) -> Finding:
    return Finding(Status.WARNING, found, mend)


def problem(found: str, mend: str) -> Finding:
    return Finding(Status.PROBLEM, found, mend)


_RANK = list(Status)


def together(findings: Iterable[Finding]) -> Finding:
    """Several findings of one check as one, with the worst status; where some are not ok, what is
    ok is left out."""
    found = list(findings)
    worst = max((f.status for f in found), key=_RANK.index)
    shown = [f for f in found if worst is Status.OK or f.status is not Status.OK]
    mends = dict.fromkeys(f.mend for f in shown if f.mend)
    return Finding(worst, "; ".join(f.found for f in shown), "; ".join(mends))


def said(error: BaseException) -> str:
    """An exception in one sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'without a message'}"
