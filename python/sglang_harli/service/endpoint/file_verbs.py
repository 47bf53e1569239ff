"""The verbs of the inner endpoint about files and uploads (``protocol/calls/files.py``)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sglang_harli.errors import ProtocolError
from sglang_harli.protocol import public
from sglang_harli.protocol.calls import files
from sglang_harli.service.files.all_files import Files


class FileVerbs:
    """Files and uploads by verb; raises HarliError: the refusal."""

    def __init__(self, all_files: Files) -> None:
        self._streams, self._store = all_files.streams, all_files.store
        store, uploads = all_files.store, all_files.uploads
        self._verbs: dict[str, tuple[type[Any], Callable[[Any], Awaitable[Any]]]] = {
            "file_complete": (files.FileCompleteArgs, store.complete),
            "file_abort": (files.StreamArgs, self._abort),
            "file_get": (files.FileArgs, self._get),
            "file_list": (files.FileListArgs, self._list),
            "file_delete": (files.FileArgs, lambda args: store.delete(args.file)),
            "file_path": (files.FileArgs, lambda args: store.where(args.file)),
            "part_complete": (files.PartCompleteArgs, uploads.add_part),
            "upload_create": (files.UploadCreateArgs, uploads.create),
            "upload_complete": (files.UploadCompleteArgs, uploads.complete),
            "upload_cancel": (files.UploadCancelArgs, lambda args: uploads.cancel(args.upload)),
        }

    async def do(self, request: public.Request, frames: Sequence[bytes]) -> Any:
        """The result of one request, whose verb is one of ``files.VERBS``."""
        if request.verb == "file_append":
            append = public.convert_args(request.args, files.FileAppendArgs)
            if len(frames) != 1:
                raise ProtocolError(f"file_append takes one data frame, {len(frames)} came")
            return files.StreamAnswer(offset=await self._streams.append(append, frames[0]))
        if frames:
            raise ProtocolError(f"{request.verb} takes no data, {len(frames)} frames came behind the header")
        kind, verb = self._verbs[request.verb]
        return await verb(public.convert_args(request.args, kind))

    async def _abort(self, args: files.StreamArgs) -> dict[str, Any]:
        self._streams.drop(args.stream)
        return {}

    async def _get(self, args: files.FileArgs) -> files.FileObject:
        return self._store.get(args.file)

    async def _list(self, args: files.FileListArgs) -> files.FileList:
        return self._store.list(args)
