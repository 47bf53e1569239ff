"""What ``POST /v1/fine_tuning/jobs`` takes, as the arguments of the service's ``submit``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from sglang_harli.errors import ConfigError
from sglang_harli.protocol import accepted
from sglang_harli.protocol.public import (
    Hyperparameters,
    Metadata,
    ObjectId,
    Priority,
    SubmitArgs,
    Suffix,
    parse_hyperparameters,
)

# What a ``learning_rate_multiplier`` multiplies.
BASE_LEARNING_RATE = Hyperparameters().learning_rate
MICRO_BATCH = Hyperparameters().batch_size  # rows that go through the model at once, at most
AUTO = "auto"

Epochs = Annotated[
    Annotated[int, Meta(ge=1, le=10_000)] | Literal["auto"], accepted.words("auto, or 1 to 10,000")
]
BatchSize = Annotated[
    Annotated[int, Meta(ge=1, le=4096)] | Literal["auto"], accepted.words("auto, or 1 to 4,096")
]
Multiplier = Annotated[
    Annotated[float, Meta(gt=0, le=50_000)] | Literal["auto"],
    accepted.words("auto, or above 0 and at most 50,000"),
]


class HyperparametersBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's hyperparameters; ``batch_size``: examples of an optimizer step."""

    n_epochs: Epochs | None = None
    batch_size: BatchSize | None = None
    learning_rate_multiplier: Multiplier | None = None


class SupervisedBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """``method.supervised``."""

    hyperparameters: HyperparametersBody | None = None


class MethodBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """``method``: supervised is served."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["supervised"]})]
    supervised: SupervisedBody | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class HarliBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """``harli``: what OpenAI's API has no field for."""

    hyperparameters: dict[str, Any] = msgspec.field(default_factory=dict)
    priority: Priority = 0
    resume_from: ObjectId | None = None


class CreateJobBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a new job."""

    model: Annotated[str, Meta(min_length=1, max_length=1024)]
    training_file: ObjectId
    validation_file: ObjectId | None = None
    suffix: Suffix | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    metadata: Metadata | None = None
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None  # deprecated by OpenAI: those of ``method``
    integrations: list[dict[str, Any]] | None = None
    harli: HarliBody | None = None


def submit_args(body: CreateJobBody, key: str | None) -> SubmitArgs:
    """The job that is asked for.

    Raises:
        ConfigError: what is not served, or hyperparameters that contradict each other.
    """
    if body.integrations:
        raise ConfigError(
            "integrations are not served here: a job's events and its result file have its metrics",
            code="unsupported",
            param="integrations",
        )
    harli = body.harli or HarliBody()
    named, where = _openai_hyperparameters(body)
    values = _ours(named, where, harli.hyperparameters)
    if body.seed is not None:
        _once(harli.hyperparameters, "seed", "seed")
        values["seed"] = body.seed
    values |= harli.hyperparameters
    parse_hyperparameters(values)
    return SubmitArgs(
        training_file=body.training_file,
        validation_file=body.validation_file,
        model=body.model,
        suffix=body.suffix,
        metadata=body.metadata or {},
        hyperparameters=values,
        priority=harli.priority,
        resume_from=harli.resume_from,
        idempotency_key=key,
    )


def _openai_hyperparameters(body: CreateJobBody) -> tuple[HyperparametersBody, str]:
    """Those of the method, or the deprecated ones beside it, and where they stand."""
    method = body.method
    if method is None:
        return body.hyperparameters or HyperparametersBody(), "hyperparameters"
    if method.type != "supervised":
        raise ConfigError(
            f"method.type={method.type[:80]!r} is not served here: give supervised",
            code="unsupported",
            param="method.type",
        )
    for name in ("dpo", "reinforcement"):
        if getattr(method, name) is not None:
            raise ConfigError(
                f"method.{name} is given, and method.type is supervised: leave it out", param=f"method.{name}"
            )
    own = method.supervised.hyperparameters if method.supervised is not None else None
    if own is not None and body.hyperparameters is not None and own != body.hyperparameters:
        raise ConfigError(
            "hyperparameters is not method.supervised.hyperparameters: give one of the two",
            param="hyperparameters",
        )
    if own is None and body.hyperparameters is not None:
        return body.hyperparameters, "hyperparameters"
    return own or HyperparametersBody(), "method.supervised.hyperparameters"


def _ours(given: HyperparametersBody, where: str, harli: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's hyperparameters by our names; ``auto`` and none are left out: their default."""
    values: dict[str, Any] = {}
    if given.n_epochs not in (None, AUTO):
        _once(harli, "n_epochs", f"{where}.n_epochs")
        values["n_epochs"] = given.n_epochs
    if isinstance(given.batch_size, int):
        for name in ("batch_size", "gradient_accumulation_steps"):
            _once(harli, name, f"{where}.batch_size")
        values["batch_size"] = micro_batch(given.batch_size)
        values["gradient_accumulation_steps"] = given.batch_size // values["batch_size"]
    if isinstance(given.learning_rate_multiplier, int | float):
        _once(harli, "learning_rate", f"{where}.learning_rate_multiplier")
        values["learning_rate"] = given.learning_rate_multiplier * BASE_LEARNING_RATE
    return values


def micro_batch(examples: int) -> int:
    """Rows that go through the model at once, of a step of so many: what divides it, few enough to
    fit where the default fits."""
    return next(rows for rows in range(min(MICRO_BATCH, examples), 0, -1) if examples % rows == 0)


def _once(harli: dict[str, Any], name: str, other: str) -> None:
    if name in harli:
        raise ConfigError(
            f"harli.hyperparameters.{name} and {other} are given: give one of the two",
            param=f"harli.hyperparameters.{name}",
        )
