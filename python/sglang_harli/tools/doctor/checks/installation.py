"""Whether Python, SGLang, this package and the libraries under both are there, once, and in
versions that go together."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from sglang_harli.config import POOL_DEBUG_ENV, SERVICE_ENV, SWITCH_ENV
from sglang_harli.failpoints import FAULT_POINTS_ENV
from sglang_harli.managers.scheduler.memory.backing_choice import ACCEPTED, POOL_BACKING_ENV
from sglang_harli.sglang_versions import supported
from sglang_harli.tools.doctor.finding import Finding, ok, problem, skipped, together, warning

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OURS = "sglang-harli"
PYTHONS = ((3, 11), (3, 12))
# Of what SGLang asks for, what ours runs on too; named with their versions where all is well.
OF_SGLANG = ("torch", "transformers", "openai")
SHOWN = ("torch", "transformers", "peft", "pyzmq", "msgspec", "openai")
# Imported here to see that they are whole; torch and what imports it have a process of their own.
LIGHT = {
    "pyzmq": "zmq",
    "msgspec": "msgspec",
    "orjson": "orjson",
    "sqlalchemy": "sqlalchemy",
    "numpy": "numpy",
}
INSTALL_AGAIN = "install it again beside the SGLang that you serve with (`pip install --no-deps dist/*.whl`)"


def python(_asked: Any) -> Finding:
    found = f"Python {sys.version.split()[0]} ({sys.executable})"
    if sys.version_info[:2] in PYTHONS:
        return ok(found)
    accepted = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    return problem(found, f"make an environment with Python {accepted}, and install into it")


# ------------------------------------------------------------------ distributions and where they lie
def distributions(name: str) -> list[importlib.metadata.Distribution]:
    """All of that name on the path, the first one is in force."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(name=name):
        found.setdefault(os.path.realpath(str(distribution.locate_file("."))), distribution)
    sources = [source for d in found.values() if (source := _source(d)) is not None]
    return [d for place, d in found.items() if not _is_build_metadata(d, Path(place), sources)]


def _is_build_metadata(
    distribution: importlib.metadata.Distribution, place: Path, sources: list[Path]
) -> bool:
    """What a build leaves in the source tree of an editable installation is no second one."""
    built = distribution.read_text("SOURCES.txt") is not None  # of setuptools' .egg-info
    return built and any(place.is_relative_to(source) for source in sources)


def belongs(distribution: importlib.metadata.Distribution, package: str, origin: Path) -> bool:
    """Whether the package that is imported from ``origin`` is the distribution's."""
    installed = Path(str(distribution.locate_file(package)))
    if installed.exists() and installed.resolve() == origin:
        return True
    source = _source(distribution)
    return source is not None and origin.is_relative_to(source)


def _source(distribution: importlib.metadata.Distribution) -> Path | None:
    """The source tree of an editable installation."""
    try:
        about = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return None
    if not about.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlsplit(about["url"]).path)).resolve()


def origin_of(package: str) -> Path | None:
    """The folder that it would be imported from; None: it cannot be found.

    By the finders: ``importlib.util.find_spec`` hides SGLang once this process has a tokenizer
    (service/tokenizer/hidden_torch.py)."""
    for finder in sys.meta_path:
        spec = finder.find_spec(package, None)
        if spec is not None:
            places = list(spec.submodule_search_locations or ())
            return Path(places[0]).resolve() if places else None
    return None


def placed(name: str, package: str) -> Finding:
    """Whether a distribution is there once, and its package the one that is imported."""
    there, origin = distributions(name), origin_of(package)
    if origin is None:
        reinstall = f"pip install {name}=={supported.NEWEST}" if package == "sglang" else INSTALL_AGAIN
        return problem(f"{name} is not installed in {sys.prefix}", reinstall)
    if not there:
        return problem(
            f"{package} is imported from {origin}, and no {name} is installed: its entry points are missing",
            f"pip install it: a source tree by `pip install --no-deps -e {origin.parents[1]}`",
        )
    if len(there) > 1:
        places = ", ".join(f"{d.version} in {d.locate_file('.')}" for d in there)
        return problem(
            f"{name} is installed {len(there)} times: {places}",
            f"pip uninstall {name} until none is left, then install it once",
        )
    found = f"{name} {there[0].version} in {origin}"
    if not belongs(there[0], package, origin):
        return warning(
            f"{package} is imported from {origin}, which is not the installed {name} {there[0].version} "
            f"of {_source(there[0]) or there[0].locate_file('.')}",
            f"take {origin.parent} off PYTHONPATH, or pip install what lies there",
        )
    here = Path.cwd() / package
    if (here / "__init__.py").is_file() and here.resolve() != origin:
        return warning(
            f"{found}; `python -m` takes the {package} of the current folder, {here}, instead",
            "start the server in another folder",
        )
    return ok(found)


