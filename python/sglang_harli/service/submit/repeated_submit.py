"""Whether a submit whose idempotency key is known asks for the same job again.

All that makes the job must be the same, but the file's name; defaults may be left out or named.
"""

from __future__ import annotations

from typing import Any

from sglang_harli.errors import ConfigError
from sglang_harli.protocol.public import Hyperparameters, SubmitArgs, parse_hyperparameters
from sglang_harli.service.jobs.record import Asked, JobRecord
from sglang_harli.service.jobs.record_encoding import plain

DATA, VALIDATION = "other data", "other validation data"


def asked(args: SubmitArgs) -> Asked:
    """What makes the job, of a submit that was accepted or may be."""
    return Asked(
        sha256=args.sha256,
        validation_sha256=args.validation_sha256,
        suffix=args.suffix,
        resume_from=args.resume_from,
        priority=args.priority,
        hyperparameters={name: _typed(name, value) for name, value in args.hyperparameters.items()},
        training_file=args.training_file,
        validation_file=args.validation_file,
        metadata=args.metadata,
        model=args.model,
    )


def _typed(name: str, given: Any) -> Any:
    """As it is stored: ``"3"`` and ``3`` are the same, and so are a list and the text of it."""
    try:
        return plain(getattr(parse_hyperparameters({name: given}), name))
    except ConfigError:  # accepted once, by another version
        return plain(given)


def differences(
    first: Asked, again: Asked, has: Hyperparameters | None, left_out: Hyperparameters | None
) -> list[str]:
    """What the second submit asks for otherwise, in words.

    ``has``: what the first one's job has, None: there is none yet.  ``left_out``: what a submit
    gets unnamed; None: not known any more, then what only the first submit names is no difference.
    """
    found = [DATA] if first.sha256 != again.sha256 else []
    found += [VALIDATION] if first.validation_sha256 != again.validation_sha256 else []
    named = ("resume_from", "suffix", "priority", "training_file", "validation_file", "metadata", "model")
    for name in named:
        found += _difference(name, getattr(first, name), getattr(again, name))
    rest = plain(left_out) if left_out is not None else {}
    job = plain(has) if has is not None else rest
    for name in dict.fromkeys([*first.hyperparameters, *again.hyperparameters]):
        old, new = first.hyperparameters, again.hyperparameters
        if (name in old or name in job) and (name in new or name in rest):
            # A stored value is what JSON makes of it, or what another version accepted.
            before = _typed(name, old[name] if name in old else job[name])
            found += _difference(name, before, new.get(name, rest.get(name)))
    return found


def _difference(name: str, old: Any, new: Any) -> list[str]:
    return [] if old == new else [f"{name}={_shown(new)} instead of {_shown(old)}"]


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def differences_of_before(record: JobRecord, args: SubmitArgs) -> list[str]:
    """The same for a job of version 0.1, whose record does not say what was named."""
    same_data = record.data_sha256 == args.sha256 or (args.resume_from and not args.sha256)
    found = [] if same_data else [DATA]
    found += _difference("resume_from", record.resumed_from, args.resume_from)
    return found + _difference("suffix", record.suffix, args.suffix)
