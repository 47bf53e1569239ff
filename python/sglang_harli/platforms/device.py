"""Which device a server runs on: CUDA where there is one, else SGLang's CPU engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_harli.errors import ConfigError
from sglang_harli.platforms.cpu import engine


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """The device of a server, and the reason, for one line of the log."""

    device: str
    reason: str

    @property
    def cpu_engine(self) -> bool:
        return self.device == "cpu"

    def __str__(self) -> str:
        name = "SGLang's CPU engine" if self.cpu_engine else f"device {self.device}"
        return f"harli serves on {name}: {self.reason}"


def choose_device(
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    cuda_device: Callable[[], str | None] | None = None,
) -> DeviceChoice:
    """The device for a server with these arguments; call it before importing sglang.

    Args:
        argv: ``--device`` (also inside ``--config FILE``) is respected.
        environ: ``SGLANG_USE_CPU_ENGINE=1`` is respected.
        cuda_device: names the CUDA device, None where there is none (default: asks torch).

    ConfigError: ``--device cuda`` where there is none, or devices that contradict each other.
    """
    cuda_device = cuda_device or find_cuda_device
    asked = _asked_device(argv)
    device = None if asked is None else asked.split(":")[0]
    if device == "cpu":
        return DeviceChoice("cpu", "--device cpu was given")
    if engine.is_on(environ):
        if device is not None:
            raise ConfigError(f"--device {asked} contradicts {engine.CPU_ENGINE_ENV}=1: drop one of them")
        return DeviceChoice("cpu", f"{engine.CPU_ENGINE_ENV}=1 is set")
    if device not in (None, "cuda"):
        return DeviceChoice(device, f"--device {asked} was given")
    found = cuda_device()
    if found is not None:
        return DeviceChoice("cuda", f"torch sees {found}")
    if device == "cuda":
        raise ConfigError(f"--device {asked}: torch sees no CUDA device; drop the option to serve on the CPU")
    return DeviceChoice("cpu", "torch sees no CUDA device")


def find_cuda_device() -> str | None:
    """The first CUDA device's name, or None; SGLang asks torch the same when it is imported."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _asked_device(argv: Sequence[str]) -> str | None:
    """``--device`` from the command line, else from the YAML file behind ``--config``."""
    asked = config = None
    for position, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name in ("--device", "--config"):
            value = value or (argv[position + 1] if position + 1 < len(argv) else "")
            asked, config = (value, config) if name == "--device" else (asked, value)
    if asked is None and config and Path(config).is_file():
        import yaml

        try:
            values = yaml.safe_load(Path(config).read_text())
        except yaml.YAMLError:
            return None  # SGLang's parser reports it, with the line
        if isinstance(values, dict) and values.get("device"):
            asked = str(values["device"])
    return asked or None
