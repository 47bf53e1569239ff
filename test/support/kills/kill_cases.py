"""What is killed where, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_harli.failpoints import Failpoint

KINDS = ("lost", "doubled", "differing", "unclean")


@dataclass(frozen=True)
class Case:
    """Attributes:
    reach: which time of reaching the point is the one.
    final: the job takes no checkpoint but the last one.
    """

    point: Failpoint
    victim: str
    reach: int = 1
    final: bool = False

    def __str__(self) -> str:
        return f"{self.point}{f'@{self.reach}' * (self.reach > 1)}{'-final' * self.final}-{self.victim}"


@dataclass
class Outcome:
    """What came of a case: nothing in ``problems`` means that nothing was wrong.

    Attributes:
        problems: by kind, one of KINDS, each a sentence.
        attempts: of the job, 1 where its run outlived the kill.
    """

    host: str
    case: Case
    seconds: float = 0.0
    attempts: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)

    def wrong(self, kind: str, text: str) -> None:
        assert kind in KINDS
        self.problems.setdefault(kind, []).append(text)
