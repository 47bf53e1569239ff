"""Which of the latency predictor's mechanisms earn their keep?

    python benchmark/ablate_predictor.py [--record] [--recordings FOLDER] [--steps 4000]

Replays recorded steps of a server under load (``prediction/recordings/``) through the predictor
with each mechanism switched off, and prints error, coverage and width of the bounds.  A mechanism
is listed as neutral where nothing gets worse in any recording.  Needs neither server nor model, and
takes seconds.

``--record`` makes the recordings anew, of a real server on the CPU engine (a 25M-parameter model)
with a job in training: *quiet* (mixed clients), *neighbour* (the same, and another process takes
half a core in every other half minute) and *bursts* (a dozen requests at once, then none for a
while).  About 3 minutes each; nothing else should run.

Exits with 1 when a recording is missing or too short to say anything.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from common import report
from prediction import ablation
from prediction.recorder import read

RECORDINGS = Path(__file__).resolve().parent / "prediction" / "recordings"
KINDS = ("quiet", "neighbour", "bursts")
LEAST = {"decode": 1000, "quantum": 200}  # judged steps of a recording


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which of the predictor's mechanisms earn their keep?")
    parser.add_argument("--record", action="store_true", help="make the recordings first")
    parser.add_argument("--recordings", type=Path, default=RECORDINGS, help="folder of the recordings")
    parser.add_argument("--steps", type=int, default=4000, help="with --record: decode steps of each")
    parser.add_argument("--size", default="25m", help="with --record: of the model that is made: tiny, 25m")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the result files")
    return parser.parse_args(argv)


def wanting(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """What the recordings lack, a sentence each."""
    wrong = []
    for kind in KINDS:
        whole = found.get(kind, {}).get("nothing", {})
        for phase, least in LEAST.items():
            steps = whole[phase].steps if phase in whole else 0
            if steps < least:
                wrong.append(f"{kind}: {steps} steps of {phase} were judged, at least {least} are needed")
    return wrong


def main() -> int:
    options = parse()
    if options.record:
        from prediction import recordings  # it needs the whole stack

        recordings.make(options.recordings, KINDS, options.size, options.steps)
    found = {
        kind: ablation.ablate(read(path))
        for kind in KINDS
        if (path := options.recordings / f"{kind}.jsonl.gz").is_file()
    }
    wrong, idle = wanting(found), ablation.neutral(found)
    shown = ablation.table(found)
    shown += f"\n\nNothing is worse in any recording without: {', '.join(idle) or 'none of them'}."
    print(shown)
    plain = {
        kind: {
            mechanism: {name: asdict(v) if is_dataclass(v) else v for name, v in values.items()}
            for mechanism, values in by_mechanism.items()
        }
        for kind, by_mechanism in found.items()
    }
    page = report.write(
        "predictor_ablation",
        "cpu",
        question="Which of the latency predictor's mechanisms earn their keep?",
        settings={
            "judged": f"each step before it is learnt, from the {ablation.WARM_UP}th decode step on; first runs of a shape are learnt and not judged",
            "worse": f"error up by more than {ablation.MORE_ERROR:.0%} of itself, coverage down by more than {ablation.LESS_COVERAGE:.1%}, "
            f"the bound wider by more than {ablation.WIDER:.0%}, or fewer prices found out that are too high",
            "margin off": f"the upper bound is {ablation.PLAIN_RATIO} times the expectation",
        },
        results={"ablation": plain, "neutral": idle, "wrong": wrong},
        table=shown,
        not_shown="One machine, one model, and a scheduler that had all mechanisms while it was recorded: how many quanta "
        "would have run without one is not known. On a GPU steps overlap, and the co-run terms, which a CPU never "
        "uses, are not among what is switched off.",
        folder=options.results,
    )
    print(page)
    for line in wrong:
        print("does not hold: " + line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
