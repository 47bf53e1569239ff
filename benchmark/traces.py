"""Make a trace of requests from stated public statistics and a seed, or look at one that is given.

    python benchmark/traces.py --workload azure-conv --mean-batch 32 --seed 3 --out trace.csv
    python benchmark/traces.py --committed python/sglang_harli/simulation/trace_data
    python benchmark/traces.py --read AzureLLMInferenceTrace_conv.csv

The generator, and the source of every figure, are in ``sglang_harli/simulation/traces.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from sglang_harli.errors import HarliError
from sglang_harli.simulation import trace_files, traces


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--workload", default="azure-conv", help=", ".join(traces.WORKLOADS))
    parse.add_argument(
        "--mean-batch", type=float, default=16.0, help="tokens offered per second times --tpot-ms"
    )
    parse.add_argument("--tpot-ms", type=float, default=40.0, help="target that the mean batch refers to")
    parse.add_argument("--duration-s", type=float, default=180.0)
    parse.add_argument(
        "--swing", type=float, help="amplitude of the rate's sinusoid, 0 to below 1 [the workload's]"
    )
    parse.add_argument("--swing-period-s", type=float, help="86400 for a day [default: the duration]")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--read", metavar="FILE", help="summarise a trace file instead")
    parse.add_argument("--committed", metavar="DIR", help="write the traces that harli simulate compares on")
    parse.add_argument("--limit", type=int, help="read at most so many rows")
    parse.add_argument("--out", metavar="FILE", help="write here [default: standard output]")
    return parse


def summary(trace: traces.Trace, tpot_s: float) -> str:
    prompts = [request.prompt_tokens for request in trace.requests]
    outputs = [request.output_tokens for request in trace.requests]
    return (
        f"{trace.name}: {len(prompts)} requests in {trace.duration_s:.0f} s, prompts {statistics.mean(prompts):.0f} "
        f"(median {statistics.median(prompts):.0f}), outputs {statistics.mean(outputs):.0f} "
        f"(median {statistics.median(outputs):.0f}) tokens, mean batch {trace.mean_batch(tpot_s):.1f} at {tpot_s * 1e3:g} ms"
    )


def write(path: Path | None, trace: traces.Trace, kind: traces.Workload) -> None:
    """To a file, or to standard output."""
    text = trace_files.text(trace, kind)
    if path is None:
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")


def main() -> int:
    args = parser().parse_args()
    try:
        if args.read:
            print(summary(trace_files.read(args.read, limit=args.limit), args.tpot_ms / 1e3))
            return 0
        if args.committed:
            for name, recipe in traces.COMMITTED.items():
                write(Path(args.committed) / f"{name}.csv", recipe.make(), traces.workload(recipe.workload))
            return 0
        kind = traces.workload(args.workload)
        trace = traces.generate(
            kind,
            seed=args.seed,
            duration_s=args.duration_s,
            mean_batch=args.mean_batch,
            tpot_s=args.tpot_ms / 1e3,
            swing=args.swing,
            swing_period_s=args.swing_period_s,
        )
    except HarliError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    write(Path(args.out) if args.out else None, trace, kind)
    print(summary(trace, args.tpot_ms / 1e3), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
