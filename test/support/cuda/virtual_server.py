"""SGLang's own loop with HarliScheduler's hooks on a fake device, in virtual time.

The loop (``event_loop_overlap`` or ``event_loop_normal`` of the SGLang that is installed), the
scheduler's hooks, the trainer with a run in progress, the policy, the predictor and the timers are
the real ones.  In place of the model serving launches kernels of given lengths, and each quantum,
which really trains a tiny model, launches some besides; only these take (virtual) time.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import zmq

from sglang_harli.config import HarliOptions
from sglang_harli.core import QuantumKind
from sglang_harli.managers.scheduler.step_timer import stream_of
from sglang_harli.managers.scheduler.training.quantum_timer import make_timer
from sglang_harli.platforms.cpu.engine import CPU_ENGINE_ENV, STAND_IN
from sglang_harli.protocol import internal
from support.cuda.fake_device import FakeDevice, FakeStream, Kernel, VirtualClock
from support.plain_arguments import plain_arguments
from support.trainer.co_trainer_host import Host, Peer, batch, spec, until

ROWS, ROW_TOKENS = 8, 32  # of a micro-batch
MICRO_BATCHES = 400
TURN_S = 5e-5  # of the host, for each turn of the loop
HAND_OUT_S = 1e-4  # of the host, for a batch's tokens


@dataclass(frozen=True)
class Model:
    """What serving's batches take: seconds of the device, and ``host_s`` of the host for each."""

    decode_s: float = 0.010
    prefill_token_s: float = 1e-4
    sample_s: float = 2e-4
    host_s: float = 5e-4


@dataclass(frozen=True)
class Cost:
    """What a quantum takes: its kernels, each with ``host_s`` of the host, and seconds of the
    device."""

    kernels: int = 8
    host_s: float = 1e-5
    base_s: float = 1e-3
    token_s: float = 5e-5

    def seconds(self, tokens: int) -> float:
        return self.base_s + self.token_s * tokens


@dataclass(eq=False)
class Prompt:
    """A request, read as SGLang's Req: comes at ``at_s``, gets ``answer`` tokens."""

    at_s: float
    tokens: int = 100
    answer: int = 20
    grammar: bool = False
    token_s: list[float] = field(default_factory=list)  # when each token was handed out
    begin_s: float = 0.0  # of its prefill, on the device
    done: int = 0  # tokens of the prompt that were computed, or are by the chunk in flight
    before: int = 0  # the chunk in flight

    def __post_init__(self) -> None:
        self.origin_input_ids, self.output_ids = [1] * self.tokens, []
        self.sampling_params = SimpleNamespace(max_new_tokens=self.answer)
        self.lora_id, self.prefix_indices, self.prefix_len = None, [], 0
        self.time_stats = SimpleNamespace(
            scheduler_recv_time=0.0,
            prefill_finished_time=0.0,
            last_prefill_finished_time=0.0,
            last_decode_finish_time=0.0,
        )

    @property
    def extend_range(self) -> Any:
        return SimpleNamespace(start=self.before, end=self.done)

    @property
    def extend_end(self) -> int:
        return self.done

    def finished(self) -> bool:
        return len(self.output_ids) >= self.answer

    def take(self, now_s: float) -> None:
        """A token is handed out."""
        self.output_ids.append(1)
        self.token_s.append(now_s)
        if len(self.output_ids) == 1:
            self.time_stats.prefill_finished_time = now_s
        else:
            self.time_stats.last_decode_finish_time = now_s

    @property
    def tpot_s(self) -> float:
        return (self.token_s[-1] - self.token_s[0]) / max(len(self.token_s) - 1, 1)


class Batch:
    """Read as SGLang's ScheduleBatch."""

    def __init__(self, mode: Any, reqs: Sequence[Prompt], extend_lens: Sequence[int] = ()) -> None:
        self.forward_mode, self.reqs, self.extend_lens = mode, list(reqs), list(extend_lens)
        self.seq_lens_cpu = torch.tensor(
            [req.done if extend_lens else len(req.origin_input_ids) + len(req.output_ids) for req in reqs]
        )
        self.batch_is_full = False
        self.has_grammar = any(req.grammar for req in reqs)
        self.spec_algorithm = SimpleNamespace(is_none=lambda: True)

    def is_empty(self) -> bool:
        return not self.reqs

    def copy(self) -> Batch:
        made = Batch(self.forward_mode, self.reqs)
        made.extend_lens, made.seq_lens_cpu = self.extend_lens, self.seq_lens_cpu
        return made


