"""On which device a server would run: what torch, the driver and the environment say of it."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_harli.config import show_size
from sglang_harli.platforms.cpu import engine
from sglang_harli.tools.doctor.checks.installation import origin_of
from sglang_harli.tools.doctor.finding import Finding, ok, problem, together, warning
from sglang_harli.tools.doctor.probe import ProbeError, probe

KERNELS = ("sglang-kernel", "sgl-kernel", "sgl_kernel")  # distributions of the real sgl_kernel
VISIBLE = "CUDA_VISIBLE_DEVICES"
BACKING_ENV = "HARLI_POOL_BACKING"
DRIVER = Path("/proc/driver/nvidia/version")
NODES = Path("/dev")
LAUNCH = "start with `python -m sglang_harli.launch_server`, which brings the kernels"


def device(_asked: Any) -> Finding:
    if origin_of("torch") is None:
        return problem(
            "torch is not installed", "install SGLang with what it needs: pip install 'sglang-harli'"
        )
    try:
        answer = probe("torch")
    except ProbeError as error:
        return problem(
            error.message, "pip install the torch that SGLang asks for, for this driver or for a CPU"
        )
    return judge(answer, os.environ, driver=driver_version(), nodes=gpu_nodes(), kernels=kernels())


def judge(
    answer: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    driver: str | None,
    nodes: int,
    kernels: str | None,
) -> Finding:
    """The device of a server here.

    Args:
        answer: of the probe of torch.
        driver: version of the kernel's NVIDIA driver, None: there is none.
        nodes: how many GPUs this machine shows as files.
        kernels: distribution of the installed ``sgl_kernel`` with its version, None: there is none.
    """
    switched = engine.is_on(environ)
    gpus = answer["devices"]
    torch = f"torch {answer['torch']} (CUDA {answer['cuda'] or 'none'})"
    if gpus and not switched:
        return together([_cuda(answer, torch, driver), _remapping(answer, environ), _kernels(kernels)])
    setting = f"{engine.CPU_ENGINE_ENV}={environ.get(engine.CPU_ENGINE_ENV) or '(not set)'}"
    real = f"the installed {kernels} needs a GPU" if kernels else "no other is installed"
    found = f"SGLang's CPU engine ({setting}): {torch}, the launcher's stand-in for sgl_kernel ({real})"
    if gpus:
        return warning(
            f"{found}, although torch sees {gpus[0]['name']}",
            f"unset {engine.CPU_ENGINE_ENV} to serve on the GPU",
        )
    if nodes and not switched:
        return problem(
            f"{found}, although {nodes} NVIDIA GPU(s) are there", _why_unseen(answer, environ, driver)
        )
    return ok(found)


def _why_unseen(answer: Mapping[str, Any], environ: Mapping[str, str], driver: str | None) -> str:
    if answer["cuda"] is None:
        return "this torch is built for CPUs: pip install the CUDA build that SGLang asks for"
    if environ.get(VISIBLE) is not None:
        return f"{VISIBLE}={environ[VISIBLE]} hides them: unset it, or name one"
    if driver is None:
        return "install the NVIDIA driver on the host, and give it to the container (`docker run --gpus all`)"
    return f"the driver {driver} does not serve CUDA {answer['cuda']}: install a newer driver, or look at nvidia-smi"


def _cuda(answer: Mapping[str, Any], torch: str, driver: str | None) -> Finding:
    gpus = answer["devices"]
    first = gpus[0]
    capability = ".".join(map(str, first["capability"]))
    others = f" and {len(gpus) - 1} more, which are not used" if len(gpus) > 1 else ""
    return ok(
        f"{first['name']} ({show_size(first['bytes'])}, compute capability {capability}){others}: {torch}, "
        f"driver {driver or 'of unknown version'}"
    )


def _remapping(answer: Mapping[str, Any], environ: Mapping[str, str]) -> Finding:
    if environ.get(BACKING_ENV) == "static":
        return ok(f"{BACKING_ENV}=static: memory of the pool is lent in place")
    if answer.get("no_remapping"):
        return warning(
            f"memory cannot be remapped ({answer['no_remapping']})", f"export {BACKING_ENV}=static"
        )
    return ok("its memory can be remapped (CUDA virtual memory management)")


def _kernels(kernels: str | None) -> Finding:
    if kernels is None:
        return problem(
            "sgl_kernel is not installed", "pip install sglang-kernel, in the version that SGLang asks for"
        )
    return ok(f"kernels of {kernels}")


# ------------------------------------------------------------------ what is there
def kernels() -> str | None:
    for name in KERNELS:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def driver_version(path: Path = DRIVER) -> str | None:
    try:
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", path.read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def gpu_nodes(folder: Path = NODES) -> int:
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in folder.glob("nvidia[0-9]*"))
