"""What a running server says of itself: the finetune service at its endpoint, and the HTTP
server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_harli.core import PROFILE_ROUTE
from sglang_harli.errors import HarliError, shown
from sglang_harli.tools.doctor import proc
from sglang_harli.tools.doctor.asked import Answer, Asked
from sglang_harli.tools.doctor.finding import Finding, ok, problem, skipped, together, warning

STARTS_S = 600.0  # how long a server may take to load its model
LAUNCH = "start it with `python -m sglang_harli.launch_server`"
SEE_LOG = "look into the server's log"
SEE_STATUS = "harli status says more"
ADDRESS = "give --endpoint and --curve-keys as the server has them"


def finetune_service(asked: Asked) -> Finding:
    answer = asked.answer
    if answer.status is not None:
        return judge_status(answer, asked.endpoint)
    assert answer.error is not None
    holder = proc.lock_holder(asked.run_dir / "lock")
    return judge_silence(answer.error, asked, holder)


def judge_silence(error: HarliError, asked: Asked, holder: proc.Process | None) -> Finding:
    """``holder``: the server that has the run directory, None: there is none."""
    if error.code != "cannot_connect":
        return problem(error.message, ADDRESS)
    if holder is not None:
        return warning(
            f"{error.message}, and {asked.run_dir} is used by the server with {holder}",
            f"wait until it is up ({SEE_LOG}), or {ADDRESS}",
        )
    if asked.endpoint_given:
        return warning(error.message, f"{LAUNCH}, or {ADDRESS}")
    return skipped(error.message, f"start a server, or {ADDRESS}")


def judge_status(answer: Answer, endpoint: str) -> Finding:
    """``answer``: with the status, as ``harli status --json`` prints it."""
    assert answer.status is not None
    service, jobs = answer.status["service"], answer.status["jobs"]
    if service.get("state") == "down":
        return problem(f"{endpoint}: finetuning is down: {service['reason']}", str(service["remedy"]))
    counts = ", ".join(f"{count} {name}" for name, count in jobs.items() if count) or "none"
    found = ok(f"{endpoint}: pid {service['pid']}, base {service.get('base') or 'unknown'}, jobs: {counts}")
    return together([found, *_parts(service), *_jobs(service, answer), *_figures(answer.status)])


def _parts(service: dict[str, Any]) -> Iterator[Finding]:
    """Whether the server's processes have met, which proves the hooks in both."""
    young = service["uptime_s"] < STARTS_S
    said = warning if young else problem
    mend = (
        f"wait until the server says that it is ready, and {SEE_LOG}"
        if young
        else f"{SEE_LOG}, and restart it"
    )
    if service["scheduler_pid"] is None:
        yield said("the scheduler has not said hello", mend)
    elif not service["scheduler_answers"]:
        yield warning(
            "the scheduler has not answered within a second", f"ask again; if it stays so, {SEE_LOG}"
        )
    if service["http_pid"] is None:
        yield said("the HTTP process has not said hello: no adapter is published", mend)
    if service["refusal"]:
        yield problem(
            f"this server cannot train: {service['refusal']}",
            "start it with another model or other flags (docs/operations.md, What is refused at start-up)",
        )


def _jobs(service: dict[str, Any], answer: Answer) -> Iterator[Finding]:
    if service["hold"]:
        yield warning(f"no job starts now: {service['hold']}", SEE_STATUS)
    elif answer.waits and answer.status and not answer.status["jobs"].get("running"):
        yield warning(
            f"the next job waits: {shown(answer.waits)[1:-1]}", "harli list, and harli show JOB, say more"
        )
    if service["store"] != "ok":
        yield problem(f"the job store: {service['store']}", "make room on its disk, or end what holds it")
    if service["unreadable_jobs"]:
        names = ", ".join(service["unreadable_jobs"])
        yield warning(f"jobs that cannot be read: {names}", "submit their data again: their folders are kept")
    if service["trouble"]:
        yield warning(f"a message went wrong: {service['trouble']}", SEE_LOG)


def _figures(status: dict[str, Any]) -> Iterator[Finding]:
    serving = status["serving"] or {}
    impossible = serving.get("impossible_targets")
    if impossible:
        targets = "; ".join(impossible)
        yield warning(
            f"serving alone misses a target: {targets}",
            "raise it: harli set tpot-slo-ms=V, or ttft-slo-ms, max-itl-ms",
        )
    parity = serving.get("parity") or {}
    if parity.get("state") == "failed":
        yield warning(str(parity["why"]), SEE_LOG)
    if parity.get("state") == "differs":
        yield problem(
            f"training is not what is served: {parity['why']}",
            "see docs/operations.md, What is served is what is trained",
        )


# ------------------------------------------------------------------ HTTP
def http_server(asked: Asked) -> Finding:
    health = asked.get("/health")
    if health.code == 0:
        return _no_http(asked, health.text)
    if health.code != 200:
        return judge_health(asked.http, health.code, health.text)
    if asked.api_key and asked.get("/v1/models").code in (401, 403):
        return problem(
            f"{asked.http} refuses the API key that was given",
            "give --api-key, or HARLI_API_KEY, as the server has it",
        )
    if asked.answer.status is not None:
        return ok(f"{asked.http}/health answers 200")
    ours = asked.get(PROFILE_ROUTE)
    return judge_ours(asked.http, ours.code, ours.text)


def _no_http(asked: Asked, why: str) -> Finding:
    found = f"no HTTP server answers at {asked.http} ({why})"
    mend = "give --http or --port as the server has them"
    if asked.http_given:
        return warning(found, f"{LAUNCH}, or {mend}")
    if asked.answer.status is not None:
        return warning(f"{found}, and the finetune service does", f"wait until the server is up, or {mend}")
    return skipped(found, f"start a server, or {mend}")


def judge_health(url: str, code: int, text: str) -> Finding:
    """``code``: of /health, not 200."""
    if code == 503:
        return warning(f"{url}/health answers 503: {text or 'starting, or ending'}", f"wait, and {SEE_LOG}")
    return problem(
        f"{url}/health answers {code}: it is no SGLang server, or something is in front of it",
        "give --http or --port as the server has them",
    )


def judge_ours(url: str, code: int, text: str) -> Finding:
    """``code``: of a route that only harli adds."""
    if code == 404:
        return warning(f"an SGLang without harli answers at {url}", f"to finetune, {LAUNCH}")
    if code in (401, 403):
        return ok(f"{url}/health answers 200; its API key is needed to see more (--api-key)")
    if code == 503:
        return warning(f"{url}: {text}", SEE_LOG)
    if code == 0:
        return warning(f"{url}/health answers 200, and {PROFILE_ROUTE} nothing ({text})", SEE_LOG)
    if code != 200 or not text.startswith("{"):  # harli's is a JSON object, of which the beginning was read
        return warning(
            f"{url}/health answers 200, and {PROFILE_ROUTE} not what harli does (status {code})",
            f"give --http or --port as the server has them, and {SEE_LOG}",
        )
    return ok(f"{url}/health answers 200, with harli")
