"""The day a GPU is there: does what is promised hold on it?

    python benchmark/gpu_check.py --part 1      # platform and backing, about 2 minutes
    python benchmark/gpu_check.py --part 2      # training alone, 6
    python benchmark/gpu_check.py --part 3      # a server of 1B parameters, 8
    python benchmark/gpu_check.py --part 4 --trace AzureLLMInferenceTrace_conv.csv      # one of 8B, 8
    python benchmark/gpu_check.py --merge       # the four pages as one

Each part stops measuring when its time is over and writes a page (JSON and Markdown in
``--results``) even when it fails, hangs or is ended; the page says what is missing. Exits with 1
where a figure that must hold does not (``gpu/judge.py``) or something failed, with 2 where
something is missing for want of time.

Neither make nor a virtual environment is needed: SGLang, torch and the packages that
``pyproject.toml`` names on ``PYTHONPATH``, and this project's wheel or its ``python`` folder.
``--dry`` runs every part without a GPU, on the CPU engine, CPU tensors and a double of the driver;
its page says so and judges nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMITS_S = {1: 120.0, 2: 360.0, 3: 450.0, 4: 450.0}  # of measuring; ending servers takes up to 20 more
SOURCES = Path(__file__).resolve().parents[1] / "python"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Does what is promised hold on a GPU?")
    parser.add_argument("--part", type=int, choices=sorted(LIMITS_S), help="which part to run")
    parser.add_argument("--merge", action="store_true", help="join the pages of the parts into one")
    parser.add_argument("--dry", action="store_true", help="without a GPU: the script, not the product")
    parser.add_argument("--results", type=Path, help="folder of the pages (default: benchmark/results)")
    parser.add_argument("--limit-s", type=float, help="stop measuring after so many seconds")
    parser.add_argument("--size", help="of the served model: tiny, 1b, 8b (default: 1b, and 8b in part 4)")
    parser.add_argument(
        "--tpot-slo-ms", type=float, help="TPOT target (default: from serve-only; part 4: 30)"
    )
    parser.add_argument("--seconds", type=float, help="longest of each measured window")
    parser.add_argument("--streams", type=int, default=16, help="concurrent requests of part 3")
    parser.add_argument(
        "--rates", default="8,24,48", help="part 4: mean batches that the trace is brought to"
    )
    parser.add_argument(
        "--trace", type=Path, help="part 4: a CSV file of the published trace (default: synthetic)"
    )
    parser.add_argument(
        "--backings", default="remapped,static", help="part 3: values of HARLI_POOL_BACKING to try too"
    )
    parser.add_argument("--attention-backend", default="triton")
    parser.add_argument("--sampling-backend", default="pytorch")
    parser.add_argument("--flags", default="", help="more flags for every server, as one string")
    options = parser.parse_args(argv)
    if (options.part is None) == (not options.merge):
        parser.error("give --part 1, 2, 3 or 4, or --merge")
    return options


def find_package() -> None:
    """This checkout's package where none is installed, for this process and the servers."""
    try:
        import sglang_harli  # noqa: F401
    except ImportError:
        sys.path.insert(0, str(SOURCES))
        path = [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)


def device_name(dry: bool) -> str | None:
    """A word for the device in the pages' names; None: there is no GPU."""
    if dry:
        return "dry"
    import torch

    if not torch.cuda.is_available():
        return None
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(0).lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce")) or "gpu"


def merged(options: argparse.Namespace, device: str) -> int:
    """``device``: "": the one of the pages that are there."""
    from gpu.merge import merge

    if not device:
        devices = {page.name.split("_")[1] for page in options.results.glob("gpu-check-[1-4]_*.json")}
        if len(devices) != 1:
            print(f"--merge: pages of {sorted(devices) or 'no device'} in {options.results}", file=sys.stderr)
            return 2
        (device,) = devices
    page, code = merge(options.results, device)
    print(f"written: {page}")
    return code


def run_part(options: argparse.Namespace, device: str) -> int:
    from gpu.page import Page

    page = Page(
        part=options.part,
        dry=options.dry,
        folder=options.results,
        device=device,
        ends_s=time.monotonic() + (options.limit_s or LIMITS_S[options.part]),
        settings={
            "limit": f"{options.limit_s or LIMITS_S[options.part]:g} s",
            "flags": options.flags or "none",
        },
    ).watched()
    try:
        part_of(options.part)(page, options)
    except Exception as error:
        page.missing["the part"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        page.close()
        written = page.write()
        print(f"written: {written}")
    for row in [] if options.dry else page.rows():
        print(
            f"{ {True: 'holds', False: 'FAILS', None: 'not measured'}[row.holds] }: {row.what}: {row.value}"
        )
    return page.exit_code()


def part_of(number: int) -> Any:
    """Imported when it is run: a part needs nothing of the others."""
    if number == 1:
        from gpu.platform_part import run
    elif number == 2:
        from gpu.training_part import run
    elif number == 3:
        from gpu.server_part import run
    else:
        from gpu.traffic_part import run
    return run


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    find_package()
    from common import report

    if options.results is None:
        options.results = Path(tempfile.mkdtemp(prefix="harli-dry-")) if options.dry else report.RESULTS
    options.results = options.results.resolve()
    device = device_name(options.dry)
    if options.merge:
        return merged(options, device or "")
    if device is None:
        print("no CUDA device: this measures a GPU (--dry tries the script without one)", file=sys.stderr)
        return 2
    return run_part(options, device)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
