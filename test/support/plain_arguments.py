"""SGLang's arguments at their defaults, for parts of it that need no model.

The caller has set the CPU engine's environment before the first import of sglang.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

from support.model_runner import NEWEST


def plain_arguments(**fields: Any) -> Any:
    """With these in force; on 0.5.23 they are this process's too, where its parts look for them."""
    from sglang.srt.server_args import ServerArgs

    if not NEWEST:
        defaults = {field.name: field.default for field in dataclasses.fields(ServerArgs)}
        return SimpleNamespace(**{**defaults, **fields})
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.runtime_context import get_context

    args = ServerArgs(model_path="dummy")  # by this name it is resolved without looking for a model
    args.resolve_once()
    declare_resolution(args, "test", **fields)
    get_context().set_server_args(args)
    return args


def init_control(manager: Any) -> None:
    """The part of a TokenizerManager that talks to the scheduler; its arguments are set."""
    if NEWEST:
        manager.init_communicators()
    else:
        manager.init_communicators(manager.server_args)


def read_arguments(manager: Any) -> None:
    """What stands for a TokenizerManager answers of them as SGLang's own does on 0.5.23."""
    if NEWEST:
        from sglang.srt.managers.tokenizer_manager import TokenizerManager

        manager.config_value = functools.partial(TokenizerManager.config_value, manager)
