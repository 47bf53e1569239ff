"""What the policy needs to know of serving: targets in force, estimates, deadlines, attainment.

Requests are read by attribute (SGLang's Req: output_ids, finished(), time_stats).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from sglang_harli.config import LIVE, HarliOptions, contradiction
from sglang_harli.core import StepLoad
from sglang_harli.errors import ConfigError
from sglang_harli.managers.scheduler.policy.explanation import CONSEQUENCE, impossible
from sglang_harli.managers.scheduler.policy.slo_ledger import (
    IDLE_SEEN_S,
    Attainment,
    Backlog,
    PlainProgress,
    PrefillReserve,
    QuietSteps,
    Slack,
    Targets,
    backlog_slack,
    batch_slack,
    expecting,
    spare,
)
from sglang_harli.managers.scheduler.step_timer import BatchLoad
from sglang_harli.predictor.latency_predictor import DECODE, PREFILL, LatencyPredictor
from sglang_harli.predictor.profile.profile_table import ProfileKey
from sglang_harli.protocol import internal

logger = logging.getLogger(__name__)

CHECK_EVERY = 64  # batches that were learnt from
# While a checkpoint is written on a CPU, its writer slows the decode threads it takes turns with.
DISTURBED = 3.0


NO_TTFT = (
    "ttft-slo-ms is not promised here: a decode server's first tokens come from its prefill servers; it "
    "bounds quanta while nothing is served, at half of it"
)
FIRST_TOKEN = "harli_first_token_s"  # kept with a request of a decode server whose time SGLang sets anew


def targets_of(options: HarliOptions, *, prefills: bool = True) -> Targets:
    """The options in seconds; ``prefills``: this server computes prompts."""

    def seconds(value: float | None) -> float | None:
        return None if value is None else value / 1e3

    return Targets(
        tpot_s=options.tpot_slo_ms / 1e3,
        ttft_s=seconds(options.ttft_slo_ms) if prefills else None,
        max_itl_s=seconds(options.max_itl_ms),
        busy_quantum_s=options.busy_quantum_ms / 1e3,
        idle_quantum_s=options.idle_quantum_ms / 1e3,
    )


class Lending(Protocol):
    """What of training's memory ``harli set`` changes (``memory_pressure.MemoryPressure``)."""

    def limit_conflict(self, max_train_bytes: int | None) -> str | None: ...
    def limit(self, max_train_bytes: int | None) -> str | None: ...


