"""Runs schemathesis against a server's own document, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from support.api_server import ApiServer
from support.project_files import ROOT

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ensure_resource_availability",
)
CONFIG = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "503"]\n'


def run(
    server: ApiServer,
    folder: Path,
    objects: dict[str, Any],
    *,
    phases: str,
    examples: int,
    checks: Sequence[str] = CHECKS,
) -> list[dict[str, Any]]:
    """The requests with their answers, in HAR's form, where every check has passed.

    Args:
        folder: of what the run writes.
        objects: for ``schemathesis_hooks``.
        examples: of each operation; more come from its document.

    Raises:
        AssertionError: a check failed; with schemathesis's report.
    """
    from support.schemathesis_hooks import OBJECTS  # imports schemathesis, which takes a second

    config, har = folder / "schemathesis.toml", folder / "requests.har"
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [f"{server.url}/openapi.json", "--url", server.url, "--seed", "1", "--no-color"]
    command += ["--phases", phases, "--max-examples", str(examples)]
    command += ["--checks", ",".join(checks), "--continue-on-failure", "--no-shrink"]
    command += ["--suppress-health-check", "all", "--warnings", "off", "--report-har-path", str(har)]
    env = os.environ | {
        "PYTHONPATH": f"{ROOT / 'test'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "SCHEMATHESIS_HOOKS": "support.schemathesis_hooks",
        OBJECTS: json.dumps(objects),
    }
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(har.read_text())["log"]["entries"]


def statuses(server: ApiServer, entries: Sequence[dict[str, Any]]) -> dict[str, set[int]]:
    """The statuses that each operation of the document answered with, by ``METHOD PATH``."""
    paths = server.app.openapi()["paths"]
    found: dict[str, set[int]] = defaultdict(set)
    for entry in entries:
        request = entry["request"]
        found[f"{request['method']} {template(paths, request['url'])}"].add(entry["response"]["status"])
    return {f"{m.upper()} {path}": found[f"{m.upper()} {path}"] for path in paths for m in paths[path]}


def template(paths: dict[str, Any], url: str) -> str | None:
    """The path of the document that a URL is of."""
    path = urlsplit(url).path
    for name in paths:
        if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(name)), path):
            return name
    return None
