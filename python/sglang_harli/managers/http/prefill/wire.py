"""What a decode server and a prefill server of this project say to each other over HTTP: paths and
headers.  Standard library only."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any

from sglang_harli.errors import ConfigError

LOOK = "/harli/prefill"  # GET: {"start": str, "adapters": [names], "refused": [requests]}
REFUSED = "/harli/prefill/refused"  # POST: {"requests": [of requests that the decode server refused]}
ADAPTER = "/harli/prefill/adapters/"  # PUT, DELETE, with the name behind it
CONFIG_HEADER = "x-harli-adapter-config"  # PEFT's adapter_config.json, base64
SHA256_HEADER = "x-harli-sha256"  # of the body, hexadecimal
MAX_CONFIG_BYTES = 16 << 10
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")
_SHA256 = re.compile(r"^[0-9a-f]{64}\Z")


def check_name(name: str) -> str:
    """The name of an adapter, which is a folder's too; ConfigError: not one."""
    if not _NAME.match(name):
        accepted = "at most 200 letters, digits, '.', '_' and '-', the first a letter or a digit"
        raise ConfigError(f"an adapter's name {name[:200]!r} is not accepted: give {accepted}", param="name")
    return name


def pack_config(config: dict[str, Any]) -> str:
    return base64.b64encode(json.dumps(config).encode()).decode()


def unpack_config(text: str | None) -> dict[str, Any]:
    """The config in ``CONFIG_HEADER``; ConfigError: none, too long, or no JSON object."""
    try:
        raw = base64.b64decode(text or "", validate=True)
        config = json.loads(raw) if len(raw) <= MAX_CONFIG_BYTES else None
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{CONFIG_HEADER} is no JSON in base64: {error}", param=CONFIG_HEADER) from error
    if not isinstance(config, dict):
        text = f"a JSON object of at most {MAX_CONFIG_BYTES} bytes"
        raise ConfigError(f"{CONFIG_HEADER} is not accepted: give {text}", param=CONFIG_HEADER)
    return config


def check_sha256(text: str | None) -> str:
    if text is None or not _SHA256.match(text):
        raise ConfigError(f"{SHA256_HEADER} is missing, or not 64 hexadecimal digits", param=SHA256_HEADER)
    return text
