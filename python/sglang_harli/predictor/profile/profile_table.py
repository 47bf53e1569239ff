"""Measured points of one model on one device, in a file: what a predictor starts from.

JSON with a version and a key: model, device, dtype, SGLang version and flags.  A foreign, stale or
damaged file is left aside, with a sentence that says why.  Written as a whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sglang_harli.core import QuantumKind

FORMAT, VERSION = "harli-latency-profile", 1
MOST_BYTES = 16 * 2**20
REMEDY = "`harli profile` measures a new one"


def half_octave(count: int) -> int:
    """Two classes to each doubling, so that counts of one class differ by less than half."""
    bits = count.bit_length()
    return 2 * bits + (bits > 1 and count >> (bits - 2) & 1)


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What measured times depend on besides the load: the ``model``'s architecture and sizes, and
    those of SGLang's ``flags`` that change how long a batch takes."""

    model: str
    device: str
    dtype: str
    sglang: str
    flags: str


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """A decode step; ``share``: SMs that serving had, 0 for all."""

    batch: int
    context_tokens: int
    seconds: float
    share: int = 0

    @property
    def load(self) -> tuple[Any, ...]:
        """Points with the same are of one load."""
        return self.batch, half_octave(self.context_tokens), self.share


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """A prefill batch; ``pairs``: of a new token and one that it attends to."""

    tokens: int
    pairs: int
    seconds: float

    @property
    def load(self) -> tuple[Any, ...]:
        return half_octave(self.tokens), half_octave(self.pairs)


@dataclass(frozen=True, slots=True)
class QuantumPoint:
    """A training quantum, with nothing beside it."""

    kind: QuantumKind
    tokens: int
    row_tokens: int
    seconds: float

    @property
    def load(self) -> tuple[Any, ...]:
        return self.kind, self.tokens, self.row_tokens


@dataclass(frozen=True, slots=True)
class CorunPoint:
    """A decode step on ``share`` SMs beside quanta of ``kind`` on ``finetune_sms``."""

    batch: int
    context_tokens: int
    share: int
    finetune_sms: int
    kind: QuantumKind
    seconds: float

    @property
    def load(self) -> tuple[Any, ...]:
        return self.batch, half_octave(self.context_tokens), self.share, self.finetune_sms, self.kind


@dataclass(frozen=True, slots=True)
class ProfileTable:
    """All points of one key."""

    key: ProfileKey
    decode: Sequence[DecodePoint] = ()
    prefill: Sequence[PrefillPoint] = ()
    quanta: Sequence[QuantumPoint] = ()
    corun: Sequence[CorunPoint] = ()

    @property
    def points(self) -> int:
        return sum(len(getattr(self, name)) for name in _LISTS)

    def document(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "key": dataclasses.asdict(self.key),
            **{name: [_plain(point) for point in getattr(self, name)] for name in _LISTS},
        }

    def joined(self, newer: ProfileTable) -> ProfileTable:
        """With the points of a newer table of the same key, which win for the same load."""
        lists = {}
        for name in _LISTS:
            points = {point.load: point for point in (*getattr(self, name), *getattr(newer, name))}
            lists[name] = tuple(points.values())
        return ProfileTable(self.key, **lists)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file as a whole; a reader sees the old one or the new one."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        document = self.document()
        fd, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        try:
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _plain(point: Any) -> dict[str, Any]:
    values = dataclasses.asdict(point)
    return {name: str(value) if name == "kind" else value for name, value in values.items()}


_LISTS: dict[str, type] = {
    "decode": DecodePoint,
    "prefill": PrefillPoint,
    "quanta": QuantumPoint,
    "corun": CorunPoint,
}


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds for a key: a table, or none; ``text`` is one sentence for the log."""

    table: ProfileTable | None
    text: str
    differs: tuple[str, ...] = field(default=())


def load(path: str | os.PathLike[str], key: ProfileKey) -> Found:
    """The table at ``path`` if it was measured under ``key``."""
    where = Path(path)
    try:
        if where.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
        table = parse(json.loads(where.read_bytes()))
    except FileNotFoundError:
        return Found(None, f"no latency profile at {where}: starting from cautious estimates; {REMEDY}")
    except (OSError, ValueError, RecursionError) as error:
        return Found(
            None, f"the latency profile {where} is left aside, it cannot be read ({error}): {REMEDY}"
        )
    differs = tuple(
        f"{f.name} is {getattr(key, f.name)!r}, the profile's {getattr(table.key, f.name)!r}"
        for f in dataclasses.fields(ProfileKey)
        if getattr(key, f.name) != getattr(table.key, f.name)
    )
    if differs:
        text = f"the latency profile {where} is left aside, it was measured for another server ({'; '.join(differs)})"
        return Found(None, f"{text}: {REMEDY}", differs)
    return Found(table, f"latency profile {where}: {table.points} measured points")


# ---------------------------------------------------------------- reading what anybody may have written
_Point = TypeVar("_Point")


def parse(document: Any) -> ProfileTable:
    """A table from plain values; ValueError says what is wrong and where, or another version."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError("it is not a latency profile")
    if document.get("version") != VERSION:
        raise ValueError(f"its version is {document.get('version')!r}, this server reads {VERSION}")
    key = document.get("key")
    names = [f.name for f in dataclasses.fields(ProfileKey)]
    if (
        not isinstance(key, dict)
        or set(key) != set(names)
        or not all(isinstance(v, str) for v in key.values())
    ):
        raise ValueError(f"its key needs the texts {', '.join(names)}")
    lists: dict[str, Any] = {}
    for name, kind in _LISTS.items():
        rows = document.get(name, [])
        if not isinstance(rows, list):
            raise ValueError(f"{name} is not a list")
        lists[name] = tuple(_point(kind, row, f"{name}[{at}]") for at, row in enumerate(rows))
    return ProfileTable(ProfileKey(**key), **lists)


def _point(kind: type[_Point], row: Any, where: str) -> _Point:
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if not isinstance(row, dict) or set(row) != set(names):
        raise ValueError(f"{where} needs exactly the fields {', '.join(names)}")
    values = dict(row)
    for name, value in row.items():
        if name == "kind":
            if value not in set(QuantumKind):
                raise ValueError(f"{where}.kind is {value!r}, accepted: {', '.join(QuantumKind)}")
            values[name] = QuantumKind(value)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}.{name} is {value!r}, not a number")
        elif name == "seconds":
            if value <= 0:
                raise ValueError(f"{where}.seconds is {value!r}, not above 0")
        elif value < (name in ("batch", "tokens", "finetune_sms")) or value != int(value):
            raise ValueError(f"{where}.{name} is {value!r}, not a count")
        else:
            values[name] = int(value)
    return kind(**values)