@dataclass
class Launched:
    """A batch of serving that ran; ``sampled``: None until its sampling is launched."""

    batch: Batch
    kernel: Kernel
    unfinished: list[Prompt]  # whose prompts go on in another chunk
    sampled: Kernel | None = None


@dataclass(frozen=True)
class Quantum:
    """One that ran, and what stood before it on the device: the batch in flight."""

    kind: str
    tokens: int
    begin_s: float  # of the host
    kernels: Sequence[Kernel]
    behind: Launched | None


class VirtualServing:
    """What SGLang's loop calls, on the fake device; each method keeps to the order of streams and
    events of SGLang's own.  ``modes``: its ForwardMode."""

    modes: Any
    _harli: Any
    event_loop_overlap: Callable[[], None]
    event_loop_normal: Callable[[], None]

    def __init__(self, gpu: FakeDevice, model: Model, *, overlap: bool, chunk_tokens: int) -> None:
        self.gpu, self.model, self.enable_overlap = gpu, model, overlap
        self.forward_stream, self.schedule_stream, self.copy_stream = (gpu.Stream() for _ in range(3))
        self.prompts: list[Prompt] = []
        self.until_s = 0.0
        self.batches: list[Launched] = []
        self.finished: list[Prompt] = []
        self.handed_out: Launched | None = None
        self.device, self.idle_sleeper, self._engine_paused = "cuda", None, False
        self.server_args = plain_arguments(disable_overlap_schedule=not overlap)
        self.request_receiver = SimpleNamespace(recv_requests=self.receive)
        self.ipc_channels = SimpleNamespace(recv_from_tokenizer=_Socket(self))
        self.weight_updater = SimpleNamespace(offload_tags=set(), _session=None)
        self.waiting_queue, self.chunked_req, self.last_batch = [], None, None
        self.running_batch = Batch(self.modes.DECODE, [])
        self.max_prefill_tokens = self.chunked_prefill_size = chunk_tokens
        self.is_generation, self.require_mlp_sync, self.enable_unified_memory = True, False, False
        self.prefill_decode_interval = self._prefill_decode_interval_remaining = 0
        self.gracefully_exit = False

    def get_num_allocatable_reqs(self, running_bs: int) -> int:
        return 1000

    def serve(self, prompts: Sequence[Prompt], seconds: float) -> None:
        """SGLang's loop, until so many (virtual) seconds have passed."""
        self.prompts = sorted(prompts, key=lambda prompt: prompt.at_s)
        self.until_s, self.gracefully_exit = self.gpu.clock.s + seconds, False
        with self.gpu.stream(self.schedule_stream):
            if self.enable_overlap:
                self.event_loop_overlap()
            else:
                self.event_loop_normal()

    def receive(self) -> list[Prompt]:
        clock = self.gpu.clock
        clock.advance(TURN_S)
        if clock.s >= self.until_s:
            self.gracefully_exit = True
        come = [prompt for prompt in self.prompts if prompt.at_s <= clock.s]
        del self.prompts[: len(come)]
        return come

    def ingest_requests(self, stop_at_pause: bool = False) -> list[Prompt]:
        come = self.receive()
        self.process_input_requests(come)
        return come

    def process_input_requests(self, recv_reqs: list[Prompt]) -> None:
        for prompt in recv_reqs:
            prompt.time_stats.scheduler_recv_time = self.gpu.clock.s
            self.waiting_queue.append(prompt)

    def get_next_batch_to_run(self, running_batch: Batch, last_batch: Batch | None) -> Any:
        reqs = [req for req in running_batch.reqs if not req.finished()]
        if last_batch is not None and last_batch.forward_mode.is_extend():
            over = [req for req in last_batch.reqs if req is not self.chunked_req and not req.finished()]
            reqs += [req for req in over if req not in reqs]
        running = Batch(self.modes.DECODE, reqs)
        batch = self._next_prefill()
        if batch is None and reqs:
            batch = Batch(self.modes.DECODE, reqs)
        return SimpleNamespace(batch_to_run=batch, running_batch=running)

    def _next_prefill(self) -> Batch | None:
        left, reqs, lens = self.max_prefill_tokens, [], []
        queue = [self.chunked_req] if self.chunked_req is not None else []
        self.chunked_req = None
        while left and (queue or self.waiting_queue):
            req = queue.pop() if queue else self.waiting_queue.pop(0)
            tokens = min(left, req.tokens - req.done)
            req.before, req.done = req.done, req.done + tokens
            left -= tokens
            reqs.append(req)
            lens.append(tokens)
            if req.done < req.tokens:
                self.chunked_req = req
        return Batch(self.modes.EXTEND, reqs, lens) if reqs else None

    def run_batch(self, batch: Batch, pp_proxy_tensors: Any = None) -> Any:
        gpu, model = self.gpu, self.model
        gpu.clock.advance(model.host_s)
        decodes = batch.forward_mode.is_decode()
        seconds = model.decode_s if decodes else sum(batch.extend_lens) * model.prefill_token_s
        stream = self.forward_stream if self.enable_overlap else gpu.current_stream()
        if self.enable_overlap:
            stream.wait_stream(self.schedule_stream)
        kernel = gpu.launch(seconds, "decode" if decodes else "prefill", stream=stream)
        unfinished = [self.chunked_req] if not decodes and self.chunked_req in batch.reqs else []
        launched = Launched(batch, kernel, unfinished)
        for req in batch.reqs if not decodes else ():
            req.begin_s = req.begin_s or kernel.begin_s
        result = SimpleNamespace(copy_done=gpu.Event(), delay_sample_func=None, launched=launched)

        def sample() -> Any:
            launched.sampled = gpu.launch(model.sample_s, "sample")
            return result

        if batch.has_grammar and self.enable_overlap:
            result.delay_sample_func = sample
        else:
            with gpu.stream(stream):
                sample()
            self._copy_out(result, stream)
        self.batches.append(launched)
        return result

    def _copy_out(self, result: Any, stream: FakeStream) -> None:
        if self.enable_overlap:
            self.copy_stream.wait_stream(stream)
            stream = self.copy_stream
        result.copy_done.record(stream)

    def _apply_war_barrier(self) -> None:
        self.schedule_stream.wait_stream(self.forward_stream)

    def process_batch_result(self, batch: Batch, result: Any) -> None:
        result.copy_done.synchronize()
        self.gpu.clock.advance(HAND_OUT_S)
        launched = result.launched
        self.handed_out = launched
        for req in batch.reqs:
            if not req.finished() and req not in launched.unfinished:
                req.take(self.gpu.clock.s)
                if req.finished():
                    self.finished.append(req)

    def launch_batch_sample_if_needed(self, batch_result: Any, cur_batch: Any = None) -> None:
        if batch_result is None or batch_result.delay_sample_func is None:
            return
        with self.gpu.stream(self.forward_stream):
            self.forward_stream.wait_stream(self.schedule_stream)
            batch_result.delay_sample_func()
        self._copy_out(batch_result, self.forward_stream)
        batch_result.delay_sample_func = None

    def on_idle(self) -> None:
        if not self._harli.trainer.busy:  # nothing happens before the next prompt
            following = self.prompts[0].at_s if self.prompts else self.until_s
            self.gpu.clock.until(min(following, self.until_s))

    @property
    def in_flight(self) -> Launched | None:
        """The newest batch, if its tokens are not handed out."""
        newest = self.batches[-1] if self.batches else None
        return None if newest is self.handed_out else newest


