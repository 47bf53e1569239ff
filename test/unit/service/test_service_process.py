"""The real finetune service: jobs from submission to publication, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sglang_harli import names, run_paths
from sglang_harli.errors import ConfigError, DataError, HarliError, NotFoundError, StateError
from support.service.scheduler_peer import SchedulerPeer
from support.service.service_fixture import exchange, pairs, submit_args, until
from support.service.service_peers import ServiceProcess


# ------------------------------------------------------------------ the whole way
def test_from_submit_to_succeeded(rig):
    job = rig.client.submit(pairs(), suffix="t", n_epochs=2, checkpoint_every=3)
    assert (job.status, job.step, job.trained_tokens, job.total_steps) == ("queued", 0, 0, 10)
    done = rig.done(job)
    assert done.step == done.total_steps == 10
    assert done.trained_tokens == 2 * done.data["tokens"]
    assert done.fine_tuned_model == f"tiny-ft-t-{names.short_id(job.id)}"
    events = list(rig.client.events(job.id))
    assert [e.id for e in events] == list(range(1, len(events) + 1))
    kinds = [e.type for e in events]
    assert kinds[:4] == ["job_created", "data_validated", "queued", "started"]
    assert kinds[-3:] == ["adapter_saved", "adapter_published", "succeeded"]
    assert [e.data["step"] for e in events if e.type == "step_metrics"] == list(range(1, 11))
    folder = rig.folder(job)
    copies = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [c["id"] for c in copies] == [e.id for e in events]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 11))
    assert json.loads((folder / "job.json").read_text())["status"] == "succeeded"
    kept = {p.name for p in (folder / "checkpoints").iterdir()}
    assert "step-10" in kept and len(kept) <= 2
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert np.array_equal(*saved.values(), rig.result(done))
    assert rig.scheduler.farthest_ahead <= 2
    until(lambda: not rig.scheduler.ring, "the last acknowledgement")
    assert list(run_paths.shm_dir(str(rig.run_dir)).glob("slot-*")) == []


def test_one_run_at_a_time_in_order(rig):
    rig.scheduler.hold.clear()
    jobs = [rig.client.submit(pairs(4), n_epochs=1) for _ in range(3)]
    rig.status(jobs[0], "running")
    assert [rig.client.get(j.id).status for j in jobs[1:]] == ["queued", "queued"]
    assert rig.client.pause(jobs[1].id).status == "paused"
    assert rig.client.resume(jobs[1].id).status == "queued"  # back at its old place
    rig.scheduler.hold.set()
    ends = [rig.done(job).finished_at for job in jobs]
    assert ends == sorted(ends)


def test_pause_and_resume_end_where_an_uninterrupted_run_does(rig):
    whole = rig.result(rig.done(rig.client.submit(pairs(), n_epochs=3, seed=7)))
    rig.scheduler.step_s = 0.03
    job = rig.client.submit(pairs(), n_epochs=3, seed=7)
    rig.at_step(job, 4)
    paused = rig.client.pause(job.id)
    assert paused.status == "paused" and 4 <= paused.step < 15
    assert rig.client.pause(job.id).step == paused.step
    assert rig.client.resume(job.id).status in ("queued", "running")
    rig.at_step(job, paused.step + 2)
    rig.client.pause(job.id)
    rig.client.resume(job.id)
    done = rig.done(job)
    assert done.attempt == 3
    assert np.array_equal(rig.result(done), whole)
    assert done.trained_tokens == 3 * done.data["tokens"]
    steps = [e.data["step"] for e in rig.client.events(job.id) if e.type == "step_metrics"]
    assert steps == list(range(1, 16))


def test_cancel_in_every_state(rig):
    rig.scheduler.hold.clear()
    running = rig.client.submit(pairs(), checkpoint_every=1)
    queued, paused = rig.client.submit(pairs(4)), rig.client.submit(pairs(4))
    rig.status(running, "running")
    rig.client.pause(paused.id)
    for job in (queued, paused, running):
        assert rig.client.cancel(job.id).status == "cancelled"
        assert rig.client.cancel(job.id).status == "cancelled"
        with pytest.raises(StateError, match="is cancelled"):
            rig.client.resume(job.id)
    until(lambda: rig.scheduler.spec is None, "the end of the run")


def test_a_run_that_fails_says_why_and_the_next_one_goes_on(rig):
    rig.scheduler.fail_at = 3
    failed = rig.done(rig.client.submit(pairs()), "failed")
    assert failed.error.code == "out_of_memory" and "lower batch_size" in failed.error.message
    rig.scheduler.fail_at = None
    rig.done(rig.client.submit(pairs(4)))


def test_publication_is_tried_again_and_then_fails_clearly(rig):
    rig.http.refuse = 1
    done = rig.done(rig.client.submit(pairs(4)))
    assert any("no room for it" in e.message for e in rig.client.events(done.id) if e.level == "warn")
    rig.http.refuse = 3
    failed = rig.done(rig.client.submit(pairs(4)), "failed")
    assert failed.error.code == "publication_failed" and "no room for it" in failed.error.message
    assert (rig.folder(failed) / "adapter" / "adapter_model.safetensors").exists()
    assert failed.fine_tuned_model is None


def test_an_evicted_adapter_is_published_again(rig):
    done = rig.done(rig.client.submit(pairs(4)))
    before = rig.http.publications.count(done.fine_tuned_model)
    rig.http.want("nobody-ft-00000000")
    rig.http.want(done.fine_tuned_model)
    until(lambda: rig.http.publications.count(done.fine_tuned_model) > before, "another publication")
    assert rig.client.get(done.id).status == "succeeded"


# ------------------------------------------------------------------ what is refused
def test_a_bad_file_names_every_bad_line_and_creates_no_job(rig):
    lines = [json.dumps(row) for row in pairs(10)]
    lines[6] = '{"messages": [}'
    lines[8] = '{"messages": []}'
    before = len(rig.client.list())
    with pytest.raises(DataError, match=r"line 7: .*line 9: ") as caught:
        rig.client.submit("\n".join(lines).encode())
    assert [row["line"] for row in caught.value.details] == [7, 9]
    assert len(rig.client.list()) == before
    assert not [p for p in rig.run_dir.iterdir() if p.name.startswith(".incoming")]
    assert len(list(rig.run_dir.glob("ftjob-*"))) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_r": 64}, "lora_r=64.*rank at most 16"),
        ({"max_seq_length": 129}, "max_seq_length=129.*limit is 128"),
        ({"batch_size": 4096, "lora_r": 16}, None),
    ],
)
def test_a_job_beyond_what_is_served_is_refused(rig, values, message):
    if message is None:  # plenty of memory here
        rig.client.cancel(rig.client.submit(pairs(4), **values).id)
        return
    with pytest.raises(ConfigError, match=message):
        rig.client.submit(pairs(4), **values)


def test_rows_over_the_limit(rig):
    asked = {"role": "user", "content": "word " * 200}
    rows = [*pairs(3), {"messages": [asked, {"role": "assistant", "content": "x"}]}]
    with pytest.raises(DataError, match=r"line 4: \d+ tokens, the limit is 128"):
        rig.client.submit(rows)
    job = rig.client.submit(rows, on_overflow="drop")
    assert (job.data["rows"], job.data["dropped"]) == (3, 1)
    assert any("1 rows over 128 tokens dropped" in e.message for e in rig.client.events(job.id))
    rig.done(job)


def test_a_job_accepted_before_the_model_was_up_fails_at_its_start_with_the_same_message(own):
    rig = own(peers=False)
    early = [rig.client.submit(pairs(4), **v) for v in ({"lora_r": 8}, {"batch_size": 4096})]
    fine = rig.client.submit(pairs(4), lora_r=4)
    status = rig.client.status()
    assert status.service["scheduler_pid"] is None and status.jobs["queued"] == 3
    rig.join_http()
    rig.join_scheduler(max_lora_rank=4, train_memory_bytes=16 << 20)
    errors = [rig.done(job, "failed").error for job in early]
    assert "lora_r=8 is not accepted" in errors[0].message and errors[0].param == "lora_r"
    rig.done(fine)
    with pytest.raises(ConfigError, match=re.escape(errors[0].message)):
        rig.client.submit(pairs(4), lora_r=8)


def test_a_server_that_cannot_train_says_so(own):
    rig = own(peers=False)
    rig.scheduler = SchedulerPeer(rig.run_dir)
    rig.scheduler.limits, rig.scheduler.refusal = None, "AWQ weights cannot be bound"
    rig.scheduler.start()
    rig._stack.callback(rig.scheduler.close)
    until(lambda: rig.client.status().service["refusal"], "the refusal")
    with pytest.raises(HarliError, match="AWQ weights cannot be bound"):
        rig.client.submit(pairs(4))


def test_the_same_key_is_the_same_job(rig):
    first = rig.client.submit(pairs(4), idempotency_key="once")
    assert rig.client.submit(pairs(4), idempotency_key="once").id == first.id
    with pytest.raises(ConfigError, match="has other data"):
        rig.client.submit(pairs(5), idempotency_key="once")


def test_unknown_jobs_and_values(rig):
    with pytest.raises(NotFoundError, match="there is no job 'ftjob-x'"):
        rig.client.get("ftjob-x")
    with pytest.raises(ConfigError, match=r"unknown hyperparameter 'epochs'.*n_epochs"):
        exchange(rig, "submit", {**submit_args(b"x"), "hyperparameters": {"epochs": 3}}, b"x")


def test_list_pages_and_filters(rig):
    jobs = [rig.client.submit(pairs(4)) for _ in range(3)]
    for job in jobs:
        rig.done(job)
    newest = rig.client.list(limit=2)
    assert [j.id for j in newest] == [jobs[2].id, jobs[1].id]
    assert rig.client.list(limit=1, after=newest[-1].id)[0].id == jobs[0].id
    assert all(j.status == "cancelled" for j in rig.client.list(status="cancelled"))
    with pytest.raises(HarliError, match="queued"):
        rig.client.list(status="sleeping")


# ------------------------------------------------------------------ set and status
def test_set_is_applied_stale_or_refused(rig):
    answer = rig.client.set(tpot_slo_ms=40.0)
    assert (answer.outcome, answer.effective["tpot_slo_ms"]) == ("applied", 40.0)
    stale = rig.client.set(tpot_slo_ms=30.0, if_revision=answer.revision + 5)
    assert (stale.outcome, stale.revision, stale.effective["tpot_slo_ms"]) == ("stale", answer.revision, 40.0)
    for values, message in (({"run_dir": 1.0}, "cannot be set"), ({"tpot_slo_ms": -1.0}, "tpot-slo-ms")):
        with pytest.raises(ConfigError, match=message):
            exchange(rig, "set", {"values": values})
    status = rig.client.status()
    assert (status.revision, status.options["tpot_slo_ms"]) == (answer.revision, 40.0)
    assert status.serving == {"running": 0}


def test_set_before_the_scheduler_is_there_is_deferred_and_survives_a_restart(own):
    rig = own(peers=False)
    assert rig.client.set(tpot_slo_ms=20.0).outcome == "deferred"
    assert rig.client.set(max_itl_ms=10.0).outcome == "conflict"
    assert rig.client.set(max_itl_ms=80.0, if_revision=3).outcome == "stale"
    rig.restart()
    assert rig.client.set(max_itl_ms=90.0).outcome == "deferred"
    scheduler = rig.join_scheduler()
    until(lambda: scheduler.options.get("max_itl_ms") == 90.0, "the deferred options")
    assert scheduler.options["tpot_slo_ms"] == 20.0
    until(lambda: rig.client.status().options["tpot_slo_ms"] == 20.0, "the value in force")


def test_an_endpoint_in_use_is_one_sentence(rig, tmp_path):
    second = ServiceProcess(tmp_path / "runs", rig.model, rig.port).start()
    assert second.process is not None and second.process.wait(60) == 1
    assert (
        second.log.read_text()
        .strip()
        .splitlines()[-1]
        .startswith(f"--harli-finetune-endpoint {second.endpoint}")
    )


# ------------------------------------------------------------------ what is imported
def test_neither_torch_nor_sglang_is_ever_imported(own, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # the process tells of every import on its stderr
    rig = own()
    rig.done(rig.client.submit(pairs(4)))
    log = rig.service.log.read_text()
    imported = {
        line.rsplit("|", 1)[1].strip() for line in log.splitlines() if line.startswith("import time:")
    }
    assert {"transformers", "sqlalchemy", "sglang_harli.service.run.driver"} <= imported
    assert {name for name in imported if name.partition(".")[0] in ("torch", "sglang")} == set()
    maps = Path(f"/proc/{rig.service.process.pid}/maps").read_text()
    assert "libtorch" not in maps
