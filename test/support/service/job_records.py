"""Records of jobs for tests that need one, and what a step measures."""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_harli.core import JobStatus
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.jobs.transitions import JobRecord

METRICS = {"step": 1, "loss": 2.0, "learning_rate": 1e-3, "tokens": 10, "seconds": 0.5}


def record(**values: Any) -> JobRecord:
    """A queued job of ten steps."""
    base = JobRecord(
        id="ftjob-0123456789abcdef01234567",
        number=1,
        created_at=100.0,
        status=JobStatus.QUEUED,
        hyperparameters=Hyperparameters(),
        model="m",
        adapter_name="m-ft-01234567",
        total_steps=10,
        data={"rows": 4},
    )
    return msgspec.structs.replace(base, **values)
