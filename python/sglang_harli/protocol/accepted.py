"""Values as the types that messages declare; a refusal names the field, the value and the range.
Clients and the service check with the same functions, so both refuse in the same words."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Meta, Struct, inspect

from sglang_harli.errors import SHOWN, ConfigError, shown

S = TypeVar("S", bound=Struct)


def most(limit: int) -> Meta:
    """An upper bound for new values; jobs that were stored with a larger one stay readable."""
    return Meta(extra={"most": limit})


def words(text: str) -> Meta:
    """What is accepted, where the type's own bounds do not say it well."""
    return Meta(extra={"words": text})


def value(name: str, given: Any, kind: Any, *, lax: bool = False) -> Any:
    """``given`` as the type ``kind`` of the field ``name``; ConfigError: what is accepted.
    ``lax``: numbers may come as texts, as on a command line."""
    try:
        found = msgspec.convert(given, kind, strict=not lax)
    except (msgspec.ValidationError, TypeError, OverflowError, UnicodeEncodeError) as error:
        raise refused(name, given, _whole(given, kind) + wording(kind)) from error
    limit = _extra(inspect.type_info(kind)).get("most")
    if limit is not None and found is not None and not found <= limit:
        raise refused(name, given, wording(kind))
    if isinstance(found, str) and not is_text(found):
        raise refused(name, given, "a text in UTF-8")
    return found


def refused(name: str, given: Any, accepted: str) -> ConfigError:
    return ConfigError(f"{name}={shown(given)} is not accepted: give {accepted}", param=name)


def is_text(given: str) -> bool:
    """False if it cannot be UTF-8: half of a surrogate pair, bytes of a command line."""
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


def check(message: Struct) -> None:
    """A message's fields before it is sent; ConfigError: the first the service would refuse."""
    for field in msgspec.structs.fields(message):
        value(field.encode_name, getattr(message, field.name), field.type)


def convert(values: Mapping[str, Any], kind: type[S]) -> S:
    """The arguments of a request as ``kind``; ConfigError: unknown, missing or bad (``param``)."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"unknown argument {shown(name)}; accepted: {', '.join(fields)}", param=name[:SHOWN]
            )
    for name, field in fields.items():
        if field.required and name not in values:
            raise ConfigError(f"{name} is missing: give {wording(field.type)}", param=name)
    return kind(
        **{fields[name].name: value(name, given, fields[name].type) for name, given in values.items()}
    )


# ------------------------------------------------------------------ in words
def wording(kind: Any) -> str:
    """What a declared type accepts: ``1 to 10,000``, ``0 or more, below 1``, ``true or false``."""
    return _words(inspect.type_info(kind))


def _whole(given: Any, kind: Any) -> str:
    """Says so where a number is given that is not whole, and it should be."""
    if (
        isinstance(given, bool)
        or not isinstance(given, float | str)
        or "IntType" not in repr(inspect.type_info(kind))
    ):
        return ""
    with contextlib.suppress(ValueError):
        number = float(given)
        if math.isfinite(number) and number % 1:
            return "a whole number, "
    return ""


def _extra(kind: inspect.Type) -> dict[str, Any]:
    if isinstance(kind, inspect.UnionType):
        return next((found for part in kind.types if (found := _extra(part))), {})
    return (kind.extra or {}) if isinstance(kind, inspect.Metadata) else {}


def _words(kind: inspect.Type) -> str:
    extra = _extra(kind)
    if isinstance(kind, inspect.UnionType):
        parts = [_words(part) for part in kind.types if not isinstance(part, inspect.NoneType)]
        return " or ".join([*parts, *["none"] * (len(parts) < len(kind.types))])
    if "words" in extra:
        return str(extra["words"])
    if isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return _bounds(kind, extra.get("most", kind.le))
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.StrType):
        return _text(kind)
    return "an object" if isinstance(kind, inspect.DictType) else "a list"


def _bounds(kind: inspect.IntType | inspect.FloatType, largest: float | None) -> str:
    if kind.ge is not None and largest is not None:
        return f"{kind.ge:,} to {largest:,}"
    parts = []
    if kind.ge is not None:
        parts.append(f"{kind.ge:,} or more")
    if kind.gt is not None:
        parts.append(f"above {kind.gt:,}")
    if largest is not None:
        parts.append(f"at most {largest:,}")
    if kind.lt is not None:
        parts.append(f"below {kind.lt:,}")
    return ", ".join(parts) or ("an integer" if isinstance(kind, inspect.IntType) else "a number")


def _text(kind: inspect.StrType) -> str:
    if kind.max_length is not None:
        return f"a text of {kind.min_length or 0} to {kind.max_length:,} characters"
    return "a text" if kind.pattern is None else f"a text of the form {kind.pattern}"
