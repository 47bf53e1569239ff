"""The examples of docs/client.md do what the page says, against the real service."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.config import DEFAULT_ENDPOINT, ENDPOINT_ENV
from support.service.service_fixture import pairs

PAGE = Path(__file__).parents[3] / "docs" / "client.md"


def test_the_examples_run(
    rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ENDPOINT_ENV, rig.service.endpoint)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(8)))
    first, *others = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert DEFAULT_ENDPOINT in first and len(others) == 3
    names: dict[str, Any] = {"__name__": "page"}
    exec(first.replace(DEFAULT_ENDPOINT, rig.service.endpoint), names)  # the page's own code
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("job_created") and shown[-2].startswith("succeeded")
    assert shown[-1].startswith("succeeded tiny-ft-support-")
    with FinetuneClient() as client:
        names["client"] = client
        for example in others:
            exec(example, names)
    assert capsys.readouterr().out.startswith("1 ")
    [adapter] = asyncio.run(names["train"](["pairs.jsonl"]))
    assert adapter.startswith("tiny-ft-")
