"""Why no queued job can start at the moment, as clients are shown it."""

from __future__ import annotations

from sglang_harli.service.links.scheduler_link import SchedulerLink
from sglang_harli.service.tokenizer.model_tokenizer import ModelTokenizer


class WhyNoneStarts:
    """The reason, in one sentence, by the scheduler's hello, the store and the tokenizer."""

    def __init__(self, scheduler: SchedulerLink, tokenizer: ModelTokenizer) -> None:
        self._scheduler, self._tokenizer = scheduler, tokenizer

    def __call__(self, own: str, trouble: str | None) -> str | None:
        """None: one may start; ``trouble``: why the store cannot be written.  ``own``: what keeps
        this job until another base or server comes; says more than what passes."""
        if self._scheduler.refusal is not None:
            return f"this server cannot train: {self._scheduler.refusal}"
        if trouble is not None:
            return trouble
        hello = self._scheduler.hello
        if hello is None:
            return "waiting for the scheduler"
        if own or hello.hold:
            return own or hello.hold
        return None if self._tokenizer.known else "waiting for the server's tokenizer and chat template"
