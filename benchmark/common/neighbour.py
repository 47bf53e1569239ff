"""Another process that computes beside what is measured."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

# Half of a core, in turns: two threads that wait for each other stop where a core is taken for
# good. SGLang's decode on two cores then takes 4 s a token (*measured*), so that a predictor's next
# 400 steps would take half an hour.
PROGRAM = """
import time
while True:
    ends_s = time.perf_counter() + 0.02
    while time.perf_counter() < ends_s:
        pass
    time.sleep(0.02)
"""


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """It takes half of a core for the length of a block."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM])
    try:
        yield
    finally:
        process.kill()
        process.wait()
