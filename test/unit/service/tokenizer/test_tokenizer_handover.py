"""Rows are made with the tokenizer and chat template of the server: handed over when it is up, asked for again when
that is lost, and made again where a job was accepted before, or under another server."""

from __future__ import annotations

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


def stored(world: ServiceUnderTest, job: Job) -> list[list[int]]:
    """The rows that the job trains on."""
    folder = world.folder(job) / "data" / world.client.get(job.id).data.get("rows_in", ".")
    reader = TokenReader(folder)
    found = [reader.row(i)[0].tolist() for i in range(len(reader))]
    reader.close()
    return found


def rows_of(made_by: TokenizerState, records: list[dict[str, Any]]) -> list[list[int]]:
    tokenizer = RowEncoder(ServedTokenizer(made_by))
    return [row.ids for record in records for row in tokenizer.rows(record)]


def reason(world: ServiceUnderTest, job: Job, part: str) -> str:
    def found() -> str:
        text = world.client.get(job.id).reason or ""
        return text if part in text else ""

    return until(found, f"a reason with {part!r}")


# ------------------------------------------------------------------ while the server is up
def test_rows_are_made_with_what_was_handed_over(own, model):
    world = own(peers=False)
    world.join_http(state(model))
    world.join_scheduler()
    until(lambda: world.http.states and not world.http.states[-1].tokenizer_lost, "the hello")
    until(lambda: "server's own tokenizer" in world.service.log.read_text(), "the tokenizer")
    job = world.client.submit(pairs(4))
    assert stored(world, job) == rows_of(state(model), pairs(4))
    assert job.data["tokenizer"] == state(model).fingerprint
    world.done(job)


def test_no_job_starts_before_it_is_known_which_tokenizer_serves(own):
    world = own(peers=False)
    world.http = object()  # none says hello
    world.join_scheduler()
    job = world.client.submit(pairs(4))
    assert "waiting for the server's tokenizer" in reason(world, job, "tokenizer")
    world.join_http()
    world.done(job)


def test_a_tokenizer_that_was_lost_is_written_and_said_again(own, model):
    world = own(peers=False)
    peer = world.join_http(state(model))
    world.join_scheduler()
    world.done(world.client.submit(pairs(4)))
    assert peer.writes == 1
    for damage in ("gone", "torn", "another"):
        path = world.run_dir / tokenizer_state.FILE
        if damage == "gone":
            path.unlink()
        elif damage == "torn":
            path.write_bytes(path.read_bytes()[:-20])
        else:
            tokenizer_state.write(world.run_dir, tokenizer_state.encode(state(model, CHAT_TEMPLATE)))
        writes = peer.writes
        world.restart()
        job = world.client.submit(pairs(4))
        world.done(job)
        assert peer.writes > writes
        assert world.client.get(job.id).data["tokenizer"] == state(model).fingerprint


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
    world = own(peers=False)
    world.join_http(state(model, None, refusal="the server renders chats by SGLang's own template 'x'"))
    world.join_scheduler()
    until(lambda: "server's own tokenizer" in world.service.log.read_text(), "the tokenizer")
    with pytest.raises(DataError, match="SGLang's own template 'x'"):
        world.client.submit(pairs(4))
    world.done(world.client.submit([{"prompt": "a b", "completion": " c"}] * 4))


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
    worlds = []
    for number, handed in enumerate(
        (made, made.__class__(**{n: getattr(made, n) for n in made.__struct_fields__} | {"probes": wrong}))
    ):
        world = ServiceUnderTest(tmp_path / str(number), folder, peers=False)
        worlds.append(world)
        try:
            world.join_http(handed)
            world.join_scheduler(vocab_size=500)
            until(
                lambda world=world: "server's own tokenizer" in world.service.log.read_text(), "the tokenizer"
            )
            if number == 0:
                job = world.client.submit(pairs(4))
                expected = [r.ids for p in pairs(4) for r in RowEncoder(ServedTokenizer(made, live)).rows(p)]
                assert stored(world, job) == expected
                world.done(job)
            else:
                with pytest.raises(DataError, match="gets other ids than in serving"):
                    world.client.submit(pairs(4))
        finally:
            world.close()


