"""After every test the books of its pools agree."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.pool_parts import POOLS


@pytest.fixture(autouse=True)
def clean_books() -> Iterator[None]:
    POOLS.clear()
    yield
    for pool in list(POOLS):
        pool.check()
