"""Caches of a user without a home that can be written, or without a name, get a place of their
own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_harli import run_paths
from sglang_harli.errors import ConfigError
from sglang_harli.managers.http.start_up.user_caches import CACHES, provide
from support.other_user import UID, needs_root, open_folder, run_python


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_paths, "private_tmp", lambda: tmp_path / "private")


def test_a_home_that_can_be_written_keeps_its_caches(tmp_path: Path) -> None:
    for home in (tmp_path, tmp_path / "not" / "made" / "yet"):
        environ = {"HOME": str(home), "USER": "someone"}
        assert provide(environ) == []
        assert environ == {"HOME": str(home), "USER": "someone"}
    assert not (tmp_path / "private").exists()


def test_a_home_that_cannot_be_written_has_them_in_a_private_folder(tmp_path: Path) -> None:
    environ = {"HOME": "/dev/null", "USER": "someone", "TRITON_HOME": "/mine"}
    [said] = provide(environ)
    cache = tmp_path / "private" / "cache"
    assert cache.stat().st_mode & 0o777 == cache.parent.stat().st_mode & 0o777 == 0o700
    assert environ["FLASHINFER_WORKSPACE_BASE"] == str(cache)
    assert environ["TVM_FFI_CACHE_DIR"] == f"{cache}/tvm-ffi"
    assert (environ["HOME"], environ["TRITON_HOME"]) == ("/dev/null", "/mine")  # what was said stays
    assert "HOME=/dev/null" in said and "FLASHINFER_WORKSPACE_BASE" in said and "TRITON_HOME" not in said
    assert provide(environ) == []


def test_only_what_cannot_be_written_is_moved(tmp_path: Path) -> None:
    """As where Docker has made ``.cache`` for a volume, as root."""
    (tmp_path / ".cache").write_text("")
    environ = {"HOME": str(tmp_path)}
    provide(environ)
    assert {name for name in CACHES if name in environ} == set(CACHES) - {"TRITON_HOME", "CUDA_CACHE_PATH"}


def test_downloads_that_are_there_are_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(tmp_path / ".cache")))
    environ = {"HOME": str(tmp_path)}
    provide(environ)
    assert "HF_HOME" not in environ and "FLASHINFER_WORKSPACE_BASE" in environ


def test_where_there_is_no_place_the_variables_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_paths, "private_tmp", lambda: Path("/dev/null/private"))
    with pytest.raises(
        ConfigError, match=r"set HOME to a folder that can be written, or FLASHINFER_WORKSPACE"
    ):
        provide({"HOME": "/dev/null"})


LIBRARIES = """
import os
from sglang_harli.managers.http.start_up import user_caches
print(*user_caches.provide(), sep="\\n")
import getpass
print(getpass.getuser(), os.path.expanduser("~"))
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
print(default_cache_dir())
from huggingface_hub import constants
os.makedirs(constants.HF_HOME)
"""


@needs_root
@pytest.mark.parametrize("home", [{"HOME": "/"}, {}])
def test_libraries_find_a_name_and_a_place(home: dict[str, str]) -> None:
    with open_folder() as folder:
        done = run_python(LIBRARIES, TMPDIR=str(folder), **home)
        assert done.returncode == 0, done.stderr
        cache = f"{folder}/harli-{UID}/cache"
        assert Path(cache, "huggingface").is_dir()
    assert f"uid {UID} has no entry in the passwd file: USER=uid{UID}" in done.stdout
    assert f"uid{UID} {home.get('HOME', cache)}" in done.stdout
    assert f"torchinductor_uid{UID}" in done.stdout
