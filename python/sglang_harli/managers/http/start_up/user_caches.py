"""Places for libraries' caches when the user has no name, or no home that can be written.

As in a container under a bare uid (``docker run --user 12345``): torch asks for the user's name;
flashinfer, Triton and others make folders in the home at import, and end in tracebacks.  The
launcher calls this before the first such import.  Standard library only.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import MutableMapping

from sglang_harli import run_paths
from sglang_harli.errors import ConfigError

# variable -> (where the cache lies in the home if it is not set, its folder in ours)
CACHES = {
    "FLASHINFER_WORKSPACE_BASE": (".cache/flashinfer", ""),
    "TRITON_HOME": (".triton", ""),
    "TVM_FFI_CACHE_DIR": (".cache/tvm-ffi", "tvm-ffi"),
    "TORCH_EXTENSIONS_DIR": (".cache/torch_extensions", "torch_extensions"),
    "SGLANG_CACHE_DIR": (".cache/sglang", "sglang"),
    "SGLANG_DG_CACHE_DIR": (".cache/deep_gemm", "deep_gemm"),
    "OUTLINES_CACHE_DIR": (".cache/outlines", "outlines"),
    "CUDA_CACHE_PATH": (".nv/ComputeCache", "nv"),
    "HF_HOME": (".cache/huggingface", "huggingface"),
}
_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where getpass.getuser looks before the passwd file


def provide(environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Set what is missing, for this process and its children; returns what and why, one line each.
    What the operator has set stays.  ConfigError names the variables: no place can be written."""
    said = []
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        entry = None
    if entry is None and not any(environ.get(name) for name in _NAMES):
        environ["USER"] = f"uid{os.getuid()}"
        said.append(f"uid {os.getuid()} has no entry in the passwd file: USER={environ['USER']}")
    home = environ.get("HOME") or (entry.pw_dir if entry is not None else "")
    lost = [name for name in CACHES if not environ.get(name) and not _kept(name, home)]
    if not lost:
        return said
    cache = _cache_folder(lost)
    if not home:
        environ["HOME"] = home = cache
        said.append(f"there is no HOME: HOME={home}")
    for name in lost:
        environ[name] = os.path.join(cache, CACHES[name][1]).rstrip("/")
    said.append(
        f"caches cannot be written in HOME={home}: they lie in {cache} ({', '.join(lost)}: set them or HOME)"
    )
    return said


def _kept(name: str, home: str) -> bool:
    """Whether the cache stays in the home: writable there, or one of downloads to be read."""
    if not home:
        return False
    path = os.path.abspath(os.path.join(home, CACHES[name][0]))
    if name == "HF_HOME" and os.path.isdir(path):
        return True
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def _cache_folder(lost: list[str]) -> str:
    folder = run_paths.private_tmp()
    try:
        for made in (folder, folder / "cache"):
            os.close(run_paths.open_private(made, make=True))
    except OSError as error:
        raise ConfigError(
            f"HOME cannot be written, and there is no other place for caches ({error}): set HOME to a folder that can "
            f"be written, or {', '.join(lost)}"
        ) from error
    return str(folder / "cache")
