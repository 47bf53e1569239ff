"""Requests for adapters while the served base changes: asked before the adapter is looked up, and
again behind it."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_harli.managers.http.publisher import refuse_another_base


def resolve(path: Any, *, before: dict[str, str], meanwhile: dict[str, str]) -> int:
    """How often the adapter was looked up; ``meanwhile``: what is of another base by the end of
    that."""
    publisher = SimpleNamespace(
        others=dict(before), asking_for=lambda _names: contextlib.nullcontext(), pair=None
    )
    manager = SimpleNamespace(harli_publisher=publisher)
    looked_up = 0

    async def original(_manager: Any, _obj: Any) -> None:
        nonlocal looked_up
        looked_up += 1
        manager.harli_publisher.others.update(meanwhile)

    asyncio.run(refuse_another_base(original, manager, SimpleNamespace(lora_path=path)))
    return looked_up


@pytest.mark.parametrize("path", ["a", ["a"], [None, "a"]])
def test_it_is_refused_before_it_is_looked_up_and_when_the_weights_change_meanwhile(path: Any) -> None:
    other = {"a": "its base is another"}
    with pytest.raises(ValueError, match="'a' is not served here: its base is another"):
        resolve(path, before=other, meanwhile={})
    with pytest.raises(ValueError, match="its base is another"):
        resolve(path, before={}, meanwhile=other)


@pytest.mark.parametrize("path", [None, "b", [None, "b"]])
def test_others_are_looked_up(path: Any) -> None:
    assert resolve(path, before={}, meanwhile={"a": "its base is another"}) == 1
