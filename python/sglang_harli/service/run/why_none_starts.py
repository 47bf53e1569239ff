"""Why no queued job can start at the moment, as clients are shown it."""

from __future__ import annotations

from sglang_harli.service.links.scheduler_link import SchedulerLink
from sglang_harli.service.tokenizer.model_tokenizer import ModelTokenizer


def why_none_starts(
    scheduler: SchedulerLink, tokenizer: ModelTokenizer, own: str, trouble: str | None
) -> str | None:
    """The reason, in one sentence; None: one may start.  ``trouble``: why the store cannot be
    written.  ``own``: what keeps this job until another base or server comes, which says more."""
    if scheduler.refusal is not None:
        return f"this server cannot train: {scheduler.refusal}"
    if trouble is not None:
        return trouble
    hello = scheduler.hello
    if hello is None:
        return "waiting for the scheduler"
    if own or hello.hold:
        return own or hello.hold
    return None if tokenizer.known else "waiting for the server's tokenizer and chat template"
