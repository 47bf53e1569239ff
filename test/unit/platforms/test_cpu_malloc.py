"""What training frees stays with the process: the kernel is not asked for the same memory again and
again."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc")

ALLOCATED = 64 * 2**20
PAGES = ALLOCATED // 4096
TIMES = 8

# Prints whether it was done, and the page faults of writing and freeing the same size TIMES times.
# Before that, glibc puts the ends that alignment cuts off aside, up to seven of them, so that a
# freed place is a little too small for the next time.
PROGRAM = f"""
import resource
import torch
from sglang_harli.platforms.cpu.malloc import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

done = keep_freed_memory()
for _ in range(10):
    torch.ones({ALLOCATED}, dtype=torch.uint8)
before = faults()
for _ in range({TIMES}):
    torch.ones({ALLOCATED}, dtype=torch.uint8)
print(done, faults() - before)
"""


def run_program(**environment: str) -> tuple[bool, int]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=env | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_memory_that_is_freed_is_used_again_without_page_faults():
    kept, faults = run_program()
    assert kept
    assert faults < PAGES / 10


def test_the_operators_setting_of_malloc_stays():
    kept, faults = run_program(MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
    assert faults >= TIMES * PAGES