# ------------------------------------------------------------------ jobs of before
def test_a_job_that_came_early_is_made_again_with_what_the_server_has(own, model):
    world = own(peers=False)
    early = world.client.submit(talks(), n_epochs=2)
    own_rows = stored(world, early)
    assert len(own_rows) == 6
    live = state(model, CUTTING_TEMPLATE)
    world.join_http(live)
    world.join_scheduler()
    job = world.done(early)
    assert stored(world, job) == rows_of(live, talks()) != own_rows
    assert (job.data["rows"], job.total_steps, job.step) == (12, 6, 6)
    validated = [e for e in world.client.events(job.id) if e.type == "data_validated"]
    assert "made again" in validated[-1].message and validated[-1].data["rows"] == 12
    late = world.done(world.client.submit(talks(), n_epochs=2))
    assert np.array_equal(world.result(job), world.result(late))


def test_a_limit_that_comes_later_than_the_data(own):
    world = own(peers=False)
    rows = [*pairs(4), {"prompt": "word " * 30, "completion": "x " * 30}]
    cut, dropped, kept = (world.client.submit(rows, on_overflow=v) for v in ("truncate", "drop", "error"))
    assert cut.data["longest_row"] > 128
    world.join_http()
    world.join_scheduler()
    cut, dropped = world.done(cut), world.done(dropped)
    assert (cut.data["rows"], cut.data["truncated"], cut.data["longest_row"]) == (5, 1, 128)
    assert (dropped.data["rows"], dropped.data["dropped"]) == (4, 1)
    assert "line 5: " in reason(world, kept, "the limit is 128")
    world.done(world.client.submit(pairs(4)))  # it does not wait for the one that is held


@pytest.fixture
def half_done(own, model):
    """A job that has trained three steps under a template of its own and is paused."""
    world = own(peers=False)
    world.join_http(state(model))
    scheduler = world.join_scheduler()
    scheduler.step_s = 0.2
    job = world.client.submit(talks(), n_epochs=6, batch_size=4)
    world.at_step(job, 3)
    world.client.pause(job.id)
    world.status(job, "paused")
    scheduler.step_s = 0.0
    return world, job


def again(world: ServiceUnderTest, tokenizer: TokenizerState) -> None:
    """The server comes back with another tokenizer or template."""
    world.service.kill()
    world.http.tokenizer = tokenizer
    world.http.hand_over()
    world.http.service_pid = None
    world.service.start()
    until(lambda: world.http.states[-1].pid == world.service.process.pid, "the new service")


def test_a_job_that_has_trained_goes_on_where_the_rows_are_as_many(half_done, model):
    world, job = half_done
    again(world, state(model, CHAT_TEMPLATE))
    world.client.resume(job.id)
    done = world.done(job)
    assert done.total_steps == job.total_steps
    assert stored(world, done) == rows_of(state(model, CHAT_TEMPLATE), talks())


def test_a_job_that_has_trained_waits_where_they_are_not_and_holds_up_nobody(half_done, model):
    world, job = half_done
    again(world, state(model, CUTTING_TEMPLATE))
    world.client.resume(job.id)
    text = reason(world, job, "it has trained ")
    assert "12 rows in" in text and "--chat-template" in text and "submit the data again" in text
    world.done(world.client.submit(pairs(4)))
    assert world.client.get(job.id).status == "queued"
    again(world, state(model))
    done = world.done(job)
    assert stored(world, done) == rows_of(state(model), talks())


def test_jobs_that_another_template_refuses_wait_for_theirs(own, model):
    world = own(peers=False)
    system = [{"messages": [{"role": "system", "content": "Be kind."}, *p["messages"]]} for p in pairs(4)]
    job = world.client.submit(system)
    world.join_http(state(model, NO_SYSTEM))
    world.join_scheduler()
    assert "no system role" in reason(world, job, "its data is not accepted")
    world.done(world.client.submit(pairs(4)))  # those behind it run
    assert world.client.get(job.id).status == "queued"
    again(world, state(model))
    world.done(job)


def test_rows_that_were_made_again_are_carried_on(own, model):
    """A job that goes on without data takes over the rows it had last."""
    world = own(peers=False)
    job = world.client.submit(talks())
    live = state(model, CUTTING_TEMPLATE)
    world.join_http(live)
    world.join_scheduler()
    world.done(job)
    more = world.done(world.client.submit(resume_from=job.id, n_epochs=5))
    assert stored(world, more) == rows_of(live, talks())
    assert more.data["rows"] == 12 and "rows_in" not in more.data


def test_data_that_is_gone_is_no_end_of_the_job(own, model):
    world = own(peers=False)
    job = world.client.submit(pairs(4))
    os.rename(world.folder(job) / "data" / "train.jsonl", world.folder(job) / "away")
    world.join_http(state(model))
    world.join_scheduler()
    reason(world, job, "its data is gone")
    os.rename(world.folder(job) / "away", world.folder(job) / "data" / "train.jsonl")
    again(world, state(model))
    world.done(job)


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
