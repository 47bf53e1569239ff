"""HTTP process: which model a request's ``model`` names: an adapter, the served base, or nothing.

SGLang reads an adapter only from ``base:adapter`` and serves every other name from the base,
silently.  Here loaded adapters come first, then the served base's names; other names in the form of
our adapters are a 404; the rest does what SGLang does (clients rely on ``"model": "default"``).

Leans on SGLang's OpenAIServingBase (_parse_model_parameter, which each of its handlers asks;
create_error_response, and handle_request, which turns an HTTPException into
create_error_response(message=its detail)),
OpenAIServingResponses.create_responses, AnthropicServing.handle_messages,
TokenizerManager.lora_registry and .lora_ref_cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from sglang_harli.names import checkpoint_of, looks_like_adapter

NOT_FOUND = 404
BAD_REQUEST = 400


class MissingModelText(str):
    """The message of a missing adapter; its type selects the form of ``create_error_response``."""


class MissingModelError(ValueError):
    """A missing adapter that was found out too late for a handler's parsing; SGLang's handlers make
    a response of its text."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self._text = MissingModelText(f"The model '{name}' does not exist: {why}")

    def __str__(self) -> str:
        return self._text


def missing_model_text(tokenizer_manager: Any, name: str) -> MissingModelText:
    text = f"The model '{name}' does not exist: GET /v1/models lists those that exist"
    if other := _other_base(tokenizer_manager, name):
        text = f"The model '{name}' is an adapter that is not served here: {other}"
    return MissingModelText(text)


def missing_model_error(tokenizer_manager: Any, name: str) -> JSONResponse:
    """A 404 in OpenAI's form, as SGLang answers ``GET /v1/models/{id}``."""
    return _openai_error(NOT_FOUND, missing_model_text(tokenizer_manager, name), "model_not_found")


def _openai_error(status: int, message: str, code: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": "model", "code": code}
    return JSONResponse(status_code=status, content={"error": error})


# ------------------------------------------------------------------ the rule
def is_adapter(tokenizer_manager: Any, name: str) -> bool:
    """Whether the adapter ``name`` answers: loaded, or evicted and loaded again on demand; a
    checkpoint's, perhaps."""
    if _other_base(tokenizer_manager, name):
        return False
    if checkpoint_of(name) is not None and _publisher(tokenizer_manager) is not None:
        return True  # the service knows whether there is one, and is asked before it is used
    registered = tokenizer_manager.lora_registry.get_all_adapters()
    return name in registered or name in tokenizer_manager.lora_ref_cache


def _other_base(tokenizer_manager: Any, name: str) -> str:
    """The base that an adapter belongs to, where that is not the served one; else ""."""
    publisher = _publisher(tokenizer_manager)
    return "" if publisher is None else publisher.others.get(name, "")


def _publisher(tokenizer_manager: Any) -> Any:
    return getattr(tokenizer_manager, "harli_publisher", None)


def _plain_prefill(tokenizer_manager: Any) -> str | None:
    """A prefill server of this decode server that reads adapters from ``base:adapter`` alone."""
    pair = getattr(_publisher(tokenizer_manager), "pair", None)
    return pair.plain if pair is not None else None


def _is_base(tokenizer_manager: Any, name: str) -> bool:
    return name in (tokenizer_manager.served_model_name, tokenizer_manager.model_path)


def find_adapter(tokenizer_manager: Any, model: str) -> tuple[str | None, bool]:
    """The adapter that ``model`` names (None: the base answers), and whether it is missing."""
    if is_adapter(tokenizer_manager, model):
        return model, False
    if _is_base(tokenizer_manager, model):
        return None, False
    base = f"{tokenizer_manager.served_model_name}:"  # it may hold a colon: s3://bucket/model
    behind = model[len(base) :] if model.startswith(base) else model.partition(":")[2]
    adapter = behind.strip() or None  # SGLang's base:adapter
    name = adapter or model
    if looks_like_adapter(name) and not is_adapter(tokenizer_manager, name):
        return name, True
    return adapter, False


# ------------------------------------------------------------------ in SGLang's handlers
def parse_model_parameter(
    original: Callable[..., tuple[str, str | None]], serving: Any, model: str
) -> tuple[str, str | None]:
    """Around ``OpenAIServingBase._parse_model_parameter``: (base, adapter's name or None);
    HTTPException 404: an adapter of ours that does not exist."""
    adapter, missing = find_adapter(serving.tokenizer_manager, model)
    if missing:
        raise HTTPException(NOT_FOUND, detail=missing_model_text(serving.tokenizer_manager, adapter or model))
    if adapter == model and (plain := _plain_prefill(serving.tokenizer_manager)):
        base = serving.tokenizer_manager.served_model_name
        raise HTTPException(
            BAD_REQUEST,
            detail=f"prefill server {plain} is plain SGLang, which would compute the prompt of '{model}' with the base: "
            f"ask for '{base}:{model}'",
        )
    if adapter is None and _is_base(serving.tokenizer_manager, model):
        return model, None
    return original(serving, model)[0], adapter


def create_error_response(
    original: Callable[..., Any], serving: Any, message: str, *args: Any, **kwargs: Any
) -> Any:
    """Around ``OpenAIServingBase.create_error_response``: OpenAI's form for a missing adapter."""
    if isinstance(message, MissingModelText):
        return _openai_error(NOT_FOUND, message, "model_not_found")
    return original(serving, message, *args, **kwargs)


async def create_responses(
    original: Callable[..., Awaitable[Any]], serving: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around ``OpenAIServingResponses.create_responses``, which knows no adapters."""
    adapter, missing = find_adapter(serving.tokenizer_manager, request.model)
    if missing:
        return missing_model_error(serving.tokenizer_manager, adapter or request.model)
    if adapter is not None:
        text = f"/v1/responses does not serve adapters: ask for '{adapter}' at /v1/chat/completions or /v1/completions"
        return _openai_error(BAD_REQUEST, text, "unsupported_model")
    return await original(serving, request, *args, **kwargs)


async def handle_messages(
    original: Callable[..., Awaitable[Any]], serving: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around ``AnthropicServing.handle_messages``, which would make the 404 an internal error."""
    adapter, missing = find_adapter(serving.openai_serving_chat.tokenizer_manager, request.model)
    if missing:
        text = missing_model_text(serving.openai_serving_chat.tokenizer_manager, adapter or request.model)
        return serving._error_response(status_code=NOT_FOUND, error_type="not_found_error", message=text)
    return await original(serving, request, *args, **kwargs)
