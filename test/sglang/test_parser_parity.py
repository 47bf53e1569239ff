"""With the plugin, SGLang's parser is SGLang's own, and our options beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from sglang_harli.config import HarliOptions
from sglang_harli.platforms.cpu import engine

# Values for an option: the first that plain SGLang accepts is given to both.
TRIED = ("3", "0.5", "x", "true", "{}", "[]", '{"a": 1}', "1,2", "a=/m", "128MiB", "2024-01-01")


def described(action: argparse.Action) -> dict[str, Any]:
    shown = {name: getattr(action, name) for name in ("default", "nargs", "const", "required", "metavar")}
    choices = None if action.choices is None else sorted(map(str, action.choices))
    kind = getattr(action.type, "__qualname__", repr(action.type))
    return {
        "flags": action.option_strings,
        "action": type(action).__name__,
        "help": action.help,
        "choices": choices,
        "type": kind,
        **{name: repr(value) for name, value in shown.items()},
    }


def parsed(parser: argparse.ArgumentParser, argv: list[str]) -> dict[str, str] | None:
    """What the parser makes of it; None: it refuses."""
    try:
        return {name: repr(value) for name, value in vars(parser.parse_args(argv)).items()}
    except (SystemExit, Exception):  # an action may raise anything, an AssertionError too
        return None


def command_line(parser: argparse.ArgumentParser, action: argparse.Action) -> list[str] | None:
    """One that gives this option a value other than its default, if one is found."""
    flag = action.option_strings[-1]
    values = [[flag]] if action.nargs == 0 else [[flag, v] for v in (*map(str, action.choices or ()), *TRIED)]
    plain = parsed(parser, ["--model-path", "m"])
    found = [argv for argv in (["--model-path", "m", *v] for v in values) if parsed(parser, argv)]
    changed = [argv for argv in found if parsed(parser, argv) != plain]
    return next(iter(changed or found), None)


def look() -> dict[str, Any]:
    """In a process of its own: the parser before and after the plugin."""
    from sglang.srt import server_args
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_harli import plugin

    def parser() -> argparse.ArgumentParser:
        made = argparse.ArgumentParser()
        server_args.ServerArgs.add_cli_args(made)
        return made

    plain = parser()
    options = {action.dest: action for action in plain._actions if action.option_strings}
    options.pop("help")
    lines = {dest: command_line(plain, action) for dest, action in options.items()}
    expected = {dest: parsed(plain, argv) for dest, argv in lines.items() if argv}
    before = [described(action) for action in plain._actions]
    plugin.activate()
    HookRegistry.apply_hooks()
    ours = parser()
    own = [a for a in ours._actions if a.dest.startswith("harli_")]
    given: dict[str, Any] = {}
    for dest in expected:
        argv = lines[dest]
        assert argv is not None
        values = parsed(ours, argv)
        given[dest] = values and {n: v for n, v in values.items() if not n.startswith("harli_")}
    return {
        "class": server_args.ServerArgs.__name__,
        "before": before,
        "after": [described(action) for action in ours._actions if action not in own],
        "own": sorted(action.dest for action in own),
        "expected": expected,
        "given": given,
        "not tried": sorted(dest for dest, argv in lines.items() if argv is None),
    }


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    environment = dict(os.environ)
    engine.turn_on(environment, path=[])
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_option_of_sglang_is_as_it_was(seen):
    assert seen["class"] == "HarliServerArgs"
    assert seen["after"] == seen["before"]
    assert len(seen["before"]) > 400


def test_what_is_added_is_ours(seen):
    assert seen["own"] == sorted(f"harli_{field.name}" for field in dataclasses.fields(HarliOptions))


def test_every_option_parses_to_the_same_value(seen):
    assert seen["given"] == seen["expected"]
    assert len(seen["expected"]) > 400
    assert len(seen["not tried"]) <= 10, f"no value is found for {seen['not tried']}"


if __name__ == "__main__":
    print("\n" + json.dumps(look()))
