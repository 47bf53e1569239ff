"""The service's end of the inner endpoint, for tests of what the HTTP process does when the service
is slow, busy, or goes: a ROUTER that a function answers for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from sglang_harli.errors import HarliError, NotReadyError, ProtocolError
from sglang_harli.protocol import public
from sglang_harli.protocol.public import Reply, Request

Answer = Callable[[Request, Sequence[bytes]], Any]  # None: no answer


class VerbsPeer:
    """Listens from ``start`` to ``stop``, also several times; ``answer`` runs in its thread and
    raises HarliError for a refusal."""

    def __init__(self, endpoint: str, answer: Answer) -> None:
        self._endpoint, self._answer = endpoint, answer
        self.asked: list[Request] = []
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> VerbsPeer:
        self._ending.clear()
        bound = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(bound,))
        self._thread.start()
        assert bound.wait(30)
        return self

    def stop(self) -> None:
        if self._thread is not None:
            self._ending.set()
            self._thread.join()
            self._thread = None

    def _serve(self, bound: threading.Event) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(self._endpoint)
        bound.set()
        try:
            while not self._ending.is_set():
                if not socket.poll(20):
                    continue
                route, head, *data = socket.recv_multipart()
                request = public.decode(head, Request)
                self.asked.append(request)
                if (reply := self._reply(request, data)) is not None:
                    socket.send_multipart([route, public.encode(reply)])
        finally:
            socket.close()
            context.term()

    def _reply(self, request: Request, data: Sequence[bytes]) -> Reply | None:
        try:
            found = self._answer(request, data)
        except HarliError as error:
            body = public.ErrorBody(
                code=error.code, message=error.message, param=error.param, details=error.details
            )
            return Reply(id=request.id, ok=False, error=body)
        return None if found is None else Reply(id=request.id, ok=True, result=msgspec.to_builtins(found))


class Streams:
    """Streams as the service takes them: in order, what comes out of order is refused.  ``unwell``
    is asked before each piece and raises what it is refused with."""

    def __init__(self, unwell: Callable[[int], None] = lambda _offset: None) -> None:
        self.data: dict[str, bytearray] = {}
        self.aborted: list[str] = []
        self.whole: list[bytes] = []  # of those that became files or parts
        self._unwell = unwell

    def __call__(self, request: Request, frames: Sequence[bytes]) -> Any:
        stream = request.args.get("stream", "")
        if request.verb == "file_append":
            self._unwell(request.args["offset"])
            if request.args["offset"] and stream not in self.data:
                raise NotReadyError("no such stream")
            found = self.data.setdefault(stream, bytearray())
            if request.args["offset"] != len(found):
                raise ProtocolError("another piece is due", param="offset")
            found += frames[0]
            return {"offset": len(found)}
        if request.verb == "file_abort":
            self.aborted.append(stream)
            self.data.pop(stream, None)
            return {}
        assert request.verb in ("file_complete", "part_complete"), request.verb
        found = self.data.pop(stream)
        assert len(found) == request.args["size"]
        self.whole.append(bytes(found))
        if request.verb == "part_complete":
            return {"id": "part_1", "created_at": 1, "upload_id": request.args["upload"]}
        return {
            "id": "file-1",
            "bytes": len(found),
            "created_at": 1,
            "filename": request.args["filename"],
            "purpose": request.args["purpose"],
        }
