"""A tool's ``parameters`` as serving passes them on: type names made JSON Schema's, and checked.

Follows SGLang's ``function_call.utils.normalize_json_schema_types`` without importing it.
"""

from __future__ import annotations

from typing import Any

from sglang_harli.service.rows.error import RowError

_STANDARD = {"array", "boolean", "integer", "null", "number", "object", "string"}
_ALIASES = {
    **dict.fromkeys(("str", "text", "varchar", "char", "enum", "uuid", "date", "datetime", "time"), "string"),
    **dict.fromkeys(("timestamp", "binary", "blob", "bytea", "bytes", "varbinary"), "string"),
    "bool": "boolean",
    **dict.fromkeys(("bigint", "smallint", "tinyint"), "integer"),
    **dict.fromkeys(("double", "decimal", "real", "numeric"), "number"),
    **dict.fromkeys(("arr", "tuple", "set"), "array"),
    "map": "object",
}
# A prefix is the whole name or is followed by one of _BEHIND: int32, list[str], not internal.
_PREFIXES = (
    (("int", "uint", "long", "short", "unsigned"), "integer"),
    (("num", "float"), "number"),
    (("list",), "array"),
    (("dict",), "object"),
)
_BEHIND = frozenset("0123456789[<( \t")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = (
    *("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)


def checked(schema: Any, where: str) -> Any:
    """The schema as the template gets it; RowError where serving answers 400."""
    from jsonschema import Draft202012Validator, SchemaError  # half a second, for rows with tools alone

    try:
        schema = _normalised(schema)
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise RowError(f"{where}: not a JSON schema: {error.message}", "tools") from error
    except RecursionError as error:
        raise RowError(f"{where}: too deeply nested", "tools") from error
    except OverflowError as error:  # of a pattern: re.compile
        raise RowError(f"{where}: not a JSON schema: {error}", "tools") from error
    return schema


def _normalised(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_normalised(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)  # keeps the order of the keys, which the template may show
    if isinstance(schema.get("type"), str):
        made["type"] = _type(schema["type"])
    elif isinstance(schema.get("type"), list):
        types = [_type(item) for item in schema["type"]]
        made["type"] = [item for at, item in enumerate(types) if item not in types[:at]]
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            made[key] = {name: _normalised(value) for name, value in schema[key].items()}
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            made[key] = [_normalised(value) for value in schema[key]]
    for key in _SCHEMAS:
        if key in schema:
            made[key] = _normalised(schema[key])
    return made


def _type(name: Any) -> Any:
    if not isinstance(name, str) or name in _STANDARD:
        return name
    base = name.split("(", 1)[0].strip().lower()
    if base in _STANDARD:
        return base
    if base in _ALIASES:
        return _ALIASES[base]
    for prefixes, target in _PREFIXES:
        for prefix in prefixes:
            if base == prefix or (base.startswith(prefix) and base[len(prefix)] in _BEHIND):
                return target
    return name
