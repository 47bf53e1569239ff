"""The file of measured points: whole or not at all, and of no use to another server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_harli.core import QuantumKind
from sglang_harli.predictor.profile.profile_table import (
    CorunPoint,
    DecodePoint,
    PrefillPoint,
    ProfileKey,
    ProfileTable,
    QuantumPoint,
    load,
)

KEY = ProfileKey("LlamaForCausalLM 512x8", "cpu", "bfloat16", "0.5.16", "attention=torch_native")
TABLE = ProfileTable(
    KEY,
    decode=(DecodePoint(1, 100, 0.008), DecodePoint(8, 900, 0.014, share=56)),
    prefill=(PrefillPoint(100, 10_000, 0.02),),
    quanta=(QuantumPoint(QuantumKind.BACKWARD, 256, 128, 0.017),),
    corun=(CorunPoint(8, 900, 56, 84, QuantumKind.FORWARD, 0.02),),
)


def test_it_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new" / "profile.json"
    TABLE.save(path)
    found = load(path, KEY)
    assert found.table == TABLE
    assert "5 measured points" in found.text
    assert [p.name for p in path.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ProfileKey)])
def test_a_foreign_table_is_left_aside_and_says_which_key_differs(tmp_path, name):
    TABLE.save(tmp_path / "p.json")
    found = load(tmp_path / "p.json", dataclasses.replace(KEY, **{name: "another"}))
    assert found.table is None
    assert len(found.differs) == 1 and found.differs[0].startswith(f"{name} is 'another'")
    assert getattr(KEY, name) in found.text and "harli profile" in found.text


def test_no_file_is_no_fault(tmp_path):
    found = load(tmp_path / "none.json", KEY)
    assert found.table is None and found.text.startswith("no latency profile at")


def _changed(**changes: object) -> dict:
    base = {
        "format": "harli-latency-profile",
        "version": 1,
        "key": dataclasses.asdict(KEY),
        "decode": [{"batch": 1, "context_tokens": 10, "seconds": 0.01, "share": 0}],
    }
    return {**base, **changes}


POINT = {"batch": 1, "context_tokens": 10, "seconds": 0.01, "share": 0}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "not a latency profile"),
        ({"format": "other"}, "not a latency profile"),
        (_changed(version=99), "version is 99"),
        (_changed(key={"model": "m"}), "its key needs"),
        (_changed(key={**dataclasses.asdict(KEY), "flags": 3}), "its key needs"),
        (_changed(decode={}), "decode is not a list"),
        (_changed(decode=[{**POINT, "seconds": -1}]), "decode[0].seconds"),
        (_changed(decode=[{**POINT, "seconds": "fast"}]), "decode[0].seconds"),
        (_changed(decode=[{**POINT, "seconds": True}]), "decode[0].seconds"),
        (_changed(decode=[POINT, {**POINT, "batch": 0}]), "decode[1].batch"),
        (_changed(decode=[{**POINT, "batch": 1.5}]), "decode[0].batch"),
        (_changed(decode=[{**POINT, "more": 1}]), "exactly the fields"),
        (_changed(quanta=[{"kind": "dance", "tokens": 1, "row_tokens": 1, "seconds": 1}]), "backward_kept"),
    ],
)
def test_a_damaged_file_is_left_aside_and_says_where(tmp_path, document, says):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document))
    found = load(path, KEY)
    assert found.table is None
    assert says in found.text and str(path) in found.text and "harli profile" in found.text


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00\xff", '{"format": NaN}'])
def test_no_json_at_all(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_bytes(text.encode("latin-1"))
    assert load(path, KEY).table is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(at=st.integers(0, 2000), value=st.integers(0, 255))
def test_one_byte_that_is_wrong_never_raises(tmp_path: Path, at: int, value: int):
    path = tmp_path / "p.json"
    TABLE.save(path)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    load(path, KEY)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.json"
    TABLE.save(path)
    broken = dataclasses.replace(TABLE, prefill=(PrefillPoint(1, 1, object()),))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        broken.save(path)
    assert load(path, KEY).table == TABLE
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
