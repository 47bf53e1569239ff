"""Requests that the end-to-end tests send."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PROMPTS = [
    "the quick brown fox",
    "alpha beta",
    "1 2 3",
    "why",
    "one step at a time",
    "serving and training",
    "a",
    "the capital of",
    "numbers are 4 5 6",
    "good morning",
    "lorem ipsum",
    "hello world",
    "zero one two three four five six seven",
    "where do",
    "question answer",
    "x y z",
    "a longer prompt that has some more words in it than the others have",
    "end",
    "token by token",
    "last of twenty",
]


def post(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """(HTTP status, parsed answer)."""
    request = urllib.request.Request(
        url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    return _open(request)


def get(url: str, path: str) -> tuple[int, Any]:
    return _open(urllib.request.Request(url + path))


def delete(url: str, path: str) -> tuple[int, Any]:
    return _open(urllib.request.Request(url + path, method="DELETE"))


def _open(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            status, raw = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, raw = error.code, error.read()
    try:
        return status, json.loads(raw)
    except ValueError:
        return status, raw.decode(errors="replace")


def generate(url: str, text: str, *, tokens: int = 24, lora: str | None = None, **sampling: Any) -> list[int]:
    """Token ids of one answer, greedy unless told otherwise."""
    body: dict[str, Any] = {
        "text": text,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **sampling},
    }
    if lora:
        body["lora_path"] = lora
    status, answer = post(url, "/generate", body)
    assert status == 200, answer
    return answer["output_ids"]


def generate_all(url: str, *, workers: int = 8) -> list[list[int]]:
    """Greedy answers to all prompts, ``workers`` at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda text: generate(url, text), PROMPTS))


def chat(url: str, model: str, content: str, tokens: int = 32) -> tuple[int, Any]:
    return post(
        url,
        "/v1/chat/completions",
        {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
        },
    )
