"""One job, one kill at a named point, a restart, and the judgement of what came of the job."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec

from sglang_harli import run_paths
from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.errors import NotReadyError
from sglang_harli.protocol.public import Event, Job
from sglang_harli.service.jobs.folder import INCOMING, JobPaths
from sglang_harli.service.jobs.store import JobStore, sqlite_url
from support.kills.kill_cases import Case, Outcome
from support.kills.kill_targets import Rig, alive, until

ROWS = [
    {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i * i}"}]}
    for i in range(16)
]
# Six steps of two micro-batches of two rows, and four rows that are evaluated; dropout, so that the
# random generators matter.
HYPERPARAMETERS: dict[str, Any] = {
    "n_epochs": 2,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lora_r": 8,
    "lora_dropout": 0.1,
    "learning_rate": 1e-2,
    "checkpoint_every": 2,
    "seed": 5,
    "validation_split": 0.25,
    "eval_steps": 2,
}
STEPS, EVALUATED = 6, (2, 4, 6)
FINAL = {"checkpoint_every": 0, "eval_steps": 0}  # no checkpoint and no evaluation before the last step
SUBMIT_S = 180.0  # a client goes on trying, a real server takes its time to come back
JOB_S = 120.0
AGREE_S = 15.0  # copies follow the store, and shared memory is given back, a moment later


@dataclass(frozen=True)
class Result:
    """What a job has to end with, bit for bit."""

    weights: bytes
    trained_tokens: int
    losses: dict[int, float]  # by step
    evaluations: dict[int, tuple[float, float]]  # by step: valid_loss, accuracy


def reference(rig: Rig) -> Result:
    """The result of a run that nobody interrupts."""
    with FinetuneClient(rig.endpoint) as client:
        job = client.wait(client.submit(ROWS, **HYPERPARAMETERS).id, JOB_S, poll_s=0.05)
        assert job.status is JobStatus.SUCCEEDED, job.error
        events = list(client.events(job.id))
    assert job.total_steps == STEPS
    metrics = [e.data for e in events if e.type == "step_metrics"]
    losses = {m["step"]: m["loss"] for m in metrics}
    assert tuple(evaluations(events)) == EVALUATED
    return Result(weights(rig, job.id), job.trained_tokens, losses, evaluations(events))


def evaluations(events: list[Event]) -> dict[int, tuple[float, float]]:
    """By step, loss and accuracy of each evaluation."""
    found = [event.data for event in events if event.type == "eval_metrics"]
    return {data["step"]: (data["full_valid_loss"], data["valid_mean_token_accuracy"]) for data in found}


def run_case(rig: Rig, case: Case, expected: Result) -> Outcome:
    """Submit, kill at the point, start again, wait for the end, judge."""
    outcome = Outcome(rig.kind, case)
    began = time.monotonic()
    before = {record.id for record in _records(rig)}
    key = uuid.uuid4().hex
    hyperparameters = HYPERPARAMETERS | (FINAL if case.final else {})
    rig.faults.arm(case.point, case.reach)
    with ThreadPoolExecutor(1) as pool:
        submitted = pool.submit(_submit, rig.endpoint, key, hyperparameters)
        try:
            _kill_at(rig, case, submitted)
            job = _end_of(rig, submitted)
        except (TimeoutError, NotReadyError) as error:
            outcome.wrong("lost", str(error))
        else:
            outcome.attempts = job.attempt
            _judge(rig, case, job, key, before, expected, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def _submit(endpoint: str, key: str, hyperparameters: dict[str, Any]) -> Job:
    """As a client does that means it: again, with the same key, until it is answered."""
    end = time.monotonic() + SUBMIT_S
    with FinetuneClient(endpoint) as client:
        while True:
            try:
                return client.submit(ROWS, idempotency_key=key, **hyperparameters)
            except NotReadyError:
                if time.monotonic() > end:
                    raise


def _kill_at(rig: Rig, case: Case, submitted: Future[Job]) -> None:
    try:
        held = rig.faults.hit(case.point)
    except TimeoutError:
        if submitted.done():
            submitted.result()  # a refusal says more
        raise
    rig.kill(case.victim)
    if alive(held):
        rig.faults.go(case.point)
    rig.start()


def _end_of(rig: Rig, submitted: Future[Job]) -> Job:
    """The job that is over, in the store too: what clients see comes an fsync earlier."""
    job = submitted.result(SUBMIT_S)
    with FinetuneClient(rig.endpoint) as client:
        job = client.wait(job.id, JOB_S, poll_s=0.05)
    over = (job.id, job.status)
    until(lambda: over in ((r.id, r.status) for r in _records(rig)), f"{over} in the store", AGREE_S)
    return job


# ------------------------------------------------------------------ judgement
def _judge(
    rig: Rig, case: Case, job: Job, key: str, before: set[str], expected: Result, outcome: Outcome
) -> None:
    if job.status is not JobStatus.SUCCEEDED:
        outcome.wrong("lost", f"{job.id} ended as {job.status}: {job.error}")
        return
    records = _records(rig)
    missing = before - {record.id for record in records}
    undone = [record.id for record in records if record.status is not JobStatus.SUCCEEDED]
    for lost in (*missing, *undone):
        outcome.wrong("lost", f"{lost} had succeeded and has not any more")
    made = [record.id for record in records if record.id not in before]
    if made != [job.id] or [r.id for r in records if r.idempotency_key == key] != [job.id]:
        outcome.wrong("doubled", f"one submit made the jobs {made}")
    events = _events(rig, job.id)
    _judge_events(events, outcome)
    assert job.fine_tuned_model is not None
    lives = Counter(rig.registrations(job.fine_tuned_model))
    if not lives or max(lives.values()) > 1:
        outcome.wrong("doubled", f"{job.fine_tuned_model} was registered so often in each life: {lives}")
    if weights(rig, job.id) != expected.weights:
        outcome.wrong("differing", "adapter_model.safetensors is not that of an uninterrupted run")
    if job.trained_tokens != expected.trained_tokens:
        outcome.wrong("differing", f"{job.trained_tokens} tokens instead of {expected.trained_tokens}")
    for metrics in (e.data for e in events if e.type == "step_metrics"):
        if metrics["loss"] != expected.losses[metrics["step"]]:
            outcome.wrong("differing", f"the loss of step {metrics['step']}: {metrics['loss']}")
    _judge_evaluations(events, EVALUATED[-1:] if case.final else EVALUATED, expected, outcome)
    _settle(lambda: _disagreements(rig, job), outcome)
    _settle(lambda: _leftovers(rig, job.id), outcome)


def _judge_events(events: list[Event], outcome: Outcome) -> None:
    kinds = Counter(event.type for event in events)
    for kind in ("job_created", "adapter_published", "succeeded"):
        if kinds[kind] != 1:
            outcome.wrong("doubled", f"{kinds[kind]} events {kind}")
    if events[-1].type != "succeeded":
        outcome.wrong("doubled", f"after its success: {events[-1].type}: {events[-1].message}")
    steps = Counter((e.data["attempt"], e.data["step"]) for e in events if e.type == "step_metrics")
    for (attempt, step), times in steps.items():
        if times > 1:
            outcome.wrong("doubled", f"step {step} of attempt {attempt} was counted {times} times")
    for step in set(range(1, STEPS + 1)) - {step for _, step in steps}:
        outcome.wrong("lost", f"the metrics of step {step}")
    if [event.id for event in events] != list(range(1, len(events) + 1)):
        outcome.wrong("lost", f"the events have the ids {[event.id for event in events]}")


def _judge_evaluations(
    events: list[Event], steps: tuple[int, ...], expected: Result, outcome: Outcome
) -> None:
    times = Counter(event.data["step"] for event in events if event.type == "eval_metrics")
    for step in {*times, *steps}:
        if times[step] != (step in steps):
            kind = "doubled" if times[step] else "lost"
            outcome.wrong(kind, f"the evaluation of step {step}: {times[step]} events")
    for step, found in evaluations(events).items():
        if found != expected.evaluations[step]:
            outcome.wrong("differing", f"the evaluation of step {step}: {found}")


def _settle(found: Callable[[], list[str]], outcome: Outcome) -> None:
    try:
        until(lambda: not found(), "agreement", AGREE_S)
    except TimeoutError:
        for text in found():
            outcome.wrong("unclean", text)


def _disagreements(rig: Rig, job: Job) -> list[str]:
    """Between the store and its readable copies."""
    paths = JobPaths(rig.run_dir, job.id)
    stored = json.loads(msgspec.json.encode(_events(rig, job.id)))
    metrics = [
        {"event": e["id"], "time": e["created_at"], **e["data"]}
        for e in stored
        if e["type"] == "step_metrics"
    ]
    copies = {
        paths.job: (json.loads(paths.job.read_bytes()), json.loads(msgspec.json.encode(job))),
        paths.events: (list(_lines(paths.events.read_text())), stored),
        paths.metrics: (list(_lines(paths.metrics.read_text())), metrics),
    }
    return [
        f"{path.name} is not what the store says" for path, (copy, true) in copies.items() if copy != true
    ]


def _lines(text: str) -> Iterator[Any]:
    return (json.loads(line) for line in text.splitlines())


def _leftovers(rig: Rig, job: str) -> list[str]:
    paths = JobPaths(rig.run_dir, job)
    known = {record.id for record in _records(rig)}
    found = [str(p) for p in rig.run_dir.glob(f"{INCOMING}*")]
    found += [str(p) for p in rig.run_dir.glob("ftjob-*") if p.name not in known]
    found += [str(p) for p in paths.folder.rglob("*.tmp")]
    found += [str(p) for p in run_paths.shm_dir(str(rig.run_dir)).glob("*")]
    return [f"left behind: {what}" for what in (*found, *rig.strays())]


def _records(rig: Rig) -> list[Any]:
    return _read(rig, lambda store: store.jobs())


def _events(rig: Rig, job: str) -> list[Event]:
    return _read(rig, lambda store: store.events(job, 0, 10_000))


def _read(rig: Rig, what: Callable[[JobStore], list[Any]]) -> list[Any]:
    """From the store itself, beside the service."""
    store = JobStore(sqlite_url(rig.run_dir / "harli.db"))
    try:
        return what(store)
    finally:
        store.close()


def weights(rig: Rig, job: str) -> bytes:
    """The file of the trained adapter."""
    return (JobPaths(rig.run_dir, job).adapter / "adapter_model.safetensors").read_bytes()
