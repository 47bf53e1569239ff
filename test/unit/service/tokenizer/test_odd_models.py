"""A model's folder whose files cannot be read or hold something else: named in one sentence, or
passed over."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

import pytest
from tokenizers import Tokenizer

from sglang_harli.config import TokenizerFlags
from sglang_harli.errors import ConfigError, HarliError
from sglang_harli.service.rows.served_tokenizer import BackendEncoder
from sglang_harli.service.tokenizer import model_files
from sglang_harli.tools.check_data import check_data
from support.models import write_tokenizer
from support.other_user import needs_root, open_folder, run_python


def length(folder: Any) -> int | None:
    return model_files.model_length(TokenizerFlags(model_path=str(folder), tokenizer_path=str(folder)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"max_position_embeddings": 64}', 64),
        ('{"text_config": {"max_position_embeddings": 32}}', 32),
        ('{"text_config": null, "max_position_embeddings": 16}', 16),
        ('{"text_config": null}', None),
        ('{"text_config": [1]}', None),
        ('{"text_config": {}}', None),
        ('{"max_position_embeddings": null}', None),
        ('{"max_position_embeddings": true}', None),
        ('{"max_position_embeddings": "2048"}', None),
        ('{"max_position_embeddings": -1}', None),
        ('{"max_position_embeddings": 1e999}', None),
        ('{"max_position_embeddings": NaN}', None),
        ("{}", None),
    ],
)
def test_what_a_config_says(tmp_path, content, expected):
    (tmp_path / "config.json").write_text(content)
    assert length(tmp_path) == expected


@pytest.mark.parametrize(
    "content", ["[]", "null", "5", '"x"', "", "{", "\x00\x01", "[" * 100_000, '{"a": ' * 100_000, "\xff"]
)
def test_a_config_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(HarliError, match=r"config\.json"):
        length(tmp_path)


def test_a_long_text_is_encoded_beside_the_other_threads(tmp_path):
    write_tokenizer(tmp_path, vocab_size=509)
    encoder = BackendEncoder(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    ended, turns = threading.Event(), 0

    def turn() -> None:
        nonlocal turns
        while not ended.wait(0.001):
            turns += 1

    beside = threading.Thread(target=turn)
    beside.start()
    text = "a" * 1_000_000
    before = turns
    ids = encoder.encode(text, special=False)
    during = turns - before
    ended.set()
    beside.join()
    assert during > 20, "the event loop of the service is such a thread"
    assert ids == encoder.backend.encode(text, add_special_tokens=False).ids


@needs_root
def test_a_config_that_may_not_be_read():
    script = """
import sys
from sglang_harli.config import TokenizerFlags
from sglang_harli.errors import HarliError
from sglang_harli.service.rows.served_tokenizer import BackendEncoder
from sglang_harli.service.tokenizer import model_files
try:
    model_files.model_length(TokenizerFlags(model_path=sys.argv[1], tokenizer_path=sys.argv[1]))
except HarliError as error:
    print(error.message)
"""
    with open_folder() as folder:
        path = folder / "config.json"
        path.write_text('{"max_position_embeddings": 64}')
        run = f"import sys; sys.argv = ['', {str(folder)!r}]\n{script}"
        path.chmod(0)
        assert run_python(run).stdout == f"{path} cannot be read: Permission denied\n"
        path.chmod(0o644)
        folder.chmod(0)
        assert run_python(run).stdout == f"{path} cannot be read: Permission denied\n"
        folder.chmod(0o755)


@pytest.mark.parametrize(
    "path", ["x" * 5000, "/" + "x" * 300, "a\0b", "/dev/null", "~nobody-of-that-name/x", "./loop"]
)
def test_paths_that_can_be_no_model(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with contextlib.suppress(HarliError):
        assert length(path) is None
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ConfigError) as caught:
        check_data(data, TokenizerFlags(model_path=path, tokenizer_path=path))
    assert caught.value.param == "model"
    (tmp_path / "loop").unlink()


def test_check_data_names_an_odd_config(tmp_path):
    write_tokenizer(tmp_path, vocab_size=400)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    flags = TokenizerFlags(model_path=str(tmp_path), tokenizer_path=str(tmp_path))
    for content in ("[]", "{", '{"text_config": null}'):
        (tmp_path / "config.json").write_text(content)
        if content.startswith('{"'):
            assert check_data(data, flags)["max_seq_length"] is None
        else:
            with pytest.raises(ConfigError, match=r"config\.json"):
                check_data(data, flags)
    assert json.loads((tmp_path / "config.json").read_text()) == {"text_config": None}
