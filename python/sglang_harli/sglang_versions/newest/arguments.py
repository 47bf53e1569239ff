"""SGLang's arguments on 0.5.23: a msgspec Struct that keeps what the operator gave.

It is resolved once, by ``resolve_once``, after it is made; decisions lie beside the fields
(``declare_resolution``), and what is in force is read through ``resolving_view``.  Leans on SGLang:
``server_args.ServerArgs`` and ``arg_groups`` (``overrides``, ``resolution_hooks``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.server_args import ServerArgs

_SOURCE = "sglang_harli"  # of our decisions, in SGLang's record of them


def in_force(server_args: Any) -> Any:
    """The arguments as resolved so far, to read from; what was given lies in the record."""
    return resolving_view(server_args)


def resolve(server_args: Any) -> None:
    """Resolve them now, where that has yet to happen."""
    server_args.resolve_once()


def model_config(server_args: Any) -> Any:
    """SGLang's ``ModelConfig`` of the served model."""
    return model_config_of(server_args)


def forget_model_config(server_args: Any) -> None:
    """It was built for another dtype."""
    server_args._model_config = None


def set_default(server_args: Any, name: str, value: Any) -> None:
    if getattr(server_args, "_input_frozen", False):
        declare_resolution(server_args, _SOURCE, **{name: value})
    else:
        setattr(server_args, name, value)


def with_fields(name: str, module: str, fields: Sequence[tuple[str, Any]]) -> Any:
    """``ServerArgs`` with more fields, None by default, and the steps that a subclass fills:

    ``before_resolution()`` once it is made, ``before_memory()`` before SGLang sizes its pools, with
    the device and the model known, ``after_resolution()``, and ``unpickled(parent)`` in another
    process.  ``ready()`` comes between the first two.
    """
    fielded: Any = msgspec.defstruct(
        f"_{name}Fields",
        [(field, annotation, None) for field, annotation in fields],
        bases=(ServerArgs,),
        module=module,
        kw_only=True,
        dict=True,
    )
    return type(fielded)(name, (_Steps, fielded), {"__module__": module}, kw_only=True, dict=True)


class _Steps:
    """The order of the steps; before ``ServerArgs`` in a class's bases."""

    def __post_init__(self) -> None:
        if _rebuilding:
            return
        self.before_resolution()  # type: ignore[attr-defined]
        super().__post_init__()  # type: ignore[misc]
        self.ready()  # type: ignore[attr-defined]

    def resolve_once(self) -> None:
        done = getattr(self, "_resolution_finished", False)
        super().resolve_once()  # type: ignore[misc]
        if done:
            return
        try:
            self.after_resolution()  # type: ignore[attr-defined]
        except BaseException:  # else a second call would let pass what this one refused
            self._resolution_finished, self._resolution_failed = False, True
            raise

    def __reduce__(self) -> Any:
        fields = msgspec.structs.asdict(self)  # type: ignore[arg-type]
        return _rebuild, (type(self), fields, dict(self.__dict__), os.getpid())


_rebuilding: list[type] = []  # unpickled records go through the constructor, not through the steps


def _rebuild(cls: Any, fields: dict[str, Any], bookkeeping: dict[str, Any], parent: int) -> Any:
    _rebuilding.append(cls)
    try:
        record = cls(**fields)
    finally:
        _rebuilding.pop()
    record.__dict__.update(bookkeeping)
    record.unpickled(parent)
    return record


@register_resolution_hook("handle_gpu_memory_settings")
def _before_memory(server_args: Any, previous: Any) -> None:
    if isinstance(server_args, _Steps):
        server_args.before_memory()  # type: ignore[attr-defined]
    previous(server_args)
