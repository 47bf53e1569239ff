"""Traces: made from a seed, read from the published formats, bad rows named."""

from __future__ import annotations

import statistics
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.errors import ConfigError, DataError
from sglang_harli.simulation import trace_files, traces

FOLDER = Path(str(resources.files("sglang_harli.simulation"))) / "trace_data"


@pytest.mark.parametrize("name", traces.COMMITTED)
def test_a_committed_trace_comes_back_from_its_seed(name):
    recipe = traces.COMMITTED[name]
    made = recipe.make()
    assert (FOLDER / f"{name}.csv").read_text() == trace_files.text(made, traces.workload(recipe.workload))
    assert trace_files.read(FOLDER / f"{name}.csv").requests == made.requests
    assert made.mean_batch(recipe.tpot_s) == pytest.approx(recipe.mean_batch, rel=1e-4)


def test_every_committed_file_has_a_recipe():
    assert {path.stem for path in FOLDER.glob("*.csv")} == set(traces.COMMITTED)


@pytest.mark.parametrize("kind", traces.WORKLOADS.values(), ids=lambda kind: kind.name)
def test_lengths_follow_the_published_quantiles(kind):
    for table in (kind.prompt, kind.output):
        drawn = [traces.draw(table, (i + 0.5) / 20000) for i in range(20000)]
        assert statistics.mean(drawn) == pytest.approx(traces.mean_length(table), rel=0.01)
        for share, tokens in table[1:-1]:
            assert sorted(drawn)[round(share * 20000)] == pytest.approx(tokens, rel=0.02, abs=1)
        assert min(drawn) >= table[0][1] and max(drawn) <= table[-1][1]


def test_means_agree_with_the_published_file_of_conversations():
    # 1,155 and 211 tokens were counted in the file; the tables hold eight pieces each
    assert traces.mean_length(traces.CONVERSATION.prompt) == pytest.approx(1155, rel=0.1)
    assert traces.mean_length(traces.CONVERSATION.output) == pytest.approx(211, rel=0.1)


@given(
    kind=st.sampled_from(list(traces.WORKLOADS.values())),
    seed=st.integers(0, 1000),
    mean_batch=st.floats(0.5, 64),
    swing=st.floats(0, 0.95),
)
def test_a_generated_trace_has_the_load_that_was_asked_for(kind, seed, mean_batch, swing):
    make = {"seed": seed, "duration_s": 60.0, "mean_batch": mean_batch, "tpot_s": 0.04, "swing": swing}
    trace = traces.generate(kind, **make)
    assert trace == traces.generate(kind, **make)
    arrivals = [request.arrival_s for request in trace.requests]
    assert arrivals == sorted(arrivals) and arrivals[0] == 0.0
    assert all(request.prompt_tokens >= 1 and request.output_tokens >= 2 for request in trace.requests)
    assert trace.mean_batch(0.04) == pytest.approx(mean_batch, rel=1e-3)


def test_the_rate_swings():
    trace = traces.generate(
        traces.CONVERSATION, seed=0, duration_s=4000.0, mean_batch=32, tpot_s=0.04, swing=0.8
    )
    half = trace.duration_s / 2
    first = sum(request.arrival_s < half for request in trace.requests) / len(trace.requests)
    assert 0.7 < first < 0.8  # 1/2 + 0.8/pi


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"mean_batch": 0.0}, "--mean-batch"),
        ({"duration_s": -1.0}, "--duration-s"),
        ({"swing": 1.0}, "--swing"),
    ],
)
def test_bad_settings_are_named(wrong, flag):
    settings = {"seed": 0, "duration_s": 10.0, "mean_batch": 4.0, "tpot_s": 0.04, **wrong}
    with pytest.raises(ConfigError, match=flag):
        traces.generate(traces.CONVERSATION, **settings)
    with pytest.raises(ConfigError, match="azure-conv"):
        traces.workload("azure")


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_azure_files(tmp_path):
    rows = "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n"
    trace = trace_files.read(write(tmp_path / "AzureLLMInferenceTrace_conv.csv", AZURE + rows))
    first, second = trace.requests
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579)
    assert trace.name == "AzureLLMInferenceTrace_conv"


def test_azure_files_of_2024_have_a_zone(tmp_path):
    rows = "2024-05-10 00:00:00.009930+00:00,100,10\n2024-05-10 00:00:01+00:00,100,10\n"
    trace = trace_files.read(write(tmp_path / "a.csv", AZURE + rows))
    assert trace.requests[1].arrival_s == pytest.approx(0.99007)


def test_burstgpt_files_without_failed_requests(tmp_path):
    rows = (
        "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n118,GPT-4,417,276,693,API log\n"
    )
    trace = trace_files.read(write(tmp_path / "BurstGPT_1.csv", BURST + rows))
    assert [request.arrival_s for request in trace.requests] == [0.0, 113.0]


def test_newer_burstgpt_files_have_more_columns(tmp_path):
    text = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "7,12,3.4,ChatGPT,100,20,120,Conversation log\n"
    )
    (only,) = trace_files.read(write(tmp_path / "b.csv", text)).requests
    assert (only.prompt_tokens, only.output_tokens) == (100, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AZURE + "2023-11-16 18:15:46,374,44\nyesterday,374,44\n", r"line 3: field 'TIMESTAMP'"),
        (AZURE + "2023-11-16 18:15:46,many,44\n", r"line 2: field 'ContextTokens'"),
        (AZURE + "2023-11-16 18:15:46,3\n", r"line 2: field 'GeneratedTokens': the row has 2 fields"),
        (BURST + "-4,ChatGPT,472,18,490,Conversation log\n", r"line 2: field 'Timestamp'"),
        (BURST + "4,ChatGPT,472,-18,490,Conversation log\n", r"line 2: field 'Response tokens'"),
        ("time,tokens\n1,2\n", r"line 1: the header 'time, tokens' is of no known trace format"),
        (AZURE, r"no request in it"),
        ("", r"no request in it"),
    ],
)
def test_bad_rows_are_named_by_file_line_and_field(tmp_path, text, message):
    path = write(tmp_path / "bad.csv", text)
    with pytest.raises(DataError, match=message) as raised:
        trace_files.read(path)
    assert str(path) in raised.value.message


def test_a_missing_file_and_one_that_is_no_text(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv"):
        trace_files.read(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        trace_files.read(tmp_path / "bytes.csv")


def test_a_limit_takes_rows_from_the_beginning(tmp_path):
    rows = "".join(f"2023-11-16 18:15:4{i}.0,10,10\n" for i in range(9))
    assert len(trace_files.read(write(tmp_path / "a.csv", AZURE + rows), limit=4).requests) == 4