def harli(_asked: Any) -> Finding:
    return placed(OURS, "sglang_harli")


def sglang(_asked: Any) -> Finding:
    place = placed("sglang", "sglang")
    if origin_of("sglang") is None:
        return place
    version = supported.installed()
    if not supported.is_supported():
        return together(
            [
                place,
                problem(
                    f"sglang {version} is not supported",
                    f"pip install sglang=={supported.NEWEST} (or {', '.join(v for v in supported.SUPPORTED if v != supported.NEWEST)})",
                ),
            ]
        )
    files = ok(f"supported, with the files for {supported.FOLDERS[supported.public(version)]!r}")
    return together([place, files])


# ------------------------------------------------------------------ what both need
def packages(_asked: Any) -> Finding:
    try:
        ours = importlib.metadata.requires(OURS) or []
    except importlib.metadata.PackageNotFoundError:
        return skipped(f"{OURS} has no metadata that says what it needs", INSTALL_AGAIN)
    try:
        theirs = importlib.metadata.requires("sglang") or []
    except importlib.metadata.PackageNotFoundError:
        theirs = []  # which the check before this one says
    wrong = [*judge(ours, installed_version), *judge(theirs, installed_version, OF_SGLANG), *broken(LIGHT)]
    if wrong:
        return together(wrong)
    there = ((name, installed_version(name)) for name in SHOWN)
    return ok(", ".join(f"{name} {version}" for name, version in there if version))


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def judge(requires: Iterable[str], version_of: Any, only: tuple[str, ...] = ()) -> Iterator[Finding]:
    """What of a distribution's ``Requires-Dist`` is missing or in another version.

    Args:
        version_of: the installed version of a name, or None.
        only: look at these names alone, which SGLang pins; another version of them is a warning,
            for builds of a GPU's vendor have versions of their own.
    """
    for wanted in _parsed(requires):
        if wanted.name == "sglang" or (only and wanted.name not in only):
            continue  # SGLang has a check of its own
        version = version_of(wanted.name)
        mend = f"pip install '{wanted.name}{wanted.specifier}'"
        if version is None:
            yield problem(f"{wanted.name} is not installed", mend)
        elif not wanted.specifier.contains(version, prereleases=True):
            say = warning if only else problem
            yield say(f"{wanted.name} {version} is not {wanted.specifier}", mend)


def _parsed(requires: Iterable[str]) -> Iterator[Requirement]:
    from packaging.requirements import Requirement

    for text in requires:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            yield wanted


def broken(modules: Mapping[str, str]) -> Iterator[Finding]:
    """What is installed and cannot be imported, by distribution and module."""
    for name, module in modules.items():
        if installed_version(name) is None:
            continue
        try:
            importlib.import_module(module)
        except (ImportError, OSError, AttributeError) as error:
            yield problem(
                f"{name} cannot be imported ({error})", f"pip install --force-reinstall --no-deps {name}"
            )


# ------------------------------------------------------------------ the environment
# Variables that are the server's own, or for tests: what they do where a user sets them.
NOT_YOURS = {
    SWITCH_ENV: "makes every SGLang in this shell one with harli",
    SERVICE_ENV: "is the server's, for its finetune service",
    supported.VERSION_ENV: "hides which SGLang is installed",
    FAULT_POINTS_ENV: "arms kills and refused writes of tests",
    POOL_DEBUG_ENV: "fills memory with NaN, which is slow",
}


def environment(_asked: Any) -> Finding:
    return judge_environment(os.environ)


def judge_environment(environ: Mapping[str, str]) -> Finding:
    """``environ`` as the server would find it."""
    wrong = [
        warning(f"{name}={environ[name]} is set, and {what}", f"unset {name}")
        for name, what in NOT_YOURS.items()
        if environ.get(name)
    ]
    asked = environ.get(POOL_BACKING_ENV)
    if asked and asked not in ACCEPTED:
        wrong.append(
            problem(
                f"{POOL_BACKING_ENV}={asked} names no backing, and no server with finetuning starts",
                f"unset {POOL_BACKING_ENV}, or set one of {', '.join(ACCEPTED)}",
            )
        )
    return together(wrong or [ok("no variable is set that is the server's own or for tests")])
