"""Our Triton kernels compiled without a device, just as a launch would compile them.

What a call launches is recorded with its arguments; each launch is then specialised, lowered and
assembled for a compute capability. ptxas says what was spilled.

Leans on Triton 3.6 to 3.8: ``JITFunction._pack_args``, ``jit.create_function_from_signature`` and
the knob ``nvidia.dump_ptxas_log``.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from sglang_harli.peft_trainer.kernels.launch import Grid, through

CAPABILITIES = (80, 89, 90, 100)


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for."""

    kernel: Any
    args: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rsplit('.', 1)[-1]}.{self.kernel.fn.__name__}"


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a kernel: bytes spilled, registers of a thread; ``shared``: bytes of a
    program's shared memory; ``ptx``: its assembly."""

    spilled: int
    registers: int
    shared: int
    ptx: str


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches are noted and not run."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: Grid, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        launches.append(Launch(kernel, args, named))

    with through(note):
        yield launches


def compile_launch(launch: Launch, capability: int, cache: Path) -> Compiled:
    """The variant that this launch would have compiled; ``cache``: an empty folder."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.named)
    packed = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, *packed[1:])
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.cache.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = str(cache)
        done = triton.compile(source, target=target, options=packed[0].__dict__)
    text = log.getvalue()
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    registers = re.findall(r"Used (\d+) registers", text)
    assert spills and registers, f"ptxas said nothing of {launch.name}: {text!r}"
    return Compiled(sum(map(int, spills)), int(registers[0]), done.metadata.shared, done.asm["ptx"])
