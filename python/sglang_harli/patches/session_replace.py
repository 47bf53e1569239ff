"""Runtime half of ``patches/14-session-replace``: replacing a session's requests is safe.

Leans on: ``srt.session.session_controller`` (``Session.create_req``, ``SessionReqNode.clear``;
``streaming``, ``req_nodes``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SESSION = "sglang.srt.session.session_controller"


def _before_create(session: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    params = request.session_params
    if params.replace and params.rid is None and not session.streaming:
        for node in list(session.req_nodes.values()):  # SGLang then finds none
            node.clear(session.req_nodes)


def _clear(original: Callable[..., None], node: Any, req_dict: dict[str, Any]) -> None:
    """Take out a node and all that follow it, by a loop: a long conversation is a chain as deep."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    left = [node]
    while left:
        node = left.pop()
        left += node.children
        if node.req.finished_reason is None:
            node.req.to_finish = FINISH_ABORT()
        if req_dict.get(node.req.rid) is node:  # it may have gone before, or have lent its id to a later one
            del req_dict[node.req.rid]


HOOKS = (
    (f"{_SESSION}.Session.create_req", _before_create, "before"),
    (f"{_SESSION}.SessionReqNode.clear", _clear, "around"),
)
