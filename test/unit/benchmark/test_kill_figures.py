"""The table of the kills and faults."""

from __future__ import annotations

import sys

from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import kills_and_faults


def test_the_table_counts_cases_by_point_and_victim():
    def case(host: str, point: str, victim: str) -> dict:
        return {"host": host, "point": point, "victim": victim}

    cases = [
        case("bare", "renamed", "service"),
        case("bare", "renamed", "service"),
        case("server", "renamed", "all"),
    ]
    totals = dict.fromkeys(kills_and_faults.TOTALS, 0)
    text = kills_and_faults.table({"kills": 3, "seconds": 61, "cases": cases, **totals}, None)
    assert "| renamed | 2 | 0 | 0 | all |" in text
    assert "3 kills in 61 s: lost 0, doubled 0, differing 0, unclean 0." in text


def test_faults_are_counted_by_file_and_failures_named():
    junit = (
        "<testsuites><testsuite>"
        '<testcase classname="test.unit.service.test_faults" name="a"/>'
        '<testcase classname="test.unit.test_checkpoints.TestState" name="b"><failure>x</failure></testcase>'
        "</testsuite></testsuites>"
    )
    assert kills_and_faults.counted(junit) == {
        "tried": {"test_faults": 1, "test_checkpoints": 1},
        "not_passed": ["b"],
    }
