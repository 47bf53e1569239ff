"""Reads a form from a request while its file goes on to the finetune service, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from sglang_harli.errors import ConfigError, NotReadyError
from sglang_harli.managers.http.openai.body import announced, pieces, too_large
from sglang_harli.managers.http.openai.forms.byte_rate import ByteRate
from sglang_harli.managers.http.openai.forms.form_parser import Field, FileBegins, FileBytes, FormParser
from sglang_harli.managers.http.openai.forms.stream_sender import StreamSender
from sglang_harli.managers.http.service_calls import ServiceCalls
from sglang_harli.protocol.public import BUSY

OVERHEAD = 64 << 10  # bytes of a form beside its file
FEED_BYTES = 64 << 10
MAX_FORMS = 32  # read at once: each holds a few pieces of its file


@dataclass(frozen=True, kw_only=True)
class FormKind:
    """What a form may hold.

    Attributes:
        file: the name of its file's part.
        fields: name -> check of its text, as soon as it is there; raises HarliError.
        parse: of all fields, once the form is whole: ``Form.values``; raises HarliError.
        limit, flag: most bytes of the file, and the option that says so.
        part: the file is a part of an upload.
    """

    file: str
    fields: Mapping[str, Callable[[str], object]]
    parse: Callable[[dict[str, str]], Any]
    limit: int
    flag: str
    part: bool = False


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form that was read whole; the service has its file as the stream ``sender.stream``."""

    values: Any
    filename: str
    sender: StreamSender


class FormReader:
    """Reads forms, at most MAX_FORMS at once."""

    def __init__(self, calls: ServiceCalls) -> None:
        self._calls = calls
        self._rate = ByteRate()
        self._reading = 0

    async def read(self, request: Request, kind: FormKind) -> Form:
        """The form of a request.  Whatever ends it early, the service forgets the stream.

        Raises:
            Refusal: 413, the file is too large; 400, it is no such form; 408, it does not go on.
            HarliError: a field or the file is not accepted, or the service refuses the data.
            starlette.requests.ClientDisconnect: the connection is gone.
        """
        length = announced(request)
        if length is not None and length > kind.limit + OVERHEAD:
            raise too_large(kind.limit, kind.file, kind.flag)
        parser = FormParser(request.headers.get("content-type", ""), kind.file, kind.fields)
        if self._reading >= MAX_FORMS:
            raise NotReadyError(f"{MAX_FORMS} files are being sent: try again in a moment", code=BUSY)
        expected = None if length is None else min(length, kind.limit)
        sender = StreamSender(self._calls, expected=expected, part=kind.part)
        self._reading += 1
        try:
            return await _read(request, kind, parser, sender, self._rate)
        except BaseException:
            await sender.abort()
            raise
        finally:
            self._reading -= 1


async def _read(
    request: Request, kind: FormKind, parser: FormParser, sender: StreamSender, rate: ByteRate
) -> Form:
    fields: dict[str, str] = {}
    filename = ""
    besides = 0  # bytes that are not the file's
    async for piece in pieces(request):
        for start in range(0, len(piece), FEED_BYTES):
            fed = piece[start : start + FEED_BYTES]
            await rate.take(len(fed))
            besides += len(fed)
            for event in parser.feed(fed):
                if isinstance(event, FileBytes):
                    besides -= len(event.data)
                    if sender.size + len(event.data) > kind.limit:
                        raise too_large(kind.limit, kind.file, kind.flag)
                    await sender.write(event.data)
                elif isinstance(event, FileBegins):
                    filename = event.filename
                else:
                    _take(event, kind, fields)
            if besides > OVERHEAD:
                raise too_large(OVERHEAD, "what the form holds beside its file")
    parser.finish()
    if not sender.size:
        raise ConfigError(f"{kind.file} is empty: send a file with data", param=kind.file, code="empty_file")
    values = kind.parse(fields)
    await sender.finish()
    return Form(values=values, filename=filename, sender=sender)


def _take(event: Field, kind: FormKind, fields: dict[str, str]) -> None:
    kind.fields[event.name](event.value)
    fields[event.name] = event.value
