"""The HTTP process's side of the inner endpoint, one request after the other."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import msgspec
import zmq

from sglang_harli import run_paths
from sglang_harli.protocol import public
from sglang_harli.protocol.calls import files, messages


class InnerCalls:
    """A DEALER at the inner endpoint of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 30_000)
        self._socket.connect(run_paths.verbs_endpoint(str(run_dir)))

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def send(self, verb: str, args: Any, *frames: bytes) -> str:
        """The id of a request that is on its way."""
        request = public.Request(
            v=public.VERSION, id=uuid.uuid4().hex, verb=verb, args=msgspec.to_builtins(args)
        )
        self._socket.send_multipart([public.encode(request), *frames])
        return request.id

    def answer(self, request: str, kind: Any = Any) -> Any:
        """The result; a refusal is raised as its own type."""
        while True:
            found = messages.reply(self._socket.recv(), request)
            if found is not None:
                return messages.result(found, kind)

    def call(self, verb: str, args: Any, *frames: bytes, kind: Any = Any) -> Any:
        return self.answer(self.send(verb, args, *frames), kind)

    def stream(self, data: bytes, *, part: bool = False, piece: int = 1 << 20) -> str:
        """The stream of these bytes."""
        name = uuid.uuid4().hex
        for offset in range(0, len(data), piece):
            chunk = data[offset : offset + piece]
            answer = self.call(
                "file_append", files.FileAppendArgs(stream=name, offset=offset, part=part), chunk
            )
            assert answer["offset"] == offset + len(chunk)
        return name

    def complete_args(self, data: bytes, **more: Any) -> files.FileCompleteArgs:
        more = {"filename": "rows.jsonl", "purpose": files.FINE_TUNE} | more
        return files.FileCompleteArgs(
            stream=self.stream(data), size=len(data), sha256=hashlib.sha256(data).hexdigest(), **more
        )

    def file(self, data: bytes, **more: Any) -> files.FileObject:
        return self.call("file_complete", self.complete_args(data, **more), kind=files.FileObject)

    def upload(self, size: int, **more: Any) -> files.UploadObject:
        more = {"filename": "rows.jsonl", "purpose": files.FINE_TUNE} | more
        return self.call("upload_create", files.UploadCreateArgs(bytes=size, **more), kind=files.UploadObject)

    def part_args(self, upload: str, data: bytes, **more: Any) -> files.PartCompleteArgs:
        return files.PartCompleteArgs(
            stream=self.stream(data, part=True), upload=upload, size=len(data), **more
        )

    def part(self, upload: str, data: bytes, **more: Any) -> files.UploadPart:
        return self.call("part_complete", self.part_args(upload, data, **more), kind=files.UploadPart)

    def listed(self, **args: Any) -> files.FileList:
        return self.call("file_list", files.FileListArgs(**args), kind=files.FileList)

    def content(self, file: str) -> bytes:
        return Path(self.call("file_path", files.FileArgs(file=file))["path"]).read_bytes()
