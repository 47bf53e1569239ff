"""Files of training data as bytes, and what reading them gives or says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_harli.errors import DataError
from sglang_harli.service.data import dataset
from sglang_harli.service.data.token_store import TokenReader, TokenWriter
from sglang_harli.service.rows.encoder import RowEncoder
from support.tokenizer import load_tokenizer, make_tokenizer_folder


def chat(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


A = chat("Grüße an die Möwe 👋", " zurück\u2028und\u0085her")
B = chat("wie weit?", "7 km\x0b")
PAIR = {"prompt": "Grüße an die Möwe 👋", "completion": " zurück\u2028und\u0085her"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return RowEncoder(load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture
def scan(tmp_path, tokenizer):
    """(summary, the rows' lines and tokens) of a file with these bytes."""

    def run(content: bytes | str, **options: Any) -> tuple[Any, list[tuple[int, list[int]]]]:
        path = tmp_path / "data.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with TokenWriter(tmp_path / "tokens") as writer:
            summary = dataset.scan(path, tokenizer, name="data.jsonl", writer=writer, **options)
        reader = TokenReader(tmp_path / "tokens")
        return summary, [(int(reader.lines[i]), reader.row(i)[0].tolist()) for i in range(len(reader))]

    return run


def lines_of(*rows: Any, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def refusal(scan, content: bytes | str) -> DataError:
    with pytest.raises(DataError) as caught:
        scan(content)
    return caught.value


def reasons(scan, content: bytes | str) -> dict[int, str]:
    """By the number of the line, or of the row where rows are no lines."""
    return {row.get("row", row.get("line")): row["reason"] for row in refusal(scan, content).details}


def write_large(path: Path, mib: int) -> Path:
    """Rows whose weight lies in a field that is ignored, of a quarter MiB each."""
    row = json.dumps({"prompt": "a", "completion": "b", "note": "x" * ((1 << 18) - 60)}).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(4 * mib):
            file.write(row)
    return path
