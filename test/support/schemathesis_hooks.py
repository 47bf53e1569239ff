"""Ids of objects that are there, for schemathesis: random ids name none, and no route would be
asked for more than its 404.

``SCHEMATHESIS_HOOKS=support.schemathesis_hooks`` has it loaded; OBJECTS holds the objects as JSON:
for each parameter of a path its ids, under ``parts`` those of each upload, and under ``job`` the
``model`` and ``training_file`` of one.
"""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

import schemathesis

OBJECTS = "HARLI_TEST_OBJECTS"
_objects: dict[str, Any] = json.loads(os.environ.get(OBJECTS, "{}"))


def _number(value: Any) -> int:
    """The same for the same value, in every run."""
    return zlib.crc32(repr(value).encode("utf-8", "replace"))


@schemathesis.hook
def map_case(_context: Any, case: Any) -> Any:
    """Half of all generated cases name objects that are there; requests in a row have their own."""
    body = case.body if isinstance(case.body, dict) else None  # no body is an object with an address
    number = _number((case.path_parameters, body))
    if number % 2 or case.meta.phase.name == "stateful":
        return case
    for name in case.path_parameters or {}:
        known = _objects.get(name)
        if known:
            case.path_parameters[name] = known[number // 2 % len(known)]
    if isinstance(case.body, dict):
        if "training_file" in case.body:
            case.body |= _objects["job"]
        if "part_ids" in case.body:
            case.body["part_ids"] = _objects["parts"].get(case.path_parameters["upload_id"], [])
    return case