class ServingState:
    """Targets and estimates of one scheduler; lives on its thread.

    Args:
        predictor: None: one that knows nothing of the model.
        profile_key: what its measured points are good for; memory: training's.
        prefills: False: a decode server of a pair, where no first token is promised.

    Attributes:
        decode_steps: while there was something to train.
        impossible: targets that serving alone cannot keep here, each with a sentence.
        last_slack: of the latest decision; idle_s: when training last ran with nothing served.
        unclocked: requests that ran and whose first token's time was not known.
        pair: of a decode server: what ``harli status`` shows of its transfers.
    """

    def __init__(
        self,
        options: HarliOptions,
        predictor: LatencyPredictor | None = None,
        profile_key: ProfileKey | None = None,
        memory: Lending | None = None,
        *,
        prefills: bool = True,
    ) -> None:
        self.options, self.memory, self.prefills = options, memory, prefills
        self.targets = targets_of(options, prefills=prefills)
        if not prefills and options.ttft_slo_ms is not None:
            logger.warning("harli: %s", NO_TTFT)
        self.revision = 0
        self.predictor = predictor or LatencyPredictor()
        self.profile_key = profile_key
        self.reserve = PrefillReserve()
        self.quiet = QuietSteps()
        self.idle_s = float("-inf")
        self.attainment = Attainment()
        self.decode_steps = self.unclocked = 0
        self.impossible: dict[str, str] = {}
        self.last_slack: Slack | None = None
        self.pair: Callable[[], dict[str, Any]] | None = None
        self._said: set[str] = set()
        self._learnt = 0
        self._last_decode = (1, 0)  # requests, tokens of context
        if predictor is not None:
            self.check_targets()

    # ---------------------------------------------------------------- measured
    def learn(self, load: BatchLoad, seconds: float) -> None:
        """A batch took ``seconds`` on the device; one that computed nothing teaches nothing."""
        if not load.new_tokens:
            return
        if load.is_decode:
            self._last_decode = load.requests, load.context_tokens
            self.predictor.observe_decode(
                load.requests,
                load.context_tokens,
                seconds,
                adapters=load.adapters,
                after_training=load.after_training,
            )
        else:
            self.predictor.observe_prefill(load.new_tokens, seconds, load.pairs)
        self._learnt += 1
        if not self._learnt % CHECK_EVERY:
            self.check_targets()

    def check_targets(self) -> None:
        """Compare the targets with what serving alone takes, where known; log a finding once."""
        predictor = self.predictor
        found = impossible(
            self.targets,
            decode_s=predictor.decode(1, 1).expected_s if predictor.known(DECODE) else None,
            prefill_s=predictor.prefill(1, 1).expected_s if predictor.known(PREFILL) else None,
        )
        for name in found.keys() - self._said:  # once a setting: near a target findings come and go
            logger.warning("harli: %s; %s", found[name], CONSEQUENCE)
        self._said |= found.keys()
        self.impossible = found

    def step(self, load: BatchLoad, seconds: float, now_s: float) -> None:
        """As ``learn``, of every batch while there is something to train."""
        self.learn(load, seconds)
        if load.is_decode:
            self.decode_steps += 1
            self.reserve.decode(now_s)
            self.quiet.decode()
        else:
            self.reserve.prefill(seconds)
            self.quiet.prefill()

    def joined(self, reqs: Iterable[Any]) -> None:
        """Requests of a decode server whose KV has come begin to run, or do so again: SGLang then
        sets the time of their first token anew."""
        for req in reqs:
            if first_s := getattr(req, FIRST_TOKEN, 0.0) or req.time_stats.decode_prebuilt_finish_time:
                setattr(req, FIRST_TOKEN, first_s)
        self.quiet.prefill()  # they come with nothing banked, as behind a prefill

    @staticmethod
    def _clock(req: Any) -> PlainProgress | None:
        stats = req.time_stats
        emitted = len(req.output_ids)
        # A retracted request keeps the time of its first token; the next one needs a prefill.
        first = stats.prefill_finished_time or getattr(req, FIRST_TOKEN, 0.0)
        # Computed elsewhere: its clock runs from this server's first result on.
        first = first or getattr(stats, "decode_prebuilt_finish_time", 0.0)
        if not emitted or not first:
            return None
        last = max(first, stats.last_prefill_finished_time, stats.last_decode_finish_time)
        return PlainProgress(first, last, emitted)

    def clocks(self, reqs: Iterable[Any]) -> tuple[list[PlainProgress], int]:
        """Clocks of the requests that go on decoding, and how many have none although they have
        tokens: of these no deadline is known."""
        clocks, unclocked = [], 0
        for req in reqs:
            if req.finished():
                continue
            clock = self._clock(req)
            if clock is not None:
                clocks.append(clock)
            elif req.output_ids:
                unclocked += 1
                self._note_unclocked(req)
        return clocks, unclocked

    def _note_unclocked(self, req: Any) -> None:
        if not getattr(req, "harli_unclocked", False):
            req.harli_unclocked = True
            self.unclocked += 1
            if self.unclocked == 1:
                logger.error(
                    "harli: SGLang does not say when request %s got its first token: training waits while such "
                    "requests run",
                    req.rid,
                )

    @staticmethod
    def context_tokens(reqs: Iterable[Any]) -> int:
        """Tokens that the next decode step of these requests attends to."""
        return sum(len(req.origin_input_ids) + len(req.output_ids) for req in reqs if not req.finished())

    def count_finished(self, reqs: Iterable[Any]) -> int:
        """How many have finished since the call before."""
        count = 0
        for req in reqs:
            if req.finished() and not getattr(req, "harli_counted", False):
                req.harli_counted = True
                count += 1
                clock = self._clock(req)
                if clock is not None:
                    self.attainment.count(clock, self.targets.tpot_s)
                elif req.output_ids:
                    self._note_unclocked(req)
                    self.attainment.miss()
        return count

    def slack(
        self,
        clocks: list[PlainProgress],
        context_tokens: int,
        now_s: float,
        queued_s: float,
        *,
        adapters: bool = False,
        disturbed: bool = False,
        backlog: Backlog | None = None,
        ahead: Backlog | None = None,
    ) -> Slack:
        """What may be spent before the next decode step, and before prompts that wait are due.

        Args:
            clocks, context_tokens: of the requests that go on decoding; adapters: one uses one.
            queued_s: training launched and not finished; disturbed: a checkpoint is being written.
            backlog: prompts that wait under a TTFT target; ahead: those of a prefill in flight.
        """
        after, alone = (
            self.predictor.decode(len(clocks), context_tokens, adapters=adapters, after_training=trained)
            for trained in (True, False)
        )
        decode_upper_s = after.upper_s * (DISTURBED if disturbed else 1.0)
        ahead_s = 0.0 if ahead is None else ahead.prefill_upper_s
        slack = batch_slack(
            clocks,
            self.targets,
            now_s=now_s,
            decode_upper_s=decode_upper_s,
            reserve_s=self.reserve.seconds(now_s, spare(self.targets, alone.expected_s)),
            queued_s=queued_s,
            prefill_s=ahead_s + (0.0 if backlog is None or not backlog.admitted else backlog.prefill_upper_s),
        )
        slack = expecting(
            slack,
            self.targets,
            decode_s=alone.expected_s,
            steps_between_prefills=self.quiet.steps,
            decode_penalty_s=max(after.expected_s - alone.expected_s, 0.0),
            idle_comes=now_s - self.idle_s < IDLE_SEEN_S,
        )
        found = [slack]
        if backlog is not None:
            reserve_s = self.reserve.seconds(now_s)
            found.append(self._waits(backlog, now_s, queued_s + ahead_s, decode_upper_s, reserve_s))
        if ahead is not None and self.targets.ttft_s is not None:
            found.append(self._waits(ahead, now_s, queued_s))
        slack = min(found, key=lambda each: each.seconds)
        for bound in ("tpot", "itl"):
            if clocks and bound in self.impossible:
                slack = Slack(min(slack.seconds, 0.0), bound)
        self.last_slack = slack
        return slack

    def _waits(
        self,
        backlog: Backlog,
        now_s: float,
        before_s: float,
        decode_upper_s: float = 0.0,
        reserve_s: float = 0.0,
    ) -> Slack:
        return backlog_slack(
            backlog,
            self.targets,
            now_s=now_s,
            decode_upper_s=decode_upper_s,
            reserve_s=reserve_s,
            queued_s=before_s,
        )

    # ---------------------------------------------------------------- harli set, harli status, harli profile
    def profile(self) -> dict[str, Any] | None:
        """The measured loads as a profile table, and the path where the next start looks for it."""
        if self.profile_key is None:
            return None
        table = self.predictor.points.table(self.profile_key)
        return {"path": self.options.profile_path, "table": table.document()}

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
        if text := contradiction(options.max_itl_ms, options.tpot_slo_ms):
            return answer("conflict", text)
        memory = self.memory if "max_train_mem" in message.values else None
        if memory is not None and (text := memory.limit_conflict(options.max_train_bytes)):
            return answer("conflict", text)
        self.options, self.targets = options, targets_of(options, prefills=self.prefills)
        self.revision += 1
        self._said = set()
        self.check_targets()
        later = memory.limit(options.max_train_bytes) if memory is not None else None
        if later:
            return answer("deferred", later)
        said = [*self.impossible.values(), CONSEQUENCE] if self.impossible else []
        if not self.prefills and message.values.get("ttft_slo_ms") is not None:
            said.insert(0, NO_TTFT)
        return answer("applied", "; ".join(said))

    def effective(self) -> dict[str, Any]:
        values: dict[str, Any] = {name: getattr(self.options, name) for name in LIVE}
        values["max_quantum_ms"] = self.options.busy_quantum_ms
        values["max_idle_quantum_ms"] = self.options.idle_quantum_ms
        return values

    def status(self) -> dict[str, Any]:
        """For ``harli status``: attainment counts requests that finished while a job was held."""
        slack = self.last_slack
        decode = self.predictor.decode(*self._last_decode)
        return {
            "decode_ms": round(decode.expected_s * 1e3, 3),
            "decode_upper_ms": round(decode.upper_s * 1e3, 3),
            "slack_ms": None if slack is None or slack.bound == "none" else round(slack.seconds * 1e3, 3),
            "slack_bound": None if slack is None else slack.bound,
            "requests_finished": self.attainment.finished,
            "requests_met_tpot": self.attainment.met,
            "requests_without_clock": self.unclocked,
            "impossible_targets": list(self.impossible.values()),
            "slo_attainment": round(self.attainment.share, 4),
            "prediction": self.predictor.summary(),
            **({} if self.pair is None else {"disaggregation": self.pair()}),
        }


