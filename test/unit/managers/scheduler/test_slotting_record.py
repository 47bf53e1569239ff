"""The loop decides as it did in a recorded server run, call by call.

The recordings were made on two cores with ``support.slotting_recorder`` before the loop had a
folder of its own: a server of a small model under load, with a target that leaves little time,
without and with a target for the first token.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.slotting_record import Differs, read, replay

FOLDER = Path(__file__).parents[3] / "fixtures"
RECORDS = sorted(FOLDER.glob("slotting_*.jsonl.gz"))


def test_there_are_recordings():
    assert len(RECORDS) == 2


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name.split(".")[0])
def test_decisions_are_those_of_the_recorded_run(path: Path):
    reasons = replay(read(path))
    assert reasons.get("SLACK", 0) > 20 and reasons.get("IDLE", 0) > 20, reasons
    assert len(reasons) >= 3, reasons


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name.split(".")[0])
def test_another_decision_is_seen(path: Path):
    calls = read(path)
    at = next(n for n, (kind, name, *_) in enumerate(calls) if kind == "out" and name == "run_quantum")
    calls[at][2][1]["rows"] += 1
    with pytest.raises(Differs, match=f"call {at}: run_quantum"):
        replay(calls)
