"""The names under which adapters are served."""

from __future__ import annotations

import re

ADAPTER_MARK = "-ft-"
CHECKPOINT_MARK = "-step-"
_CHECKPOINT = re.compile(
    rf"^([A-Za-z0-9._-]+{ADAPTER_MARK}[A-Za-z0-9._-]+){CHECKPOINT_MARK}([1-9][0-9]{{0,9}})\Z"
)
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
SUFFIX_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}\Z"


def short_id(job_id: str) -> str:
    """The last eight characters of a job id: what adapter names carry."""
    return job_id[-8:]


def adapter_name(served_name: str, suffix: str | None, job_id: str) -> str:
    """The served name of a job's adapter, ``{base}-ft-{suffix}-{short id}``, with the last
    component of the served model's name, less any colon (SGLang would read ``base:adapter``)."""
    base = _UNSAFE.sub("-", served_name.rstrip("/").rsplit("/", 1)[-1]) or "model"
    middle = f"{suffix}-" if suffix else ""
    return f"{base}{ADAPTER_MARK}{middle}{short_id(job_id)}"


def colon_refusal(served_name: str, flag: str) -> str | None:
    """Why a name cannot be served, or None.  SGLang asserts the same, a minute later."""
    if ":" not in served_name or served_name.lower().startswith(("s3://", "gs://", "az://")):
        return None
    fix = served_name.rstrip("/").rsplit("/", 1)[-1].replace(":", "-")
    return (
        f"{flag} {served_name!r} holds a colon, which SGLang reads as base:adapter in a model's name: give "
        f"--served-model-name {fix}"
    )


def checkpoint_name(adapter: str, step: int) -> str:
    """The served name of the adapter's state after an optimizer step."""
    return f"{adapter}{CHECKPOINT_MARK}{step}"


def checkpoint_of(name: str) -> tuple[str, int] | None:
    """The adapter and the step in the name of a checkpoint; None: it has not the form of one."""
    match = _CHECKPOINT.match(name)
    return (match[1], int(match[2])) if match is not None else None


def looks_like_adapter(name: str) -> bool:
    """Whether a model name has the form of an adapter of ours (so that a miss is a 404)."""
    return ADAPTER_MARK in name
