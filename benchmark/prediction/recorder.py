"""Records what a real server's predictor is taught, in the scheduler's process: a plugin of
SGLang's.

Part of ``ablate_predictor.py`` (``--record``).  A recording is a gzipped file of JSON lines, one
call each, in order:

    ["decode", batch, context tokens, microseconds, with adapters, after training]
    ["prefill", new tokens, pairs of tokens, microseconds]
    ["quantum", kind, tokens, tokens of a row, microseconds, first of its shape]
    ["relax", kind, milliseconds of the scheduler's clock]
    ["ran", kind]
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.modules import found_in

OUT_ENV, STEPS_ENV = "BENCHMARK_RECORD_OUT", "BENCHMARK_RECORD_STEPS"
NAME = "prediction_recorder"


class _Recording:
    """The calls so far; written once there were enough decode steps.

    Args:
        path: of the file; it appears whole.
        steps: decode steps.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self._path, self._left = path, steps
        self._calls: list[list[Any]] = []

    def add(self, *call: Any) -> None:
        if self._left <= 0:
            return
        self._calls.append(list(call))
        self._left -= call[0] == "decode"
        if self._left <= 0:
            write(self._path, self._calls)


def write(path: Path, calls: list[list[Any]]) -> None:
    """A recording's file; the same calls make the same bytes."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.writelines(json.dumps(call, separators=(",", ":")).encode() + b"\n" for call in calls)
    os.replace(temporary, path)


def read(path: Path) -> list[list[Any]]:
    """The calls of a recording.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def activate() -> None:
    """SGLang's call of a plugin, once in each of its processes; only the scheduler's has a
    predictor."""
    from sglang_harli.predictor.latency_predictor import LatencyPredictor

    recording = _Recording(Path(os.environ[OUT_ENV]), int(os.environ[STEPS_ENV]))

    def recorded(name: str, of_call: Callable[..., list[Any]]) -> None:
        method = getattr(LatencyPredictor, name)

        def noted(self: LatencyPredictor, *arguments: Any, **named: Any) -> None:
            recording.add(*of_call(*arguments, **named))
            method(self, *arguments, **named)

        setattr(LatencyPredictor, name, noted)

    recorded("observe_decode", _decode)
    recorded("observe_prefill", lambda tokens, s, pairs: ["prefill", tokens, pairs, _us(s)])
    recorded("observe_quantum", _quantum)
    recorded("relax", lambda kind, now_s: ["relax", kind.value, round(now_s * 1e3)])
    recorded("ran", lambda kind: ["ran", kind.value])


def _decode(batch: int, context: int, seconds: float, *, adapters: bool, after_training: bool) -> list[Any]:
    return ["decode", batch, context, _us(seconds), int(adapters), int(after_training)]


def _quantum(kind: Any, tokens: int, row_tokens: int, seconds: float, *, first_of_shape: bool) -> list[Any]:
    return ["quantum", kind.value, tokens, row_tokens, _us(seconds), int(first_of_shape)]


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def environment(folder: Path, out: Path, steps: int) -> dict[str, str]:
    """Of a server that is recorded.

    Args:
        folder: takes the plugin.
        out: the recording's file.
        steps: decode steps, after which it is written.
    """
    metadata = folder / "harli_prediction_recorder-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: harli-prediction-recorder\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        f"[sglang.srt.plugins]\n{NAME} = prediction.recorder:activate\n"
    )
    places = filter(None, [str(folder), os.environ.get("PYTHONPATH")])
    path = found_in({"PYTHONPATH": os.pathsep.join(places)})
    return {
        "PYTHONPATH": path["PYTHONPATH"],
        "SGLANG_PLUGINS": f"harli,{NAME}",
        OUT_ENV: str(out),
        STEPS_ENV: str(steps),
    }
