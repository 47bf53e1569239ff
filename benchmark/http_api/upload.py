"""A file sent over HTTP as the openai client sends it, in pieces, niced.

``python -m http_api.upload URL MIB`` prints its seconds and SHA-256 as JSON, and deletes it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx

NICE = 10
MIB = 1 << 20
LINE = b'{"prompt": "how far?", "completion": "7 km"}\n'
BOUNDARY = "harli-bench"


def pieces(mib: int) -> Iterator[bytes]:
    """Rows, a MiB at a time."""
    piece = LINE * (MIB // len(LINE))
    piece += b" " * (MIB - len(piece) - 1) + b"\n"
    for _ in range(mib):
        yield piece


def form(mib: int, digest: Any) -> Iterator[bytes]:
    yield (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="large.jsonl"\r\n\r\n'
    ).encode()
    for piece in pieces(mib):
        digest.update(piece)
        yield piece
    yield f"\r\n--{BOUNDARY}--\r\n".encode()


def main(url: str, mib: int) -> None:
    digest = hashlib.sha256()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    with httpx.Client(base_url=f"{url}/v1", timeout=600) as client:
        began = time.perf_counter()
        answer = client.post("/files", content=form(mib, digest), headers=headers).raise_for_status().json()
        seconds = time.perf_counter() - began
        client.delete(f"/files/{answer['id']}").raise_for_status()
    print(json.dumps({"seconds": seconds, "bytes": answer["bytes"], "sha256": digest.hexdigest()}))


if __name__ == "__main__":
    os.nice(NICE)
    main(sys.argv[1], int(sys.argv[2]))
