"""Rows are made with the tokenizer and chat template of the server: handed over when it is up,
asked for again when that is lost, and made again where a job was accepted before, or under another
server."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sglang_harli.config import TokenizerFlags
from sglang_harli.errors import DataError
from sglang_harli.protocol import tokenizer_state
from sglang_harli.protocol.public import Job
from sglang_harli.protocol.tokenizer_state import ChatTemplate, TokenizerState
from sglang_harli.service.data.token_store import TokenReader
from sglang_harli.service.rows.encoder import RowEncoder
from sglang_harli.service.rows.error import RowError
from sglang_harli.service.rows.served_tokenizer import ServedTokenizer, describe
from sglang_harli.service.tokenizer import own_tokenizer
from sglang_harli.service.tokenizer.model_tokenizer import ModelTokenizer
from support.models import CHAT_TEMPLATE
from support.service.service_fixture import ServiceUnderTest, pairs, until
from support.tokenizer import load_tokenizer, make_tokenizer_folder

OTHER_TEMPLATE = CHAT_TEMPLATE.replace("<|im_start|>", "<|im_start|>[other] ")
# Earlier answers lose what the last one has: a row for each answer.
CUTTING_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'assistant' and loop.last %}!{% endif %}{{ message['content'] }}",
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHAT_TEMPLATE
)


def state(model: Path, template: str | None = OTHER_TEMPLATE, **chat: Any) -> TokenizerState:
    return describe(load_tokenizer(model), ChatTemplate(source=template, **chat), [2])


def talks(count: int = 6) -> list[dict[str, Any]]:
    """Conversations of two answers."""
    return [
        {"messages": [*pairs(count)[i]["messages"], *pairs(count)[i - 1]["messages"]]} for i in range(count)
    ]


def stored(rig: ServiceUnderTest, job: Job) -> list[list[int]]:
    """The rows that the job trains on."""
    folder = rig.folder(job) / "data" / rig.client.get(job.id).data.get("rows_in", ".")
    reader = TokenReader(folder)
    found = [reader.row(i)[0].tolist() for i in range(len(reader))]
    reader.close()
    return found


def rows_of(made_by: TokenizerState, records: list[dict[str, Any]]) -> list[list[int]]:
    tokenizer = RowEncoder(ServedTokenizer(made_by))
    return [row.ids for record in records for row in tokenizer.rows(record)]


def reason(rig: ServiceUnderTest, job: Job, part: str) -> str:
    def found() -> str:
        text = rig.client.get(job.id).reason or ""
        return text if part in text else ""

    return until(found, f"a reason with {part!r}")


# ------------------------------------------------------------------ while the server is up
def test_rows_are_made_with_what_was_handed_over(own, model):
    rig = own(peers=False)
    rig.join_http(state(model))
    rig.join_scheduler()
    until(lambda: rig.http.states and not rig.http.states[-1].tokenizer_lost, "the hello")
    until(lambda: "server's own tokenizer" in rig.service.log.read_text(), "the tokenizer")
    job = rig.client.submit(pairs(4))
    assert stored(rig, job) == rows_of(state(model), pairs(4))
    assert job.data["tokenizer"] == state(model).fingerprint
    rig.done(job)


def test_no_job_starts_before_it_is_known_which_tokenizer_serves(own):
    rig = own(peers=False)
    rig.http = object()  # none says hello
    rig.join_scheduler()
    job = rig.client.submit(pairs(4))
    assert "waiting for the server's tokenizer" in reason(rig, job, "tokenizer")
    rig.join_http()
    rig.done(job)


def test_a_tokenizer_that_was_lost_is_written_and_said_again(own, model):
    rig = own(peers=False)
    peer = rig.join_http(state(model))
    rig.join_scheduler()
    rig.done(rig.client.submit(pairs(4)))
    assert peer.writes == 1
    for damage in ("gone", "torn", "another"):
        path = rig.run_dir / tokenizer_state.FILE
        if damage == "gone":
            path.unlink()
        elif damage == "torn":
            path.write_bytes(path.read_bytes()[:-20])
        else:
            tokenizer_state.write(rig.run_dir, tokenizer_state.encode(state(model, CHAT_TEMPLATE)))
        writes = peer.writes
        rig.restart()
        job = rig.client.submit(pairs(4))
        rig.done(job)
        assert peer.writes > writes
        assert rig.client.get(job.id).data["tokenizer"] == state(model).fingerprint


def test_only_a_change_is_told_while_it_cannot_be_read(tmp_path, model, caplog):
    tokenizer = ModelTokenizer(TokenizerFlags(model_path=str(model), tokenizer_path=str(model)), tmp_path)
    served = state(model)
    assert tokenizer.take(served.fingerprint) and tokenizer.lost
    assert not tokenizer.take(served.fingerprint)
    assert caplog.text.count("cannot be read") == 1
    tokenizer_state.write(tmp_path, tokenizer_state.encode(served))
    assert tokenizer.take(served.fingerprint) and tokenizer.known and not tokenizer.lost
    assert not tokenizer.take(served.fingerprint)


@pytest.mark.parametrize(
    ("raised", "lost"),
    [(MemoryError(), True), (OSError(24, "no descriptors"), True), (TypeError("odd"), False)],
)
def test_whatever_a_library_raises_no_job_waits_without_a_word(tmp_path, model, monkeypatch, raised, lost):
    def load(*_: Any) -> Any:
        raise raised

    monkeypatch.setattr(own_tokenizer, "load_tokenizer", load)
    tokenizer = ModelTokenizer(TokenizerFlags(model_path=str(model), tokenizer_path=str(model)), tmp_path)
    served = msgspec.structs.replace(state(model), backend=None)
    tokenizer_state.write(tmp_path, tokenizer_state.encode(served))
    assert tokenizer.take(served.fingerprint)
    assert tokenizer.lost == lost and tokenizer.known != lost
    if not lost:
        with pytest.raises(RowError, match="cannot be used for training: TypeError: odd"):
            tokenizer.get().rows(pairs(1)[0])


def test_chats_that_the_server_renders_by_a_template_of_its_own_are_refused(own, model):
    rig = own(peers=False)
    rig.join_http(state(model, None, refusal="the server renders chats by SGLang's own template 'x'"))
    rig.join_scheduler()
    until(lambda: "server's own tokenizer" in rig.service.log.read_text(), "the tokenizer")
    with pytest.raises(DataError, match="SGLang's own template 'x'"):
        rig.client.submit(pairs(4))
    rig.done(rig.client.submit([{"prompt": "a b", "completion": " c"}] * 4))


def test_a_tokenizer_without_backend_is_loaded_by_its_path_and_has_to_agree(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = make_tokenizer_folder(tmp_path / "bytes")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    live = transformers.ByT5Tokenizer()
    live.chat_template = OTHER_TEMPLATE
    live.save_pretrained(folder)
    made = describe(live, ChatTemplate(source=OTHER_TEMPLATE), [1])
    assert made.backend is None and made.refusal is None
    wrong = [p.__class__(text=p.text, ids=[*p.ids[:-1], 7], plain=p.plain) for p in made.probes]
    rigs = []
    for number, handed in enumerate(
        (made, made.__class__(**{n: getattr(made, n) for n in made.__struct_fields__} | {"probes": wrong}))
    ):
        rig = ServiceUnderTest(tmp_path / str(number), folder, peers=False)
        rigs.append(rig)
        try:
            rig.join_http(handed)
            rig.join_scheduler(vocab_size=500)
            until(lambda rig=rig: "server's own tokenizer" in rig.service.log.read_text(), "the tokenizer")
            if number == 0:
                job = rig.client.submit(pairs(4))
                expected = [r.ids for p in pairs(4) for r in RowEncoder(ServedTokenizer(made, live)).rows(p)]
                assert stored(rig, job) == expected
                rig.done(job)
            else:
                with pytest.raises(DataError, match="gets other ids than in serving"):
                    rig.client.submit(pairs(4))
        finally:
            rig.close()


# ------------------------------------------------------------------ jobs of before
def test_a_job_that_came_early_is_made_again_with_what_the_server_has(own, model):
    """From its file, which is read by its content each time."""
    rig = own(peers=False)
    early = rig.client.submit(gzip.compress(json.dumps(talks()).encode()), n_epochs=2)
    assert early.data["file_text"] == "a JSON array, packed with gzip"
    own_rows = stored(rig, early)
    assert len(own_rows) == 6
    live = state(model, CUTTING_TEMPLATE)
    rig.join_http(live)
    rig.join_scheduler()
    job = rig.done(early)
    assert stored(rig, job) == rows_of(live, talks()) != own_rows
    assert (job.data["rows"], job.total_steps, job.step) == (12, 6, 6)
    validated = [e for e in rig.client.events(job.id) if e.type == "data_validated"]
    assert "made again" in validated[-1].message and validated[-1].data["rows"] == 12
    late = rig.done(rig.client.submit(talks(), n_epochs=2))
    assert np.array_equal(rig.result(job), rig.result(late))


def test_a_limit_that_comes_later_than_the_data(own):
    rig = own(peers=False)
    asked = {"role": "user", "content": "word " * 10}
    rows = [*pairs(4), {"messages": [asked, {"role": "assistant", "content": "x " * 90}]}]
    cut, dropped, kept = (rig.client.submit(rows, on_overflow=v) for v in ("truncate", "drop", "error"))
    assert cut.data["longest_row"] > 128
    rig.join_http()
    rig.join_scheduler()
    cut, dropped = rig.done(cut), rig.done(dropped)
    assert (cut.data["rows"], cut.data["truncated"], cut.data["longest_row"]) == (5, 1, 128)
    assert (dropped.data["rows"], dropped.data["dropped"]) == (4, 1)
    assert "line 5: " in reason(rig, kept, "the limit is 128")
    rig.done(rig.client.submit(pairs(4)))  # it does not wait for the one that is held


@pytest.fixture
def half_done(own, model):
    """A job that has trained three steps under a template of its own and is paused."""
    rig = own(peers=False)
    rig.join_http(state(model))
    scheduler = rig.join_scheduler()
    scheduler.step_s = 0.2
    job = rig.client.submit(talks(), n_epochs=6, batch_size=4)
    rig.at_step(job, 3)
    rig.client.pause(job.id)
    rig.status(job, "paused")
    scheduler.step_s = 0.0
    return rig, job


def again(rig: ServiceUnderTest, tokenizer: TokenizerState) -> None:
    """The server comes back with another tokenizer or template."""
    rig.service.kill()
    rig.http.tokenizer = tokenizer
    rig.http.hand_over()
    rig.http.service_pid = None
    rig.service.start()
    until(lambda: rig.http.states[-1].pid == rig.service.process.pid, "the new service")


def test_a_job_that_has_trained_goes_on_where_the_rows_are_as_many(half_done, model):
    rig, job = half_done
    again(rig, state(model, CHAT_TEMPLATE))
    rig.client.resume(job.id)
    done = rig.done(job)
    assert done.total_steps == job.total_steps
    assert stored(rig, done) == rows_of(state(model, CHAT_TEMPLATE), talks())


def test_a_job_that_has_trained_waits_where_they_are_not_and_holds_up_nobody(half_done, model):
    rig, job = half_done
    again(rig, state(model, CUTTING_TEMPLATE))
    rig.client.resume(job.id)
    text = reason(rig, job, "it has trained ")
    assert "12 rows in" in text and "--chat-template" in text and "submit the data again" in text
    rig.done(rig.client.submit(pairs(4)))
    assert rig.client.get(job.id).status == "queued"
    again(rig, state(model))
    done = rig.done(job)
    assert stored(rig, done) == rows_of(state(model), talks())


def test_jobs_that_another_template_refuses_wait_for_theirs(own, model):
    rig = own(peers=False)
    system = [{"messages": [{"role": "system", "content": "Be kind."}, *p["messages"]]} for p in pairs(4)]
    job = rig.client.submit(system)
    rig.join_http(state(model, NO_SYSTEM))
    rig.join_scheduler()
    assert "no system role" in reason(rig, job, "its data is not accepted")
    rig.done(rig.client.submit(pairs(4)))  # those behind it run
    assert rig.client.get(job.id).status == "queued"
    again(rig, state(model))
    rig.done(job)


def test_rows_that_are_evaluated_are_made_again_too(own, model):
    rig = own(peers=False)
    hp = {"n_epochs": 1, "eval_steps": 0}
    early = rig.client.submit(talks(6), validation=talks(3), **hp)
    split = rig.client.submit(talks(6), validation_split=0.4, **hp)
    rig.join_http(state(model))
    rig.join_scheduler()
    done = rig.done(early)
    about = rig.client.get(early.id).data["validation"]
    before = early.data["validation"]
    assert about["tokenizer"] == state(model).fingerprint != before["tokenizer"]
    assert (about["sha256"], about["bytes"]) == (before["sha256"], before["bytes"])
    folder = rig.folder(early) / "data" / done.data["rows_in"] / "validation"
    reader = TokenReader(folder)
    assert [reader.row(i)[0].tolist() for i in range(len(reader))] == rows_of(state(model), talks(3))
    reader.close()
    assert done.evaluation["rows"] == about["rows"]
    rig.done(split)
    assert rig.client.get(split.id).data["validation_rows"] == split.data["validation_rows"]
    more = rig.done(rig.client.submit(resume_from=early.id, n_epochs=2))
    assert more.evaluation["rows"] == about["rows"]


def test_rows_that_were_made_again_are_carried_on(own, model):
    """A job that goes on without data takes over the rows it had last."""
    rig = own(peers=False)
    job = rig.client.submit(talks())
    live = state(model, CUTTING_TEMPLATE)
    rig.join_http(live)
    rig.join_scheduler()
    rig.done(job)
    more = rig.done(rig.client.submit(resume_from=job.id, n_epochs=5))
    assert stored(rig, more) == rows_of(live, talks())
    assert more.data["rows"] == 12 and "rows_in" not in more.data


def test_data_that_is_gone_is_no_end_of_the_job(own, model):
    rig = own(peers=False)
    job = rig.client.submit(pairs(4))
    os.rename(rig.folder(job) / "data" / "train.jsonl", rig.folder(job) / "away")
    rig.join_http(state(model))
    rig.join_scheduler()
    reason(rig, job, "its data is gone")
    os.rename(rig.folder(job) / "away", rig.folder(job) / "data" / "train.jsonl")
    again(rig, state(model))
    rig.done(job)


# ------------------------------------------------------------------ the file
def test_the_file_holds_all_that_makes_rows(tmp_path, model):
    made = state(model, kwargs={"x": [1, None]})
    tokenizer_state.write(tmp_path, tokenizer_state.encode(made))
    path = tmp_path / tokenizer_state.FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert (
        tokenizer_state.read(tmp_path) == made
        and tokenizer_state.read(tmp_path).fingerprint == made.fingerprint
    )
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        tokenizer_state.read(tmp_path)


def test_fingerprints_tell_apart_what_makes_other_rows(model):
    states = [
        state(model),
        state(model, CHAT_TEMPLATE),
        state(model, content_format="openai"),
        state(model, kwargs={"x": 1}),
        state(model, refusal="no"),
    ]
    assert len({s.fingerprint for s in states}) == len(states)
    assert state(model).fingerprint == states[0].fingerprint


@pytest.mark.parametrize("name", ["tools", "chat_template", "add_generation_prompt"])
def test_keywords_that_serving_sets_itself_are_a_refusal(model, name):
    made = state(model, kwargs={name: 1})
    assert made.chat.refusal is not None and name in made.chat.refusal


def test_a_state_that_this_machine_reads_differently_is_an_error(model):
    made = state(model)
    fields = {n: getattr(made, n) for n in made.__struct_fields__}
    with pytest.raises(ValueError, match="chat template gives"):
        ServedTokenizer(TokenizerState(**fields | {"chat_probe": "something else"}))
    with pytest.raises(ValueError, match="no backend"):
        ServedTokenizer(TokenizerState(**fields | {"backend": None}))
