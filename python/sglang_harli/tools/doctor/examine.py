"""``harli doctor``: the checks in their order, each guarded: one that breaks is a problem of its
own, and the others go on."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_harli.errors import ConfigError
from sglang_harli.tools.doctor import probe
from sglang_harli.tools.doctor.asked import Asked
from sglang_harli.tools.doctor.finding import Finding, Status, problem, said

REPORT_VERSION = 1  # of the JSON's shape
# Name: module of ``checks`` and function.  A check is imported when it runs: what is missing here
# must not keep the others from running.  What takes seconds comes last.
CHECKS = {
    "python": "installation:python",
    "harli": "installation:harli",
    "sglang": "installation:sglang",
    "packages": "installation:packages",
    "plugin": "plugin:plugin",
    "environment": "installation:environment",
    "http-port": "ports:http_port",
    "finetune-endpoint": "ports:finetune_endpoint",
    "ephemeral-ports": "ports:ephemeral_ports",
    "shared-memory": "shared_memory:shared_memory",
    "sockets": "run_directory:sockets",
    "run-dir": "run_directory:run_directory",
    "disk": "run_directory:disk",
    "job-store": "job_store:job_store",
    "finetune-service": "server:finetune_service",
    "http-server": "server:http_server",
    "curve-keys": "access:curve_keys",
    "access": "access:access",
    "open-files": "host:open_files",
    "cores": "host:cores",
    "memory": "host:memory",
    "clock": "host:clock",
    "device": "device:device",
    "seams": "plugin:seams",
    "hooks": "plugin:hooks",
}
# Those that wait for a process with heavy libraries, which is started before the first check.
PROBES = {"device": "torch", "seams": "sglang", "hooks": "sglang"}
REPORT_IT = "look at the message; if it is none of this machine's, report it with `harli doctor --json`"


@dataclass(frozen=True, slots=True)
class Result:
    """A check by its name, and what it found."""

    name: str
    finding: Finding

    def as_dict(self) -> dict[str, str]:
        f = self.finding
        return {"name": self.name, "status": str(f.status), "found": f.found, "mend": f.mend}


def chosen(only: Iterable[str] = (), *, quick: bool = False) -> list[str]:
    """The names of the checks to run, all where none is given; ``quick``: without those that take
    seconds.  ConfigError: there is no such check."""
    wanted = list(only)
    unknown = [name for name in wanted if name not in CHECKS]
    if unknown:
        raise ConfigError(
            f"--only {unknown[0]} is not accepted: give one of {', '.join(CHECKS)}", param="--only"
        )
    if wanted:
        return [name for name in CHECKS if name in wanted]
    return [name for name in CHECKS if not (quick and name in PROBES)]


def examine(asked: Asked, names: Sequence[str]) -> Iterator[Result]:
    """Each result as soon as it is known."""
    try:
        for part in {PROBES[name] for name in names if name in PROBES}:
            probe.begin(part)
        for name in names:
            yield Result(name, _guarded(CHECKS[name], asked))
    finally:
        probe.end()


def _guarded(check: str, asked: Asked) -> Finding:
    module, function = check.split(":")
    try:
        return getattr(importlib.import_module(f"{__package__}.checks.{module}"), function)(asked)
    except Exception as error:  # boundary: a check that breaks is its own problem; the others go on
        return problem(f"the check itself failed: {said(error)}", REPORT_IT)


def report(asked: Asked, results: list[Result]) -> dict[str, Any]:
    """The JSON of ``harli doctor --json`` (docs/operations.md)."""
    return {
        "version": REPORT_VERSION,
        "ok": healthy(results),
        "asked": {
            "run_dir": str(asked.run_dir),
            "endpoint": asked.endpoint,
            "http": asked.http,
            "port": asked.port,
        },
        "checks": [result.as_dict() for result in results],
    }


def healthy(results: Iterable[Result]) -> bool:
    """Whether nothing is a problem; warnings are none."""
    return all(result.finding.status is not Status.PROBLEM for result in results)
