"""Whether SGLang finds the plugin, and whether the installed SGLang is what the plugin leans on."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_harli.errors import HarliError
from sglang_harli.sglang_versions import supported
from sglang_harli.tools.doctor.checks.installation import INSTALL_AGAIN, origin_of
from sglang_harli.tools.doctor.finding import Finding, ok, problem, said, skipped, together, warning
from sglang_harli.tools.doctor.probe import ProbeError, probe

GROUP = "sglang.srt.plugins"
NAME, VALUE = "harli", "sglang_harli.plugin:activate"
PLUGINS_ENV = "SGLANG_PLUGINS"
SHOWN = 5  # names of what does not hold
MEND_SGLANG = f"pip install --force-reinstall --no-deps sglang=={supported.NEWEST}"
SEE_ALL = "python -m sglang_harli.tools.seam_check --problems shows all"


def plugin(_asked: Any) -> Finding:
    found = [e for e in importlib.metadata.entry_points(group=GROUP) if e.name == NAME]
    return together([judge_entry_points(found), judge_filter(os.environ)])


def judge_entry_points(found: Sequence[importlib.metadata.EntryPoint]) -> Finding:
    """``found``: the entry points of our name in SGLang's group."""
    values = sorted({entry.value for entry in found})
    if not values:
        return problem(f"SGLang finds no plugin {NAME!r} (entry point group {GROUP})", INSTALL_AGAIN)
    if values != [VALUE]:
        return problem(f"the plugin {NAME!r} is {', '.join(values)}, not {VALUE}", INSTALL_AGAIN)
    try:
        found[0].load()
    except Exception as error:  # boundary: whatever an import raises is what SGLang would only log
        return problem(f"the plugin cannot be imported ({said(error)})", INSTALL_AGAIN)
    return ok(f"SGLang finds the plugin {NAME!r}")


def judge_filter(environ: Mapping[str, str]) -> Finding:
    """Of ``SGLANG_PLUGINS``, which names the plugins that SGLang may load."""
    allowed = [name.strip() for name in environ.get(PLUGINS_ENV, "").split(",") if name.strip()]
    if allowed and NAME not in allowed:
        return warning(
            f"{PLUGINS_ENV}={environ[PLUGINS_ENV]} keeps it out of `sglang serve`",
            f"export {PLUGINS_ENV}={','.join([*allowed, NAME])}, or start with `python -m sglang_harli.launch_server`, "
            "which does",
        )
    return ok(f"{PLUGINS_ENV} lets it in" if allowed else f"{PLUGINS_ENV} is not set")


# ------------------------------------------------------------------ asked of SGLang itself
def seams(_asked: Any) -> Finding:
    answer = _sglang()
    return answer if isinstance(answer, Finding) else judge_seams(answer)


def judge_seams(answer: Mapping[str, Any]) -> Finding:
    """``answer``: of the probe (seams: how many; broken: reasons by name)."""
    broken = answer["broken"]
    version, count = supported.installed(), answer["seams"]
    if not broken:
        return ok(f"sglang {version}: all {count} seams hold")
    return problem(
        f"sglang {version}: {count - len(broken)} seams hold, {len(broken)} do not: {_named(broken)}",
        f"{MEND_SGLANG}, if it was changed after it was installed; {SEE_ALL}",
    )


def hooks(_asked: Any) -> Finding:
    answer = _sglang()
    return answer if isinstance(answer, Finding) else judge_hooks(answer)


def judge_hooks(answer: Mapping[str, Any]) -> Finding:
    """``answer``: of the probe (hooks: how many targets; refused: reasons by target)."""
    refused = answer["refused"]
    if not refused:
        return ok(f"all {answer['hooks']} hooks can be applied")
    return problem(
        f"{len(refused)} of {answer['hooks']} hooks cannot be applied: {_named(refused)}",
        f"{MEND_SGLANG}, if it was changed after it was installed; {SEE_ALL}",
    )


def _named(reasons: Mapping[str, str]) -> str:
    shown = [f"{name}: {why}" for name, why in list(reasons.items())[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else "")


def _sglang() -> dict[str, Any] | Finding:
    if origin_of("sglang") is None:
        return skipped("there is no sglang to look at", f"pip install sglang=={supported.NEWEST}")
    if not supported.is_supported():
        return skipped(
            f"sglang {supported.installed()} is not supported, so that nothing is put into it",
            f"pip install sglang=={supported.NEWEST}; {SEE_ALL.replace('shows all', 'shows what differs')}",
        )
    try:
        probe("torch")
    except ProbeError:
        return skipped("not looked at: torch, which SGLang imports, cannot be used", "see the check device")
    try:
        return probe("sglang")
    except ProbeError as error:
        return problem(error.message, f"{MEND_SGLANG}, and what the checks sglang and packages name")
    except HarliError as error:
        return problem(error.message, MEND_SGLANG)
