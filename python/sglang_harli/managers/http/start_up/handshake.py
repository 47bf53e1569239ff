"""HTTP process: starts the service before SGLang's processes, and checks that the hooks took.

SGLang only logs a hook that could not be applied and then serves plain; so each scheduler rank puts
a hello into its init info, and a server without it stops.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

from sglang_harli.managers.http.supervision import supervisor
from sglang_harli.sglang_versions.current import arguments
from sglang_harli.sglang_versions.current import launch as launch_results

KEY = "harli"  # in Scheduler.get_init_info(): {"version": str, "refusal": str | None}


_http_server = False


def http_server_starts(*_args: Any, **_kwargs: Any) -> None:
    """Before SGLang's ``http_server.launch_server``: the next launch has an HTTP process."""
    global _http_server
    _http_server = True


def launch(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
    """Around ``Engine._launch_subprocesses``: the service first, the hello last.  SystemExit: a
    rank says no hello, or refuses the model; or this is the offline Engine, without HTTP."""
    if not _http_server:
        raise SystemExit(
            "sglang-harli: finetuning needs a server, whose HTTP process publishes the adapters: start "
            "`python -m sglang_harli.launch_server`, or give Engine(harli_finetune='off')"
        )
    server_args = kwargs["server_args"] if "server_args" in kwargs else args[0]
    arguments.resolve(server_args)  # a refusal comes before the service
    supervisor.start(server_args.harli_options(), arguments.in_force(server_args))
    launched = original(cls, *args, **kwargs)
    schedulers, watchdog = launch_results.parts(launched)
    try:
        check_hello(schedulers.scheduler_infos)
    except SystemExit:
        # At exit, collecting a zmq context of SGLang's waits for its messages to dead schedulers.
        gc.disable()
        if watchdog is not None:
            watchdog.stop()  # it would answer the end of the children by killing us before the sentence is out
        raise
    return launched


def check_hello(scheduler_infos: Sequence[dict[str, Any]]) -> None:
    """Raise SystemExit unless every scheduler rank said hello and can finetune its model."""
    if not scheduler_infos:
        raise SystemExit(_missing("no scheduler reported"))
    for rank, info in enumerate(scheduler_infos):
        hello = info.get(KEY)
        if hello is None:
            raise SystemExit(_missing(f"scheduler {rank} runs without it"))
        if hello.get("refusal"):
            raise SystemExit(
                f"sglang-harli: {hello['refusal']}; serve without finetuning by --harli-finetune off"
                if "--harli-finetune off" not in hello["refusal"]
                else f"sglang-harli: {hello['refusal']}"
            )


def _missing(what: str) -> str:
    return (
        f"sglang-harli: the plugin did not reach SGLang's scheduler ({what}): install sglang-harli into the environment "
        "that runs SGLang, let SGLANG_PLUGINS name harli, or serve without finetuning by --harli-finetune off"
    )