@functools.cache
def scheduler_class() -> type[Any]:
    """HarliScheduler over SGLang's scheduler with VirtualServing's methods in between."""
    if "sglang" not in sys.modules:
        # SGLang decides at import which engine it is.
        with mock.patch.dict(os.environ, {CPU_ENGINE_ENV: "1"}):
            sys.path.insert(0, str(STAND_IN))
            importlib.import_module("sglang.srt.managers.scheduler")
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from sglang_harli.managers.scheduler.scheduler import HarliScheduler

    between = type("Between", (VirtualServing, Scheduler), {"modes": ForwardMode})
    # Its own constructor is that of VirtualServing: SGLang's would load a model.
    return type("VirtualScheduler", (HarliScheduler, between), {"__init__": VirtualServing.__init__})


class _Socket:
    """The tokenizer process's: says that a prompt has come before the loop has read it."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def getsockopt(self, option: int) -> int:
        prompts, now_s = self._scheduler.prompts, self._scheduler.gpu.clock.s
        return zmq.POLLIN if prompts and prompts[0].at_s <= now_s else 0


class Server:
    """A server with a job in progress.

    Args:
        made: the class of its scheduler; None: ``scheduler_class``; prefills: it computes prompts.

    Attributes:
        quanta: that ran, in order; scheduler: see ``scheduler_class``; host: the trainer's.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        model: Model | None = None,
        cost: Cost | None = None,
        overlap: bool = True,
        chunk_tokens: int = 8192,
        options: HarliOptions | None = None,
        made: type[Any] | None = None,
        prefills: bool = True,
    ) -> None:
        from sglang_harli.managers.scheduler.co_serving import CoServing

        self.gpu = FakeDevice(VirtualClock())
        self.cost = cost or Cost()
        self.quanta: list[Quantum] = []
        made = made or scheduler_class()
        with mock.patch.object(torch, "get_device_module", lambda device: self.gpu):
            self.scheduler = made(self.gpu, model or Model(), overlap=overlap, chunk_tokens=chunk_tokens)
            self.peer = Peer(run_dir)
            self.host = Host(
                run_dir,
                quantum_rows=None,
                options=options or HarliOptions(run_dir=run_dir),
                timer=make_timer("cuda", stream_of(self.scheduler), self.gpu.clock),
                now=self.gpu.clock,
            )
            self.host.side.prefills = prefills
            self.scheduler._harli = CoServing(
                self.scheduler, self.host.side, self.host.trainer, clock=self.gpu.clock
            )
        self._begin_run()

    def _begin_run(self) -> None:
        """A run whose micro-batches are all there, so that nothing comes while the loop runs."""
        host, peer = self.host, self.peer
        until(host, peer, lambda: peer.of(internal.Hello))
        peer.send(internal.StartRun(spec=spec(1, MICRO_BATCHES, batch_size=ROWS)))
        until(host, peer, lambda: peer.of(internal.RunStarted))
        training = host.trainer.run.training
        for step in range(1, MICRO_BATCHES + 1):
            peer.send(*batch(step, lengths=(ROW_TOKENS,) * ROWS))
            host.trainer.poll()
        while training.batches_ahead < MICRO_BATCHES:
            host.link.wait(0.005)
            host.trainer.poll()
        training.run = functools.partial(self._quantum, training.run)
        self.gpu.synchronize()
        self.gpu.clock.advance(10.0)  # nothing is served for a while

    def _quantum(self, run: Callable[..., Any], rows: int, **how: Any) -> Any:
        begin_s, behind = self.gpu.clock.s, self.scheduler.in_flight
        done = run(rows, **how)
        cost = self.cost
        seconds = cost.seconds(0 if done.kind is QuantumKind.EMBED else done.tokens)  # it looks up rows
        kernels = [
            self.gpu.launch(seconds / cost.kernels, f"quantum {done.kind}", host_s=cost.host_s)
            for _ in range(cost.kernels)
        ]
        self.quanta.append(Quantum(done.kind, done.tokens, begin_s, kernels, behind))
        return done

    def serve(self, prompts: Sequence[Prompt], seconds: float) -> None:
        self.scheduler.serve(prompts, seconds)

    @property
    def now_s(self) -> float:
        return self.gpu.clock.s

    def close(self) -> None:
        self.host.link.close()
        self.peer.socket.close()


@contextmanager
def server(run_dir: str, **options: Any) -> Iterator[Server]:
    """See ``Server``; closed at the end."""
    made = Server(run_dir, **options)
    try:
        yield made
    finally:
        made.close()
