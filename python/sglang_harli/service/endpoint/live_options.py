"""``set``: the live options, which the scheduler owns; kept for it while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from sglang_harli.config import LIVE, HarliOptions, LiveValue, contradiction
from sglang_harli.errors import SHOWN, ConfigError, NotReadyError, shown
from sglang_harli.protocol import internal
from sglang_harli.protocol.public import SetAnswer, SetArgs, Slo
from sglang_harli.service.links.scheduler_link import SchedulerLink

logger = logging.getLogger(__name__)

SETTING = "pending_options"  # what is deferred, in the store: it survives a restart of this service
ANSWER_S = 5.0


class LiveOptions:
    """The live options: sent to the scheduler, or kept until it is there.

    ``pending``: what an earlier service deferred (JSON of ``{name: value}``), or None; ``keep``
    stores it durably (NotReadyError: not yet).
    """

    def __init__(
        self,
        options: HarliOptions,
        link: SchedulerLink,
        pending: str | None,
        keep: Callable[[str], Awaitable[None]],
    ) -> None:
        self._link = link
        self._keep = keep
        self._pending = _read(pending)
        self._applying: asyncio.Task[None] | None = None
        # In force, as far as this service knows.
        self.effective: dict[str, Any] = {name: getattr(options, name) for name in LIVE}
        self.revision = 0

    async def set(self, args: SetArgs) -> SetAnswer:
        """Raises ConfigError for a name that cannot be set or a value that is not accepted."""
        check(args.values)
        if self._link.hello is None:
            return await self._defer(args)
        answer = await self._link.ask_set(args.values, args.if_revision, ANSWER_S)
        if answer is None:
            return self._answer(
                "deferred", "the scheduler has not answered yet; `harli status` shows what is in force"
            )
        self._take(answer)
        return self._answer(answer.outcome, answer.text)

    async def _defer(self, args: SetArgs) -> SetAnswer:
        if args.if_revision is not None and args.if_revision != self.revision:
            return self._answer("stale", f"the revision is {self.revision}, not {args.if_revision}")
        wanted: dict[str, Any] = self.effective | self._pending | args.values
        text = contradiction(wanted.get("max_itl_ms"), wanted["tpot_slo_ms"])
        if text is not None:
            return self._answer("conflict", text)
        self._pending |= args.values
        await self._keep(msgspec.json.encode(self._pending).decode())
        return self._answer("deferred", "in force once the scheduler is up")

    def slo(self) -> Slo:
        """The latency targets in force, as far as this service knows."""
        return Slo(**{name: self.effective[name] for name in Slo.__struct_fields__})

    def on_hello(self, hello: internal.Hello) -> None:
        self.effective, self.revision = self.effective | hello.options, hello.revision
        if self._pending and self._applying is None:
            self._applying = asyncio.create_task(self._apply_pending())

    async def _apply_pending(self) -> None:
        values = dict(self._pending)
        answer = await self._link.ask_set(values, None, ANSWER_S)
        self._applying = None
        if answer is None:
            return  # with its next hello
        self._take(answer)
        logger.info("deferred options %s: %s %s", values, answer.outcome, answer.text)
        self._pending = {k: v for k, v in self._pending.items() if k not in values}
        with contextlib.suppress(NotReadyError):  # written when the store can be; twice is harmless
            await self._keep(msgspec.json.encode(self._pending).decode())

    def _take(self, answer: internal.OptionsSet) -> None:
        self.effective, self.revision = self.effective | answer.effective, answer.revision

    def _answer(self, outcome: str, message: str) -> SetAnswer:
        return SetAnswer(outcome=outcome, revision=self.revision, effective=self.effective, message=message)


def _read(pending: str | None) -> dict[str, LiveValue]:
    try:
        return msgspec.json.decode(pending, type=dict[str, LiveValue]) if pending else {}
    except (msgspec.MsgspecError, ValueError) as error:
        logger.error("deferred options in the job store cannot be read, and are left aside: %s", error)
        return {}


def check(values: Mapping[str, LiveValue]) -> None:
    """Raise ConfigError naming the option and what is accepted."""
    if not values:
        raise ConfigError("nothing to set: give one or more of " + ", ".join(LIVE), param="values")
    for name, value in values.items():
        if name not in LIVE:
            text = f"{shown(name)} cannot be set while the server runs; accepted: {', '.join(LIVE)}"
            raise ConfigError(text, param=name[:SHOWN])
        if value is None and name == "tpot_slo_ms":
            raise ConfigError("tpot_slo_ms cannot be cleared: give a number of milliseconds", param=name)
        HarliOptions(**{name: value})  # type: ignore[arg-type]
