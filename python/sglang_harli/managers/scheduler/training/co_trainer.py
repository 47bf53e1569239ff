"""Runs quanta, owns the run in progress, answers the service (docs/internals/run-protocol.md).

Everything happens on the scheduler's thread, between its steps: nothing blocks, touches a disk, a
tokenizer or JSON. An error in a quantum or a control message fails that run, gives its memory back
and leaves serving alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from sglang_harli.core import Claim, Decision, QuantumKind, QuantumOffer, Reason, SubState
from sglang_harli.errors import HarliError
from sglang_harli.managers.scheduler.memory.memory_pressure import MemoryPressure
from sglang_harli.managers.scheduler.policy.slotting import Slotting
from sglang_harli.managers.scheduler.service_link import ServiceLink
from sglang_harli.managers.scheduler.training import quantum_prices
from sglang_harli.managers.scheduler.training.active_run import ActiveRun
from sglang_harli.managers.scheduler.training.failures import describe, forget, lacked_memory, passes
from sglang_harli.managers.scheduler.training.parity import Parity
from sglang_harli.managers.scheduler.training.quantum_timer import DeviceQuantumTimer, HostQuantumTimer, Work
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.protocol import internal
from sglang_harli.protocol.base_print import difference

if TYPE_CHECKING:  # it imports sglang, which a host without a server does not need
    from sglang_harli.managers.scheduler.training.adapter_loader import AdapterLoader

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.5
PULSE_EVERY_S = 2.0
ASK_MEMORY_EVERY_S = 0.01  # a run that waits for it
_OF_NO_RUN = (QuantumKind.ADAPTER, QuantumKind.COPY, QuantumKind.CHECK)  # they show no sub-state
ENDING = "the server is ending"
NOT_KNOWN = "it is not known which weights are served since their last update"
UPDATING = "the served weights are being updated (/end_weight_update has not come)"
TAKE_PRINT_EVERY_S = 5.0  # while it fails
KNOWN_RUNS = 1024  # jobs whose newest attempt is remembered, to tell a late StartRun


class _Tick(internal.Message):
    """Not from the service: collect what the device has finished."""


_TICK = _Tick()


class CoTrainer:
    """The scheduler's trainer.

    Args:
        limits: sent with the hello; the memory budget is checked again when a run starts.
        open_link: opens the ipc pair, which asks for hellos of the moment.
        loader: loads finished adapters into serving; None on a host that does not serve.
        clock: measures quanta; on CUDA it also puts them on the stream of SGLang's forwards.
        quantum_rows: a fixed split, or None; parity: None: training is not compared with serving.
        take_print: takes the print of ``base`` (waits for the device); None: never asked for.
        make_hello: what is in force in the scheduler; the trainer adds what it knows.
        set_options, status: what the scheduler does for ``harli set`` and ``harli status``.
        now: seconds, that of the requests' times.
    """

    def __init__(
        self,
        base: FrozenBase,
        limits: internal.ServedLimits,
        open_link: Callable[[Callable[[], internal.Hello]], ServiceLink],
        loader: AdapterLoader | None,
        predictor: LatencyPredictor,
        clock: HostQuantumTimer | DeviceQuantumTimer,
        pressure: MemoryPressure,
        *,
        quantum_rows: int | None,
        parity: Parity | None = None,
        take_print: Callable[[], internal.BasePrint] | None = None,
        make_hello: Callable[[], internal.Hello],
        set_options: Callable[[internal.SetOptions], internal.OptionsSet],
        status: Callable[[], dict[str, Any]],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.base, self.limits, self.loader = base, limits, loader
        self.link, self._make_hello = open_link(self.hello), make_hello
        self.predictor, self.clock, self.pressure = predictor, clock, pressure
        self._now = now
        self.quantum_rows = quantum_rows
        self.run: ActiveRun | None = None
        self.held = False  # /pause_generation pauses training too
        self.released = False  # see ``memory_released``
        self._holds: dict[str, str] = {}  # who keeps runs from starting, and why
        self.parity, self.take_print = parity, take_print
        self.base_print = take_print() if take_print is not None else None
        self._take_print_at = 0.0
        self._told_hold = self.hold
        self.updates = 0  # of the served weights, since the start
        self._apply_options, self._status = set_options, status
        self._sub_state = (SubState.TRAINING.value, "")
        self._told_at = self._ask_memory_at = self._pulse_at = 0.0
        self._attempts: dict[str, int] = {}  # the newest attempt of each job that was held here, or stopped
        self.quanta, self.busy_quanta, self.train_s = 0, 0, 0.0
        self.slotting = Slotting(self, now)
        self._handlers: dict[type, Callable[[Any, list[memoryview]], None]] = {
            internal.StartRun: self._start,
            internal.MicroBatch: self._about_run,
            internal.SnapshotSlot: self._about_run,
            internal.SnapshotSaved: self._about_run,
            internal.StopRun: self._stop,
            internal.StatusRequest: self._status_request,
            internal.SetOptions: self._set_options,
            _Tick: self._settle,
        }

    # ---------------------------------------------------------------- the service's messages
    def hello(self) -> internal.Hello:
        """What the service is to know: limits, base, and the run in progress with how far it is."""
        message = self._make_hello()
        message.limits, message.hold = self.limits, self.hold
        message.base, message.updates = self.base_print, self.updates
        if (run := self.run) is not None:
            message.job, message.attempt = run.spec.job, run.spec.attempt
            message.step, message.taken = run.training.applied_step, run.training.taken
            message.next_cursor = run.training.next_cursor
        return message

    def poll(self, *, serving: bool = False) -> None:
        """Take what the service has sent, each loop turn; ``serving``: one micro-batch at most."""
        arrived = self.link.poll(1) if serving else self.link.poll()
        if self.run is None and not arrived and not self._print_lacks:
            return
        if self._print_lacks and time.monotonic() >= self._take_print_at:
            self._take_print()
            if not self._print_lacks:
                self._say_base()
        if self.run is not None and (now_s := time.monotonic()) - self._pulse_at >= PULSE_EVERY_S:
            self._pulse_at = now_s
            self.run.pulse()
        if self.run is not None and (self.run.training.finished or self.run.training.settling):
            arrived.append((_TICK, []))  # no quantum comes to collect metrics behind
        for message, frames in arrived:
            try:
                self._handlers[type(message)](message, frames)
            except Exception as error:  # boundary: a message fails its run; the scheduler's loop goes on
                logger.exception("harli: %s could not be handled", type(message).__name__)
                if isinstance(message, internal.StartRun) and self.run is None:
                    spec = message.spec
                    self._report_failure(spec.job, spec.attempt, message.step, message.step, error)
                elif not isinstance(message, internal.StatusRequest | internal.SetOptions):
                    self.fail(error)  # those two are no business of the run

    def _current(self, message: Any) -> ActiveRun | None:
        """The run a message is about; messages of another job or an older attempt are dropped."""
        run = self.run
        if run is None or (message.job, message.attempt) != (run.spec.job, run.spec.attempt):
            return None
        return run

    def _start(self, message: internal.StartRun, _frames: list[memoryview]) -> None:
        spec = message.spec
        late = spec.attempt <= self._attempts.get(spec.job, 0)  # that run is held, or over
        if late or message.scheduler not in (0, os.getpid()):
            return
        if self.hold or message.updates != self.updates:  # the service has not read that yet
            self.link.say_hello()
            return
        self._note(spec.job, spec.attempt)
        if self.run is not None:
            self._release()  # the store wants another run
        memory, cpu = self.pressure.memory, self.base.device.type == "cpu"
        working = None if cpu else self.pressure.reserve_bytes or None
        with self.clock.on_stream():
            self.run = ActiveRun(
                self.base, message, self.limits, self.link, self.quantum_rows, memory, working_bytes=working
            )
        self.pressure.attach(self.run.training, spec.memory_bytes, self._give_up)

    @property
    def hold(self) -> str:
        """Why no run starts now, for the hello; ``""``: it may."""
        for reason in (self._holds.get(ENDING), *self._holds.values()):
            if reason:
                return reason
        if self._print_lacks:
            return NOT_KNOWN
        return self.parity.hold if self.parity is not None else ""

    def hold_runs(self, reason: str, by: str = "") -> None:
        """No run starts now, for a reason that queued jobs show; ``""``: ``by`` has none."""
        if reason:
            self._holds[by] = reason
        else:
            self._holds.pop(by, None)
        self.hold_changed()

    def hold_changed(self) -> None:
        """Tell the service, if it is so."""
        before, self._told_hold = self._told_hold, self.hold
        if self.hold != before:
            self.link.say_hello()

    def weights_change(self) -> None:
        """An update of the served weights in several requests has begun: no run starts until
        ``weights_updated``, and what is served meanwhile has no print."""
        self.hold_runs(UPDATING, by=UPDATING)

    def weights_updated(self) -> None:
        """SGLang has written to the served weights. A run goes on only where the print is the same
        (SGLang may have its memory back, though updates are refused)."""
        self.updates += 1
        self._holds.pop(UPDATING, None)  # its reason follows with the print
        if self.parity is not None:
            self.parity.weights_updated()
        before, self.base_print = self.base_print, None  # where it cannot be taken no run starts
        try:
            self._take_print()
        finally:
            now = self.base_print
            if self._print_lacks or (before is not None and now is not None and difference(before, now)):
                self._give_up("the served weights were updated")
            self._say_base()

    @property
    def _print_lacks(self) -> bool:
        return self.take_print is not None and self.base_print is None

    def _take_print(self) -> None:
        """The print of what is served now; tried again where it fails (for lack of memory, say)."""
        if self.take_print is None:
            return
        self._take_print_at = time.monotonic() + TAKE_PRINT_EVERY_S
        try:
            self.base_print = self.take_print()
        except (HarliError, MemoryError, RuntimeError, ValueError) as error:
            logger.error(
                "harli: %s, which is looked at again: %s: %s", NOT_KNOWN, type(error).__name__, error
            )
            forget(error, self.base.device)

    def _say_base(self) -> None:
        self._told_hold = self.hold
        self.link.say_hello()

    def _note(self, job: str, attempt: int) -> None:
        self._attempts[job] = max(attempt, self._attempts.pop(job, 0))
        if len(self._attempts) > KNOWN_RUNS:
            del self._attempts[next(iter(self._attempts))]

    def _about_run(self, message: Any, frames: list[memoryview]) -> None:
        run = self._current(message)
        if run is None:
            return
        if isinstance(message, internal.MicroBatch):
            run.training.feed(message, *(np.frombuffer(f, dtype=np.int32) for f in frames))
        elif isinstance(message, internal.SnapshotSlot):
            run.take_slot(message.slot)
        elif run.saved(message):
            self._release()

    def _settle(self, _message: _Tick, _frames: list[memoryview]) -> None:
        if self.run is not None and self.run.settled():
            self._release()

    def _stop(self, message: internal.StopRun, _frames: list[memoryview]) -> None:
        run = self._current(message)
        if run is None:
            self._note(message.job, message.attempt)  # a StartRun that is late comes too late
            self.link.send(internal.RunStopped(job=message.job, attempt=message.attempt, step=0))
        elif run.stop(message.snapshot):
            self._release()

    def _status_request(self, message: internal.StatusRequest, _frames: list[memoryview]) -> None:
        self.link.send(internal.StatusReport(request=message.request, **self.whole_status()))

    def _set_options(self, message: internal.SetOptions, _frames: list[memoryview]) -> None:
        answer = self._apply_options(message)
        self.link.send(answer)
        if "max_train_mem" in message.values and answer.outcome in ("applied", "deferred"):
            self.limits = msgspec.structs.replace(self.limits, train_memory_bytes=self.pressure.ever_bytes)
            self.link.say_hello()  # submissions are checked against the limits that it brings

    # ---------------------------------------------------------------- quanta
    @property
    def busy(self) -> bool:
        """Whether there is a run, an adapter to load or a comparison (asked every loop turn)."""
        return self.run is not None or self._loading or (self.parity is not None and self.parity.pending)

    @property
    def _loading(self) -> bool:
        return self.loader is not None and self.loader.pending

    @property
    def saving(self) -> bool:
        """Whether the service is writing a snapshot on the cores that serving computes on."""
        return self.run is not None and self.run.saving and self.limits.device == "cpu"

    @property
    def training(self) -> bool:
        return self.run is not None

    def offer(self) -> QuantumOffer | None:
        """The next quantum and its price, or None when there is nothing to do now."""
        if self._loading:
            return self._single(QuantumKind.ADAPTER)
        run = self.run
        if self.released:
            return None
        if run is not None and run.copying:
            if run.trains_next and (offer := self._run_offer(run)) is not None:
                return offer
            return self._single(QuantumKind.COPY) if self.run is run and run.copy_ready else None
        return self._run_offer(run)

    def _run_offer(self, run: ActiveRun | None) -> QuantumOffer | None:
        """A quantum of training, or of the comparison with serving."""
        finishing = run is not None and run.finishing
        if self.held and not finishing:
            return None
        if not finishing and (offer := self._comparison(Claim.POLICY)) is not None:
            return offer
        if run is None:
            return None
        if run.lacks_memory and time.monotonic() < self._ask_memory_at:
            return None
        offer = self._training_offer(run, Claim.POLICY)
        if offer is None and self.run is not None:
            self._wait(run)
        return offer

    def claimed(self) -> QuantumOffer | None:
        """What may run whatever waits: loading of adapters, copies of the state, the comparison
        with serving, and, so that a pause ends, the optimizer's slices behind the first."""
        if self.loader is not None and self.loader.urgent:
            return self._single(QuantumKind.ADAPTER, Claim.EVERY_STEP)
        run = self.run
        if run is not None and not self.released:
            if run.copying and run.copy_ready:
                return self._single(QuantumKind.COPY, Claim.SHARE)
            if run.finishing and (offer := self._training_offer(run, Claim.SHARE)) is not None:
                return offer
        if self._loading:
            return self._single(QuantumKind.ADAPTER, Claim.SHARE)
        return None if self.held else self._comparison(Claim.SHARE)

    @property
    def barred(self) -> Reason | None:
        """Why nothing is offered although there is a run."""
        if self.run is None:
            return None
        if self.released:
            return Reason.MEMORY_RELEASED
        return Reason.PAUSED if self.held and not (self.run.copying or self.run.finishing) else None

    def memory_released(self, released: bool) -> None:
        """SGLang has unmapped its memory, weights or KV cache, or has it again."""
        if released != self.released:
            self.released = released
            self.hold_runs(str(Reason.MEMORY_RELEASED) if released else "", by="memory")

    def _comparison(self, claim: Claim) -> QuantumOffer | None:
        if self.parity is None or not self.parity.pending:
            return None
        offer = self.parity.offer(self.predictor, claim)
        if offer is None:
            self.hold_changed()  # the result may have come
        return offer

    def _training_offer(self, run: ActiveRun, claim: Claim) -> QuantumOffer | None:
        try:
            shape = run.next_shape()
        except (HarliError, MemoryError, RuntimeError) as error:  # of the memory that it asks for
            logger.exception("harli: training's memory is not available")
            self.fail(error)
            return None
        if shape is None:
            return None
        return quantum_prices.offer_of(self.predictor, run.training, shape, claim)

    def _single(self, kind: QuantumKind, claim: Claim = Claim.POLICY) -> QuantumOffer:
        return quantum_prices.single(self.predictor, kind, claim)

    def _wait(self, run: ActiveRun) -> None:
        if not run.lacks_memory:
            self._enter(*run.waiting_for())
            return
        now_s = time.monotonic()
        self._ask_memory_at = now_s + ASK_MEMORY_EVERY_S
        if self._may_tell(now_s):  # the reason is worked out only where it is shown
            self._enter(SubState.WAITING_MEMORY, self.pressure.waiting() or "")

    def tick(self, *, idle: bool = False) -> None:
        """Training's memory, once a turn while a run is held; ``idle``: nothing is served."""
        try:
            self.pressure.tick(idle=idle)
        except HarliError as error:  # the pool's books do not agree: training ends, serving goes on
            logger.exception("harli: the pool of memory is not in order")
            self.fail(error)

    def cut(self, kind: QuantumKind) -> bool:
        """Offer less of ``kind``; False: it is as small as it can be."""
        return self.run is not None and self.run.training.cut(kind)

    def relax(self, kind: QuantumKind, now_s: float) -> None:
        """The estimate of ``kind`` alone holds training back: doubt it."""
        self.predictor.relax(kind, now_s)

    def yields(self, reason: Reason) -> None:
        """Show why it does not run."""
        self._enter(SubState.YIELDING, reason)

    def run_quantum(self, offer: QuantumOffer, decision: Decision) -> None:
        """Run (on CUDA: launch) the quantum that was decided."""
        begin = self._now()
        try:
            with self.clock.span():
                work = self._run(offer.kind, decision)
        except Exception as error:  # boundary: a quantum fails its run; serving goes on
            logger.exception("harli: a training quantum (%s) failed", offer.kind.value)
            # Where another job's adapter failed to load, or a comparison failed, the run goes on.
            if offer.kind is QuantumKind.CHECK and self.parity is not None:
                self.parity.fail(describe(error)[1])
                self.hold_changed()
                forget(error, self.base.device)
            elif offer.kind is not QuantumKind.ADAPTER and not self._shrunk(offer.kind, error):
                self.fail(error)
            return
        upper_s = dict(offer.candidates).get(decision.rows, offer.candidates[-1][1])
        self.clock.close(work, lambda: quantum_prices.left_when_launched(self.predictor, work, upper_s))
        now_s = self._now()
        quantum_prices.learn(self.predictor, self.clock.take())
        if offer.kind is not QuantumKind.CHECK:
            self.quanta += 1
            self.busy_quanta += decision.reason is not Reason.IDLE
            self.train_s += now_s - begin
        if self.run is not None and offer.kind not in _OF_NO_RUN:
            self._enter(SubState.TRAINING, decision.reason)

    def _shrunk(self, kind: QuantumKind, error: Exception) -> bool:
        """Whether the run goes on with smaller quanta, after one that had no memory."""
        run = self.run
        if run is None or kind is QuantumKind.COPY or not lacked_memory(error) or not run.training.shrink():
            return False
        logger.warning("harli: training goes on with smaller quanta, for there was no memory for this one")
        forget(error, self.base.device)
        return True

    @property
    def depth(self) -> int:
        """Quanta that are launched before the first is over, while nothing is served."""
        return self.clock.depth

    @property
    def queued_s(self) -> float:
        """Upper bound of the training that is launched and not finished, seconds."""
        return self.clock.queued_s

    @property
    def expected_queued_s(self) -> float:
        """What is expected of it."""
        return self.clock.expected_queued_s

    def settle(self, most_s: float | None = None) -> None:
        """Idle: let the device catch up, until at most ``most_s`` are queued."""
        self.clock.settle(most_s)

    def _run(self, kind: QuantumKind, decision: Decision) -> Work:
        if kind is QuantumKind.ADAPTER:
            assert self.loader is not None
            self.loader.run_slice()
            return Work(kind, 1)
        if kind is QuantumKind.CHECK:
            assert self.parity is not None
            work = self.parity.run(decision.rows)
            self.hold_changed()
            return work
        run = self.run
        assert run is not None
        if run.copying and (kind is QuantumKind.COPY or not run.copies_beside):
            return Work(kind, min(run.copy_slice(), 1))
        done = run.training.run(decision.rows, idle=decision.reason is Reason.IDLE)
        if run.after_quantum():
            self._release()
        tokens = 0 if done.misleads else max(done.tokens, 1)  # 1 for kinds that are not cut by rows
        return Work(kind, tokens, done.row_tokens, done.first_of_shape)

    # ---------------------------------------------------------------- ends of a run
    def _release(self) -> None:
        """Give the run's memory back."""
        run, self.run = self.run, None
        if run is not None:
            run.release()
            self.pressure.detach()
            self._told_at = 0.0
            self.slotting.yielded.end(self._now())

    def _give_up(self, reason: str) -> None:
        """Requests need the run's memory: it resumes from its checkpoint when there is memory."""
        run = self.run
        if run is not None:
            run.give_up(reason)
            self._release()

    def fail(self, error: Exception) -> None:
        """End the run in progress, if there is one, and say why."""
        run = self.run
        if run is None:
            return
        job, attempt, step = run.spec.job, run.spec.attempt, run.training.applied_step
        after, evaluated = run.reported_step, run.reported_evaluation
        self._release()
        self._report_failure(job, attempt, step, after, error, evaluated)

    def _report_failure(
        self, job: str, attempt: int, step: int, after: int, error: Exception, evaluated: int = 0
    ) -> None:
        code, text = describe(error)
        failed = internal.RunFailed(job=job, attempt=attempt, step=step, code=code, message=text, after=after)
        failed.evaluated = evaluated
        failed.passing = passes(error)
        self.link.send(failed)
        forget(error, self.base.device)

    def end_soon(self) -> None:
        """The server is to end: no run starts; the one in progress only saves its state."""
        self.hold_runs(ENDING, by=ENDING)
        if self.run is not None and self.run.end(ENDING):
            self._release()

    def shutdown(self, limit_s: float) -> None:
        """Graceful end: save a step that is newer than the last checkpoint, if time allows."""
        run = self.run
        if run is None:
            return
        try:
            with self.clock.on_stream():  # behind the quanta that are not over
                if not run.final_snapshot():
                    return
        except HarliError as error:  # the run had failed, and the last metrics say so now
            self.fail(error)
            return
        deadline = time.monotonic() + limit_s
        while self.run is not None and time.monotonic() < deadline:
            self.link.wait(0.05)
            self.poll()

    # ---------------------------------------------------------------- what is shown
    def _may_tell(self, now_s: float) -> bool:
        return now_s - self._told_at >= PROGRESS_EVERY_S

    def _enter(self, sub_state: str, reason: str) -> None:
        run = self.run
        if run is None:
            return
        now_s = time.monotonic()
        if not self._may_tell(now_s):
            return
        self._told_at = now_s
        self._sub_state = (str(sub_state), str(reason))
        self.link.send(
            internal.Progress(
                job=run.spec.job,
                attempt=run.spec.attempt,
                step=run.training.applied_step,
                sub_state=str(sub_state),
                reason=str(reason),
                tokens=run.training.tokens,
            )
        )

    def whole_status(self) -> dict[str, Any]:
        """Of serving, training and the pool."""
        serving = self._status()
        if self.parity is not None:
            serving["parity"] = self.parity.status()
        return {"serving": serving, "training": self.status(serving), "pool": self.pressure.status()}

    def status(self, serving: dict[str, Any]) -> dict[str, Any] | None:
        """For ``harli status``; ``serving``: what it shows of serving."""
        return None if self.run is None else self.run.status(*self._sub_state, serving) | self.totals()

    def totals(self) -> dict[str, Any]:
        """What was counted since this trainer began."""
        yielded = self.slotting.yielded.totals(self._now())
        return {
            "quanta": self.quanta,
            "busy_quanta": self.busy_quanta,
            "probes": self.slotting.probes,
            "train_s": round(self.train_s, 3),
            "yield_s": {str(why): round(seconds, 3) for why, seconds in yielded.items()},
            "costs": self.predictor.costs(),
        }
