"""Our Triton kernels without a device: on CPU tensors, in Triton's interpreter, in this process.

TRITON_INTERPRET would have to be set before Triton is imported, and would hold for every kernel of
the process, SGLang's too. Here launches of ours alone are interpreted, and Triton is as before when
the context ends. Programs run one after the other, in rising or in a shuffled order. bfloat16 is
rounded to the nearest and multiplied in fp32, as a device does; Triton's own interpreter cuts it,
and multiplies it in fp16.

Leans on Triton 3.6 to 3.8: ``runtime.interpreter`` (InterpretedFunction.rewrite, _patch_lang,
_implicit_cvt, interpreter_builder) and JITFunction's ``fn``, ``params`` and ``__call__``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from sglang_harli.peft_trainer.kernels.launch import Grid, through


@contextlib.contextmanager
def interpreted(seed: int | None = None) -> Iterator[list[str]]:
    """Kernels launched meanwhile run on the CPU; gives their names, as they come. ``seed``: of the
    order of programs, None: rising."""
    names: list[str] = []

    def run(kernel: Any, grid: Grid, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        names.append(kernel.fn.__name__)
        programs = list(itertools.product(*(range(n) for n in grid)))
        if seed is not None:
            random.Random(seed).shuffle(programs)
        _interpret(kernel, grid, programs, args, named)

    with through(run):
        yield names


@functools.cache
def _rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    return interpreter.InterpretedFunction(function).rewrite()


def _call(self: JITFunction[Any], *args: Any, **named: Any) -> Any:
    """One kernel function calls another, Triton's own such as ``tl.sum`` too."""
    return _rewritten(self.fn)(*args, **named)


def _convert(values: np.ndarray, own: tl.dtype, wanted: tl.dtype, _: Any) -> np.ndarray:
    """fp32 as the bits of bfloat16, or the other way round."""
    assert {own, wanted} == {tl.float32, tl.bfloat16}
    if own == tl.bfloat16:
        return values.astype(np.uint32) << 16
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def _dot(self: Any, a: Any, b: Any, added: Any, *_: Any) -> Any:
    x, y = (
        (_convert(part.data, tl.bfloat16, tl.float32, None).view(np.float32))
        if part.dtype.scalar == tl.bfloat16
        else part.data.astype(np.float32)
        for part in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(x, y) + added.data, added.dtype.scalar)


def _interpret(
    kernel: JITFunction[Any],
    grid: Grid,
    programs: list[tuple[int, ...]],
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    options = {"num_warps", "num_stages"}
    bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in named.items() if k not in options})
    constant = {param.name for param in kernel.params if param.is_constexpr}
    function = _rewritten(kernel.fn)
    builder = interpreter.interpreter_builder
    # The interpreter replaces what is in tl and puts it back; tl.core is for Triton's functions.
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        with (
            mock.patch.object(JITFunction, "__call__", _call),
            mock.patch.object(interpreter, "_convert_float", _convert),
            mock.patch.object(type(builder), "create_dot", _dot),
            np.errstate(all="ignore"),
        ):
            values = {
                name: value if name in constant else interpreter._implicit_cvt(value)
                for name, value in bound.arguments.items()
            }
            builder.set_grid_dim(*grid, *([1] * (3 - len(grid))))
            for program in programs:
                builder.set_grid_idx(*program, *([0] * (3 - len(grid))))
                function(**values)
    finally:
        scope.restore()
