"""SGLang's arguments on 0.5.16: a dataclass that its constructor resolves, in place.

Leans on SGLang: ``server_args.ServerArgs`` (``__post_init__``, ``_handle_gpu_memory_settings``,
``get_model_config``).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from sglang.srt.server_args import ServerArgs

_SENDER = "_sender_pid"  # in a pickle: of the process that made it


def in_force(server_args: Any) -> Any:
    """The arguments as resolved so far, to read from."""
    return server_args


def resolve(server_args: Any) -> None:
    """Resolve them now, where that has yet to happen: here the constructor did."""


def model_config(server_args: Any) -> Any:
    """SGLang's ``ModelConfig`` of the served model."""
    return server_args.get_model_config()


def forget_model_config(server_args: Any) -> None:
    """It was built for another dtype."""
    del server_args.model_config


def set_default(server_args: Any, name: str, value: Any) -> None:
    setattr(server_args, name, value)


def with_fields(name: str, module: str, fields: Sequence[tuple[str, Any]]) -> Any:
    """``ServerArgs`` with more fields, None by default, and the steps that a subclass fills:

    ``before_resolution()`` once it is made, ``before_memory()`` before SGLang sizes its pools, with
    the device and the model known, ``after_resolution()``, and ``unpickled(parent)`` in another
    process.  ``ready()`` comes last.
    """
    fielded: Any = dataclasses.make_dataclass(
        f"_{name}Fields",
        [(field, annotation, dataclasses.field(default=None)) for field, annotation in fields],
        namespace={"__module__": module},
    )
    return dataclasses.dataclass(type(name, (_Steps, fielded, ServerArgs), {"__module__": module}))


class _Steps:
    """The order of the steps; before ``ServerArgs`` in a class's bases."""

    def __post_init__(self) -> None:
        self.before_resolution()  # type: ignore[attr-defined]
        super().__post_init__()  # type: ignore[misc]
        self.after_resolution()  # type: ignore[attr-defined]
        self.ready()  # type: ignore[attr-defined]

    def _handle_gpu_memory_settings(self, gpu_mem: float | None) -> None:
        self.before_memory()  # type: ignore[attr-defined]
        super()._handle_gpu_memory_settings(gpu_mem)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, _SENDER: os.getpid()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parent = state.pop(_SENDER)
        self.__dict__.update(state)
        self.unpickled(parent)  # type: ignore[attr-defined]
