"""The real ``CudaDriver``, both CUDA backings and the probe, through cuda-python's own bindings, on
a libcuda that is compiled here (test/support/cuda/libcuda.c)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.driver")
from support.cuda import libcuda_cases

SOURCE = Path(libcuda_cases.__file__).with_name("libcuda.c")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc)")
    library = tmp_path_factory.mktemp("libcuda") / "libcuda.so.1"
    flags = ["-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, "-o", str(library), str(SOURCE)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", libcuda_cases.__name__, str(library)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", libcuda_cases.CASES)
def test_with_the_real_bindings(name: str, results: dict[str, str | None]):
    assert results[name] is None, results[name]
