"""A submit with a known idempotency key answers with its job, or names what it asks for
otherwise."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.errors import ConfigError
from sglang_harli.failpoints import FAULT_POINTS_ENV, WriteFailpoint
from sglang_harli.protocol.public import Hyperparameters, Job, SubmitArgs
from sglang_harli.service.jobs.record import JobRecord
from sglang_harli.service.jobs.record_encoding import read_record, stored
from sglang_harli.service.submit import repeated_submit
from support.service.service_fixture import pairs, until

FIRST = {"n_epochs": 4, "target_modules": ["q_proj", "v_proj"], "suffix": "a", "priority": 2}


def changed(**values: object) -> dict[str, object]:
    return {name: value for name, value in (FIRST | values).items() if value is not ...}


@pytest.mark.parametrize(
    "again",
    [
        changed(),
        changed(n_epochs="4", target_modules="q_proj,v_proj"),  # as the command line sends them
        changed(learning_rate=Hyperparameters().learning_rate, max_seq_length=None),  # defaults, named
    ],
)
def test_the_same_again_is_the_same_job(rig, again, request):
    key = request.node.name
    first = rig.client.submit(pairs(4), idempotency_key=key, **FIRST)
    assert rig.client.submit(pairs(4), idempotency_key=key, **again).id == first.id


@pytest.mark.parametrize(
    ("again", "differs"),
    [
        (changed(n_epochs=5), "this submit has n_epochs=5 instead of 4"),
        (changed(n_epochs=...), f"n_epochs={Hyperparameters().n_epochs} instead of 4"),
        (changed(seed=1), "seed=1 instead of 42"),
        (changed(target_modules="q_proj"), "target_modules=q_proj instead of q_proj,v_proj"),
        (changed(suffix=None), "suffix=none instead of a"),
        (changed(priority=0), "priority=0 instead of 2"),
        (changed(priority=3, n_epochs=1), "priority=3 instead of 2, n_epochs=1 instead of 4"),
    ],
)
def test_another_value_is_a_conflict_that_names_it(rig, again, differs, request):
    key = request.node.name
    first = rig.client.submit(pairs(4), idempotency_key=key, **FIRST)
    with pytest.raises(ConfigError, match=f"belongs to job {first.id}; .*{differs}: give each") as caught:
        rig.client.submit(pairs(4), idempotency_key=key, **again)
    assert caught.value.code == "idempotency_conflict"
    with pytest.raises(ConfigError, match="has other data: give each"):
        rig.client.submit(pairs(5), idempotency_key=key, **FIRST)
    assert rig.client.submit(pairs(4), idempotency_key=key, **FIRST).id == first.id


def test_a_priority_that_was_changed_later_is_no_difference(rig):
    first = rig.client.submit(pairs(4), idempotency_key="later", priority=1)
    rig.client.prioritize(first.id, 7)
    assert rig.client.submit(pairs(4), idempotency_key="later", priority=1).priority == 7


def test_a_continued_job_is_compared_by_what_it_takes_over(rig):
    old = rig.done(rig.client.submit(pairs(4), n_epochs=2, learning_rate=1e-3))
    first = rig.client.submit(resume_from=old.id, n_epochs=3, idempotency_key="on")
    again = rig.client.submit(resume_from=old.id, n_epochs=3, learning_rate=1e-3, idempotency_key="on")
    assert again.id == first.id
    with pytest.raises(ConfigError, match="has n_epochs=4 instead of 3: give each"):
        rig.client.submit(resume_from=old.id, n_epochs=4, idempotency_key="on")
    with pytest.raises(ConfigError, match=r"learning_rate=0\.002 instead of 0\.001"):
        rig.client.submit(resume_from=old.id, n_epochs=3, learning_rate=2e-3, idempotency_key="on")
    with pytest.raises(ConfigError, match="has other data"):  # the same data, but as a new course
        rig.client.submit(pairs(4), resume_from=old.id, n_epochs=3, idempotency_key="on")


def test_another_submit_is_a_conflict_while_the_first_is_under_way(own, tmp_path, monkeypatch):
    held = tmp_path / "points" / WriteFailpoint.TOKENS
    held.parent.mkdir()
    held.write_text("stop")
    monkeypatch.setenv(FAULT_POINTS_ENV, str(held.parent))
    rig = own()

    def submit(**values: object) -> Job:
        with FinetuneClient(rig.service.endpoint) as client:
            return client.submit(pairs(4), idempotency_key="way", **values)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(submit, n_epochs=2)
        until(held.with_name(f"{held.name}.hit").exists, "the first submit's data")
        with pytest.raises(ConfigError, match="to a submit that is under way; this submit has n_epochs=3 "):
            submit(n_epochs=3)
        same = pool.submit(submit, n_epochs=2)
        held.with_name(f"{held.name}.go").touch()
        assert same.result(30).id == first.result(30).id


# ------------------------------------------------------------------ after a restart
NAMED: dict[str, Any] = {
    "n_epochs": 2,
    "learning_rate": 1e-5,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.25,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.125,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj"],
    "max_seq_length": 64,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "checkpoint_every": 7,
    "seed": 2**63 - 1,
    "on_overflow": "truncate",
    "eval_steps": 3,
    "eval_rows": 1,
    "validation_split": 0.25,
    "early_stopping_patience": 2,
    "early_stopping_min_delta": 0.125,
    "publish_best": True,
}


def as_text(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def test_every_hyperparameter_is_the_same_again_after_a_restart(own):
    assert set(NAMED) == set(Hyperparameters.__struct_fields__)
    rig = own(peers=False)
    first = rig.client.submit(pairs(4), idempotency_key="named", **NAMED)
    default = rig.client.submit(pairs(4), idempotency_key="all", target_modules="all")
    rig.restart()
    texts = {name: as_text(value) for name, value in NAMED.items()}
    for again in (NAMED, texts):
        assert rig.client.submit(pairs(4), idempotency_key="named", **again).id == first.id
    for again in ({"target_modules": "all"}, {"target_modules": Hyperparameters().target_modules}, {}):
        assert rig.client.submit(pairs(4), idempotency_key="all", **again).id == default.id
    with pytest.raises(ConfigError, match="target_modules=q_proj instead of q_proj,v_proj: give each"):
        rig.client.submit(pairs(4), idempotency_key="named", **NAMED | {"target_modules": "q_proj"})


def test_a_continued_job_is_the_same_again_where_the_old_one_cannot_be_read(own):
    rig = own()
    old = rig.done(rig.client.submit(pairs(4), n_epochs=2, learning_rate=1e-3))
    first = rig.client.submit(resume_from=old.id, n_epochs=3, idempotency_key="on")
    rig.service.kill()
    with sqlite3.connect(rig.run_dir / "harli.db") as store:
        store.execute("UPDATE jobs SET body = '{' WHERE id = ?", (old.id,))
    rig.service.start()
    for again in ({"n_epochs": 3}, {"n_epochs": 3, "learning_rate": 1e-3}, {}):
        same = rig.client.submit(resume_from=old.id, idempotency_key="on", **again)
        assert same.id == first.id
    with pytest.raises(ConfigError, match=r"learning_rate=0\.002 instead of 0\.001"):
        rig.client.submit(resume_from=old.id, n_epochs=3, learning_rate=2e-3, idempotency_key="on")


# ------------------------------------------------------------------ records
def job_record() -> JobRecord:
    return JobRecord(
        id="ftjob-1",
        number=1,
        created_at=0.0,
        status=JobStatus.QUEUED,
        hyperparameters=Hyperparameters(),
        model="base",
        adapter_name="base-ft-1",
        total_steps=1,
        data={},
    )


def test_the_store_keeps_what_was_asked_and_older_records_open():
    args = SubmitArgs(sha256="0" * 64, hyperparameters={"n_epochs": "2"}, idempotency_key="k")
    record = msgspec.structs.replace(job_record(), asked=repeated_submit.asked(args))
    assert msgspec.json.decode(msgspec.json.encode(record), type=JobRecord) == record
    values = msgspec.to_builtins(record)
    del values["asked"]
    assert msgspec.convert(values, JobRecord).asked is None


def test_a_job_of_before_is_compared_as_before():
    record = msgspec.structs.replace(job_record(), data_sha256="a" * 64, suffix="s", resumed_from=None)
    same = SubmitArgs(sha256="a" * 64, suffix="s", hyperparameters={"n_epochs": 7}, priority=3)
    assert repeated_submit.differences_of_before(record, same) == []
    other = SubmitArgs(sha256="b" * 64, suffix="t", resume_from="job")
    found = ["other data", "resume_from=job instead of none", "suffix=t instead of s"]
    assert repeated_submit.differences_of_before(record, other) == found


def submit_of(**hyperparameters: Any) -> SubmitArgs:
    return SubmitArgs(sha256="a" * 64, hyperparameters=hyperparameters)


def differences(first: SubmitArgs, again: SubmitArgs, **defaults: Any) -> list[str]:
    """Between a job of the store, whose defaults were others, and a submit of today."""
    hyperparameters = Hyperparameters(**defaults | first.hyperparameters)
    record = msgspec.structs.replace(
        job_record(), asked=repeated_submit.asked(first), hyperparameters=hyperparameters
    )
    kept = read_record(stored(record))
    assert kept.asked is not None
    asked = repeated_submit.asked(again)
    return repeated_submit.differences(kept.asked, asked, kept.hyperparameters, Hyperparameters())


def test_a_default_that_changed_between_two_versions_is_no_difference():
    old = {"warmup_ratio": 0.5, "target_modules": ("q_proj",)}
    for again in (submit_of(), submit_of(warmup_ratio="0.5"), submit_of(target_modules=["q_proj"])):
        assert differences(submit_of(), again, **old) == []
    found = differences(submit_of(), submit_of(warmup_ratio=0.0), **old)
    assert found == ["warmup_ratio=0.0 instead of 0.5"]


def test_a_value_that_another_version_took_is_the_same_again():
    asked = repeated_submit.asked(submit_of(n_epochs="2", gone="1"))
    kept = msgspec.structs.replace(asked, hyperparameters={"n_epochs": "2", "gone": "1"})
    has = Hyperparameters(n_epochs=2)
    assert repeated_submit.differences(kept, asked, has, Hyperparameters()) == []
