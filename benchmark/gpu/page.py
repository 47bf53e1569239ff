"""A part's page: what was measured, what is missing and why, and the rows that must hold.

It is written after every section and by a watchdog when the time is over, so that a part that
fails, hangs or is ended leaves a page with all that it had.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import report
from gpu.judge import Row, rows_of
from gpu.tables import sections_text

TITLES = {
    1: "Platform and backing",
    2: "Training alone",
    3: "A server of 1B parameters",
    4: "A server of 8B parameters under a conversation trace",
}
QUESTIONS = {
    1: "Is the platform what the memory of the pool needs, and what do its calls cost?",
    2: "Is training on the device right, free of waits for the device, and fast?",
    3: "Does a server keep its output, its decode speed and its target while a LoRA job trains?",
    4: "What do requests lose and what does training gain, at three rates of a published trace?",
}
NOT_SHOWN = (
    "Quality (the weights are random), other attention back ends than the one named, several devices, and sharing of "
    "SMs: training and decode take turns here. One run on one machine, no interval."
)
DRY = "DRY RUN"
OUT_OF_TIME = "out of time"
GRACE_S = 5.0  # a section that is still running then is given up
HOLDS, FAILS, MISSING = 0, 1, 2  # exit codes


@dataclass
class Page:
    """One part of the check on its way to a page.

    Attributes:
        part: 1 to 4; dry: without a GPU, so that no verdict is drawn.
        folder: of the results; device: the name in the file's name.
        ends_s: when measuring is to stop, on ``time.monotonic``'s clock.
        sections: name -> what was measured; missing: name -> why there is nothing.
    """

    part: int
    dry: bool
    folder: Path
    device: str
    ends_s: float
    settings: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    _running: str = ""
    _ends: list[Callable[[], object]] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    # ---- measuring
    @property
    def left_s(self) -> float:
        """Seconds until measuring is to stop."""
        return self.ends_s - time.monotonic()

    def measure(self, name: str, work: Callable[[], Any], *, needs_s: float = 0.0) -> Any:
        """What ``work`` gives, as a section; None: no time was left, or it failed (``missing``).

        Args:
            needs_s: least time that must be left for it to begin.
        """
        if self.left_s < needs_s or self.left_s <= 0:
            self.missing[name] = (
                f"{OUT_OF_TIME}: {max(self.left_s, 0):.0f} s were left, {needs_s:.0f} are needed"
            )
            self.write()
            return None
        print(f"{name} ...", flush=True)
        self._running, began, found = name, time.monotonic(), None
        try:
            found = work()
            self.sections[name] = found
        except Exception as error:
            self.missing[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        self._running = ""
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        self.write()
        return found

    def at_end(self, end: Callable[[], object]) -> None:
        """Call this when the part is over, also when it is given up."""
        self._ends.append(end)

    # ---- the end
    def watched(self) -> Page:
        """From now on a page is left behind, whatever happens: a section that hangs is given up."""
        timer = threading.Timer(max(self.left_s, 0) + GRACE_S, self._give_up, [OUT_OF_TIME])
        timer.daemon = True
        timer.start()
        self._ends.append(timer.cancel)
        signal.signal(signal.SIGTERM, lambda *_: self._give_up("ended by SIGTERM"))
        return self

    def _give_up(self, why: str) -> None:
        if self._running:
            self.missing[self._running] = f"{why}: it was still running"
        else:
            self.missing["the rest"] = why
        self.write()
        print(f"{why}: the page has what was measured until now: {self.path}", file=sys.stderr, flush=True)
        self.close()
        os._exit(MISSING)  # a call of the driver that hangs ends in no other way

    def close(self) -> None:
        """End what the part has started."""
        ends, self._ends = self._ends, []
        for end in reversed(ends):
            try:
                end()
            except Exception as error:
                print(f"at the end: {type(error).__name__}: {error}", file=sys.stderr)

    def rows(self) -> list[Row]:
        return rows_of(self.part, self.sections)

    def exit_code(self) -> int:
        """A row fails or a section raised: 1; something is missing for want of time: 2. Of a dry
        run only what raised counts."""
        raised = [why for why in self.missing.values() if not why.startswith(OUT_OF_TIME)]
        if raised or (not self.dry and any(row.holds is False for row in self.rows())):
            return FAILS
        return MISSING if self.missing and not self.dry else HOLDS

    # ---- the page
    @property
    def name(self) -> str:
        return f"gpu-check-{self.part}"

    @property
    def path(self) -> Path:
        return report.path_of(self.name, self.device, self.folder)

    def write(self) -> Path:
        """The page as it stands."""
        with self._lock:
            shown = [asdict(row) for row in self.rows()]
            results = {
                "part": self.part,
                "dry": self.dry,
                "sections": dict(self.sections),
                "missing": dict(self.missing),
                "rows": [] if self.dry else shown,
            }
            return report.write(
                self.name,
                self.device,
                title=title(f"{TITLES[self.part]} (part {self.part} of 4)", self.dry),
                question=QUESTIONS[self.part],
                settings=self.settings,
                results=results,
                table=body(results),
                not_shown=NOT_SHOWN,
                folder=self.folder,
            )


def title(text: str, dry: bool) -> str:
    return f"{DRY}: {text}" if dry else text


def body(results: dict[str, Any]) -> str:
    """The verdicts, what is missing, and each section (pure)."""
    parts = []
    if results["dry"]:
        parts.append(f"**{DRY}**: no GPU was used, so no figure says anything and no verdict is drawn.")
    elif results["rows"]:
        lines = ["| what must hold | bound | measured | |", "|---|---|---|---|"]
        words = {True: "holds", False: "**fails**", None: "not measured"}
        for row in results["rows"]:
            value = "-" if row["value"] is None else f"{row['value']:.4g}"
            lines.append(f"| {row['what']} | {row['bound']} | {value} | {words[row['holds']]} |")
        parts.append("\n".join(lines))
    if results["missing"]:
        lines = [f"- {name}: {_one_line(why)}" for name, why in results["missing"].items()]
        parts.append("\n".join(["**Missing**", "", *lines]))
    parts.append(sections_text(results["sections"]))
    return "\n\n".join(part for part in parts if part)


def _one_line(text: str, most: int = 600) -> str:
    return re.sub(r"\s+", " ", text).strip()[:most]
