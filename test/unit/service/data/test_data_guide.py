"""The data guide: each of its examples is read, as the form under whose heading it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_harli.protocol.rows import forms
from sglang_harli.service.data import dataset
from sglang_harli.service.data.files import lines, packed, parquet_child
from sglang_harli.service.rows.encoder import RowEncoder
from sglang_harli.service.rows.notes import _SENTENCES, ANSWERS_APART
from support.chat_templates import make_family
from support.project_files import ROOT
from support.tokenizer import load_tokenizer

GUIDE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(
    r"^(#+ [^\n]*)$|^```(jsonl|json|csv|python)\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL
)
FORM_OF = {
    "### Messages": forms.MESSAGES,
    "### Prompt and completion": forms.PAIR,
    "### Alpaca": forms.ALPACA,
    "### ShareGPT": forms.SHAREGPT,
}


def examples() -> list[tuple[str, str, str]]:
    """(heading, language, text)."""
    found, heading = [], ""
    for title, language, text in BLOCKS:
        heading = title or heading
        if language:
            found.append((heading, language, text))
    return found


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> RowEncoder:
    return RowEncoder(load_tokenizer(make_family(tmp_path_factory.mktemp("qwen3"), "qwen3")))


@pytest.mark.parametrize(("heading", "language", "text"), examples())
def test_an_example_is_read_as_what_it_is_shown_for(
    encoder, tmp_path: Path, monkeypatch, heading: str, language: str, text: str
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.parquet"
    if language == "python":
        exec(text, {})
    else:
        path.write_text(text, encoding="utf-8")
    summary = dataset.scan(path, encoder, name="example")
    kind = {"python": "parquet"}.get(language, language)
    assert summary.file_format == kind
    assert summary.rows >= summary.lines  # this template gives each answer of a conversation a row
    assert summary.ignored_fields == [] and summary.repeated_fields == []
    if heading in FORM_OF:
        assert summary.format == FORM_OF[heading]


def test_every_form_and_kind_has_an_example():
    assert {FORM_OF[heading] for heading, *_ in examples() if heading in FORM_OF} == {*forms.FIELDS}
    assert {language for _, language, _ in examples()} == {"jsonl", "json", "csv", "python"}


def test_limits_and_notes_are_those_of_the_code():
    assert packed.MAX_EXPANDED_BYTES == 4 << 30 and "| a file | 4 GiB" in GUIDE
    assert f"beyond {packed.FREE_BYTES >> 20} MiB at most {packed.MAX_RATIO} times" in GUIDE
    assert f"| a row | {lines.MAX_LINE_BYTES >> 20} MiB" in GUIDE
    memory, footer = parquet_child.MEMORY_BYTES >> 30, parquet_child.MAX_FOOTER_BYTES >> 20
    assert f"{memory} GiB of memory for the process that reads it; {footer} MiB for" in GUIDE
    missing = [code for code in _SENTENCES if code != ANSWERS_APART and f"`{code}`" not in GUIDE]
    assert not missing
