"""The pages of the four parts as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import report
from gpu.page import FAILS, HOLDS, MISSING, NOT_SHOWN, OUT_OF_TIME, TITLES, body, title

MERGED = "gpu-check"


def merge(folder: Path, device: str) -> tuple[Path, int]:
    """Write the joined page; it and the exit code: as ``Page.exit_code`` over all parts, 2 where
    a part is not there."""
    parts = {part: document for part in TITLES if (document := _newest(folder, part, device))}
    results = {part: document["results"] for part, document in parts.items()}
    dry = any(found["dry"] for found in results.values())
    page = report.write(
        MERGED,
        device,
        title=title("Check on a GPU", dry),
        question="Does what is promised hold on this device?",
        settings=_settings(parts),
        results={"parts": results},
        table="\n\n".join(_shown(part, parts.get(part)) for part in TITLES),
        not_shown=NOT_SHOWN,
        folder=folder,
    )
    return page, verdict(results)


def verdict(results: dict[int, dict[str, Any]]) -> int:
    """The exit code (pure)."""
    found = list(results.values())
    raised = any(not why.startswith(OUT_OF_TIME) for one in found for why in one["missing"].values())
    failed = any(row["holds"] is False for one in found for row in one["rows"])
    if raised or failed:
        return FAILS
    if any(one["dry"] for one in found):
        return HOLDS
    return MISSING if set(results) != set(TITLES) or any(one["missing"] for one in found) else HOLDS


def _newest(folder: Path, part: int, device: str) -> dict[str, Any] | None:
    """The newest page of a part on that device, as it was written."""
    pages = sorted(folder.glob(f"gpu-check-{part}_{device}_*.json"))
    return json.loads(pages[-1].read_text()) if pages else None


def _settings(parts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part, document in parts.items():
        run = document["run_info"]
        versions = document["meta_info"]["versions"]
        named = ", ".join(f"{name} {versions.get(name)}" for name in ("sglang", "torch", "triton"))
        words = [f"`{run['command']}`", run["finished_at"], named, str(document["meta_info"]["gpu"])]
        words += [f"{name} {value}" for name, value in run["settings"].items()]
        found[f"part {part}"] = "; ".join(words)
    return found


def _shown(part: int, document: dict[str, Any] | None) -> str:
    heading = f"## {part}. {TITLES[part]}"
    return f"{heading}\n\n" + ("**Not run.**" if document is None else body(document["results"]))
