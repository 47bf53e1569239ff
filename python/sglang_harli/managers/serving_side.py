"""What the policy needs to know of serving: targets in force, estimates, deadlines, attainment.

Plain Python: requests are read by attribute (SGLang's Req: output_ids, finished(), time_stats), so that
the class is tested without SGLang.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang_harli.config import LIVE, HarliOptions
from sglang_harli.errors import ConfigError
from sglang_harli.managers.quantum_costs import DecodeCosts
from sglang_harli.managers.slo_ledger import (
    Attainment,
    PrefillReserve,
    RequestClock,
    Slack,
    Targets,
    batch_slack,
)
from sglang_harli.protocol import internal

# While a checkpoint is written on a CPU, its writer takes turns with the threads of a decode step, which is as slow
# as its slowest one (*measured* on two cores: now and then 2 to 3 times as long).  So more is kept for it.
DISTURBED = 2.0


def targets_of(options: HarliOptions) -> Targets:
    """The options in seconds."""

    def seconds(value: float | None) -> float | None:
        return None if value is None else value / 1e3

    return Targets(
        tpot_s=options.tpot_slo_ms / 1e3,
        ttft_s=seconds(options.ttft_slo_ms),
        max_itl_s=seconds(options.max_itl_ms),
        busy_quantum_s=options.busy_quantum_ms / 1e3,
        idle_quantum_s=options.idle_quantum_ms / 1e3,
    )


class ServingSide:
    """Targets and estimates of one scheduler; lives on its thread."""

    def __init__(self, options: HarliOptions) -> None:
        self.options = options
        self.targets = targets_of(options)
        self.revision = 0
        self.decode = DecodeCosts()
        self.reserve = PrefillReserve()
        self.attainment = Attainment()
        self._last_slack: Slack | None = None

    # ---------------------------------------------------------------- measured
    def step(self, is_decode: bool, batch_size: int, seconds: float, now_s: float) -> None:
        """A batch took ``seconds`` on the device."""
        if is_decode:
            self.decode.observe(batch_size, seconds)
            self.reserve.decode(now_s)
        else:
            self.reserve.prefill(seconds)

    @staticmethod
    def _clock(req: Any) -> RequestClock | None:
        stats = req.time_stats
        emitted = len(req.output_ids)
        if not emitted or not stats.prefill_finished_time:
            return None
        # SGLang resets the time when it retracts a request; the promise runs from the first token
        first = getattr(req, "harli_first_token_s", None)
        if first is None:
            first = req.harli_first_token_s = stats.prefill_finished_time
        return RequestClock(first, max(stats.last_decode_finish_time, first), emitted)

    def clocks(self, reqs: Iterable[Any]) -> list[RequestClock]:
        """Clocks of the requests that go on decoding."""
        clocks = (self._clock(req) for req in reqs if not req.finished())
        return [clock for clock in clocks if clock is not None]

    def count_finished(self, reqs: Iterable[Any]) -> None:
        for req in reqs:
            if req.finished() and not getattr(req, "harli_counted", False):
                req.harli_counted = True
                clock = self._clock(req)
                if clock is not None:
                    self.attainment.count(clock, self.targets.tpot_s)

    def slack(
        self, clocks: list[RequestClock], now_s: float, queued_s: float, *, disturbed: bool = False
    ) -> Slack:
        """What may be spent before the next decode step; ``disturbed``: a checkpoint is being written."""
        decode_upper_s = self.decode.estimate(len(clocks)).upper_s
        slack = batch_slack(
            clocks,
            self.targets,
            now_s=now_s,
            decode_upper_s=decode_upper_s * (DISTURBED if disturbed else 1.0),
            reserve_s=self.reserve.seconds(now_s),
            queued_s=queued_s,
        )
        self._last_slack = slack
        return slack

    # ---------------------------------------------------------------- harli set, harli status
    def set_options(self, message: internal.SetOptions) -> internal.OptionsSet:
        """Apply ``harli set``; the answer carries what is in force."""

        def answer(outcome: str, text: str = "") -> internal.OptionsSet:
            return internal.OptionsSet(
                request=message.request,
                outcome=outcome,
                revision=self.revision,
                effective=self.effective(),
                text=text,
            )

        if message.if_revision is not None and message.if_revision != self.revision:
            return answer("stale", f"the revision is {self.revision}, not {message.if_revision}")
        unknown = sorted(set(message.values) - set(LIVE))
        if unknown:
            return answer("conflict", f"not an option that can be set: {', '.join(unknown)}")
        try:
            options = self.options.replace(**message.values)
        except ConfigError as error:
            return answer("conflict", error.message)
        itl, tpot = options.max_itl_ms, options.tpot_slo_ms
        if itl is not None and itl < tpot:
            return answer(
                "conflict", f"max-itl-ms={itl:g} is below tpot-slo-ms={tpot:g}: every token would miss it"
            )
        self.options, self.targets = options, targets_of(options)
        self.revision += 1
        return answer("applied")

    def effective(self) -> dict[str, Any]:
        values: dict[str, Any] = {name: getattr(self.options, name) for name in LIVE}
        values["max_quantum_ms"] = self.options.busy_quantum_ms
        values["max_idle_quantum_ms"] = self.options.idle_quantum_ms
        return values

    def status(self) -> dict[str, Any]:
        """For ``harli status``: attainment counts requests that finished while a job was held."""
        slack = self._last_slack
        one = self.decode.estimate(1)
        return {
            "decode_ms": round(one.expected_s * 1e3, 3),
            "decode_upper_ms": round(one.upper_s * 1e3, 3),
            "slack_ms": None if slack is None or slack.bound == "none" else round(slack.seconds * 1e3, 3),
            "slack_bound": None if slack is None else slack.bound,
            "requests_finished": self.attainment.finished,
            "requests_met_tpot": self.attainment.met,
            "slo_attainment": round(self.attainment.share, 4),
        }
