"""Another process that takes half of a core, in turns.

One that takes a core for good stops two threads that wait for each other: SGLang's decode on two cores then takes
4 s a token (*measured*), so that a predictor's next 400 steps would take half an hour.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

TAKEN_S, LEFT_S = 0.02, 0.02
SPIN = f"""
import time
while True:
    ends_s = time.perf_counter() + {TAKEN_S}
    while time.perf_counter() < ends_s:
        pass
    time.sleep({LEFT_S})
"""


@contextlib.contextmanager
def half_a_core_taken() -> Iterator[None]:
    """For the length of a block."""
    spinner = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        yield
    finally:
        spinner.kill()
        spinner.wait()