@dataclass(frozen=True, slots=True)
class Boundary:
    """What is served, between two of its steps: ``slotting.Serving``.

    Attributes:
        clocks, context_tokens, adapters, backlog: as ``ServingState.slack`` takes them.
        unclocked: requests that go on decoding and have no clock.
        waiting: counts the prompts that training stops for at once; asked before each decision.
        ahead: prompts of a prefill in flight: training waits until their first tokens are out.
    """

    side: ServingState
    clocks: list[PlainProgress]
    context_tokens: int
    adapters: bool
    backlog: Backlog | None
    waiting: Callable[[], int]
    ahead: Backlog | None = None
    unclocked: int = 0

    @property
    def targets(self) -> Targets:
        return self.side.targets

    @property
    def running(self) -> int:
        return len(self.clocks) + self.unclocked

    def load(self) -> StepLoad:
        promised = 0 if self.backlog is None else self.backlog.prompts
        waiting = self.waiting() if self.ahead is None else self.waiting() + self.ahead.prompts
        return StepLoad(self.running, self.context_tokens, waiting, promised, self.unclocked)

    def slack(self, now_s: float, queued_s: float, *, disturbed: bool) -> Slack:
        return self.side.slack(
            self.clocks,
            self.context_tokens,
            now_s,
            queued_s,
            adapters=self.adapters,
            disturbed=disturbed,
            backlog=self.backlog,
            ahead=self.ahead,
        )
