"""``python -m sglang_harli.launch_server``: SGLang's server, with finetuning, on any device.

A thin start: it refuses what can be refused before sglang is imported, prepares the environment and
calls SGLang's own entry point.  All of it stands under ``__main__``, because SGLang's children run
this module again.  Leans on SGLang: ``plugins.load_plugins``,
``server_args.prepare_server_args``, ``launch_server.run_server``, ``utils.kill_process_tree``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sglang_harli.config import HarliOptions


def main(argv: Sequence[str]) -> None:
    """Serve until SIGTERM or Ctrl-C; ``argv``: SGLang's arguments and ours.  SystemExit, with one
    sentence: a device, option or SGLang version that is not accepted."""
    from sglang_harli.errors import HarliError
    from sglang_harli.managers.http.supervision import supervisor

    try:
        options = check_options(argv)
        flags = {argument.split("=")[0] for argument in argv}
        if not flags & {"-h", "--help", "--config"}:  # a file may say something else
            _check_port(argv)
            if options.enabled:
                supervisor.claim(options)
        notes = _prepare_environment(argv)
    except HarliError as error:
        raise SystemExit(f"sglang-harli: {error}") from error

    from sglang_harli import plugin

    plugin.supported_version(asked=True)
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    plugin.activate()  # where the package is on the path without being installed, SGLang does not find it
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
    for note in notes:
        print(note, file=sys.stderr, flush=True)
    server_args = prepare_server_args(list(argv))

    from sglang.launch_server import run_server
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def check_options(argv: Sequence[str]) -> HarliOptions:
    """The options, seconds before SGLang's own parser is up; ConfigError: a wrong one, a name that
    cannot be served, or a model folder that is not there."""
    from sglang_harli.config import FLAG_PREFIX, HarliOptions
    from sglang_harli.errors import ConfigError

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(message)

    parser = Parser(add_help=False, allow_abbrev=False)
    types = {"float": float, "int": int}
    for field in dataclasses.fields(HarliOptions):
        kind = types.get(str(field.type).split(" ")[0], str)
        flag = FLAG_PREFIX + field.name.replace("_", "-")
        parser.add_argument(flag, dest=field.name, type=kind, default=argparse.SUPPRESS)
    ours, rest = parser.parse_known_args(list(argv))
    for argument in rest:
        if argument.startswith(FLAG_PREFIX):
            known = [flag for action in parser._actions for flag in action.option_strings]
            near = difflib.get_close_matches(argument.split("=")[0], known, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]}" if near else "--help lists the options"
            raise ConfigError(f"{argument} is not an option: {hint}")
    _check_model(rest)
    return HarliOptions(**vars(ours))


def _check_model(argv: Sequence[str]) -> None:
    from sglang_harli.errors import ConfigError, shown
    from sglang_harli.names import colon_refusal

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model", dest="model", nargs="?")
    parser.add_argument("--served-model-name", dest="served", nargs="?")
    given, _ = parser.parse_known_args(list(argv))
    flag, name = ("--served-model-name", given.served) if given.served else ("--model-path", given.model)
    reason = colon_refusal(name or "", flag)
    if reason is not None:
        raise ConfigError(reason, param=flag)
    path = given.model or ""
    if path.startswith(("/", "./", "../")) and not os.path.exists(path):  # others may be ids of a hub
        raise ConfigError(f"--model-path {shown(path)}: there is no such folder", param="--model-path")


def _check_port(argv: Sequence[str]) -> None:
    """ConfigError where another process listens at the HTTP port, which SGLang finds out when the
    model is loaded; it would then ask that process whether it is healthy."""
    import errno
    import socket

    from sglang_harli.errors import ConfigError

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", nargs="?", default="127.0.0.1")
    parser.add_argument("--port", nargs="?", default="30000")
    parser.add_argument("--node-rank", nargs="?", default="0")
    given, _ = parser.parse_known_args(list(argv))
    if given.node_rank != "0" or not str(given.port).isdecimal():
        return
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(
            given.host, int(given.port), type=socket.SOCK_STREAM
        )
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:  # others are SGLang's to refuse
        if error.errno == errno.EADDRINUSE:
            text = f"--port {given.port}: another process listens there: end it, or give another --port"
            raise ConfigError(text, param="--port") from error
    except (OverflowError, UnicodeError):
        return


def _prepare_environment(argv: Sequence[str]) -> list[object]:
    """Caches, device, stand-in and switch, before sglang is imported; children inherit them.
    Returns notes to print, one line each.  ConfigError: no place for caches, or no such device."""
    from sglang_harli.config import SWITCH_ENV
    from sglang_harli.managers.http.start_up import user_caches
    from sglang_harli.platforms.cpu import engine
    from sglang_harli.platforms.device import choose_device

    notes: list[object] = [f"harli: {line}" for line in user_caches.provide()]
    choice = choose_device(argv)
    if choice.cpu_engine:
        engine.turn_on()
    os.environ[SWITCH_ENV] = "1"
    plugins = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if plugins and "harli" not in plugins:
        os.environ["SGLANG_PLUGINS"] = ",".join([*plugins, "harli"])
    return [*notes, choice]


if __name__ == "__main__":
    main(sys.argv[1:])
