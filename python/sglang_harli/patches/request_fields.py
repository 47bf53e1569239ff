"""Runtime half of ``patches/06-request-fields``: a bad field is an error of its request.

Leans on: ``srt.managers.io_struct`` (``GenerateReqInput._determine_batch_size`` and
``_normalize_rid``, ``EmbeddingReqInput.normalize_batch_and_arguments``, ``PositionalEmbeds``,
``SessionParams``), ``srt.managers.tokenizer_manager.TokenizerManager`` (``_validate_one_request``,
``score_request``) and ``srt.sampling.sampling_params.SamplingParams`` (its fields, and ``verify``).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import msgspec
import regex

from sglang_harli.sglang_versions import current

# Whether a request is made by SGLang's scoring, which says itself where the items of a prompt end.
_scoring: ContextVar[bool] = ContextVar("_scoring", default=False)
_IO = "sglang.srt.managers.io_struct"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
MOST_BIAS = 1e6  # beyond any logit; far beyond, probabilities are no numbers any more
MOST_ANSWERS = 4096  # of one prompt: SGLang makes a request of each before the first is sent
# Once for all prompts, or a list with an entry for each.
_EACH = (
    "lora_path",
    "rid",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_sampling_mask",
    "return_hidden_states",
    "custom_logit_processor",
    "extra_key",
    "cache_salt",
    "sampling_logprobs_mode",
    "watermark",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "decode_tp_size",
)


def _after_batch_size(result: None, request: Any) -> None:
    _check_own_fields(request)
    params = request.sampling_params
    if isinstance(params, list):
        request.sampling_params = [checked_params(one) for one in params]
    elif params is not None:
        request.sampling_params = checked_params(params)
    _check_session(request.session_params)
    match_lists(request, request.batch_size, single=request.is_single)
    ids = request.token_ids_logprob  # a flat list is for all prompts
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        request.token_ids_logprob = _matched("token_ids_logprob", ids, request.batch_size, request.is_single)


def _check_own_fields(request: Any) -> None:
    """Refuses fields that SGLang fills in itself, and text that is none."""
    from sglang.srt.managers.io_struct import PositionalEmbeds

    for field in ("text", "lora_path", "rid"):
        value = getattr(request, field, None)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str):
                _check_unicode(field, one)
    if request.lora_id is not None:
        raise ValueError("lora_id is the server's own: name an adapter by lora_path")
    overrides = request.positional_embed_overrides
    for one in overrides if isinstance(overrides, list) else [overrides]:
        if one is not None and not isinstance(one, PositionalEmbeds):
            raise ValueError("positional_embed_overrides cannot be given by HTTP")
    for field in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        if getattr(request, field, None) is not None and not _scoring.get():
            raise ValueError(f"{field} is the server's own: send items to /v1/score")
    request.http_worker_ipc = None  # which process the answer goes to; stamped when the request is sent


def _check_unicode(field: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} has half a surrogate pair at character {error.start}: it is no text"
        ) from None


async def _score_request(original: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    token = _scoring.set(True)
    try:
        return await original(*args, **kwargs)
    finally:
        _scoring.reset(token)


def _check_session(params: dict[str, Any] | None) -> None:
    from sglang.srt.managers.io_struct import SessionParams

    kinds = {field.name: field.type for field in msgspec.structs.fields(SessionParams)}
    for name, value in (params or {}).items():
        if name not in kinds:
            raise ValueError(f"session_params has {name}; accepted: {', '.join(kinds)}")
        try:
            msgspec.convert(value, kinds[name])
        except msgspec.ValidationError as error:
            raise ValueError(f"session_params.{name} is {value!r:.100}: {str(error).lower()}") from None


def _before_embedding(request: Any) -> None:
    _check_own_fields(request)
    prompts = request.text if request.text is not None else request.input_ids
    nested = request.text is None and prompts and not isinstance(prompts[0], list)
    single = not isinstance(prompts, list) or bool(nested)
    match_lists(request, 1 if single else len(prompts), single=single)


def match_lists(request: Any, prompts: int, *, single: bool) -> None:
    """Check a request's lists against its number of prompts; a single prompt's become their entry.
    ValueError names the field and both lengths, or an adapter without a name."""
    for field in _EACH:
        value = getattr(request, field, None)
        if isinstance(value, list):
            setattr(request, field, _matched(field, value, prompts, single))
    names = request.lora_path
    if isinstance(names, list) and "" in names:
        raise ValueError(
            f"lora_path[{names.index('')}] is empty: name an adapter, or give null for the base model"
        )


def _matched(field: str, values: list[Any], prompts: int, single: bool) -> Any:
    if len(values) != prompts:
        raise ValueError(
            f"{field} has {len(values)} {'entry' if len(values) == 1 else 'entries'} and the request has {prompts} "
            f"{'prompt' if prompts == 1 else 'prompts'}: give one entry for each prompt, or one value for all"
        )
    if single and field == "lora_path" and values[0] == "":
        raise ValueError("lora_path[0] is empty: name an adapter, or give null for the base model")
    return values[0] if single else values


# ------------------------------------------------------------------ one prompt
def _before_validate(manager: Any, request: Any, input_ids: list[int] | None) -> None:
    tokens = manager.model_config.vocab_size
    if input_ids is not None and manager.mm_processor is None:
        _check_tokens(input_ids, tokens)
    most = getattr(request, "top_logprobs_num", None) or 0
    if not 0 <= most <= tokens:
        raise ValueError(f"top_logprobs_num is {most}; accepted: 0 to {tokens}, the tokens of the vocabulary")
    start = getattr(request, "logprob_start_len", None)
    if start is not None and start < -1:
        raise ValueError(f"logprob_start_len is {start}; accepted: -1 (none of the prompt) or a place in it")
    labels = getattr(request, "custom_labels", None)
    args = current.arguments.in_force(manager.server_args)
    if labels and args.enable_metrics:
        allowed = args.tokenizer_metrics_allowed_custom_labels or []
        if unknown := sorted(set(labels) - set(allowed)):
            raise ValueError(
                f"custom_labels has {', '.join(unknown)}; accepted: {', '.join(allowed) or 'none'}"
            )


def _check_tokens(input_ids: list[int], tokens: int) -> None:
    if not input_ids:
        raise ValueError("the prompt has no tokens")
    for wrong in (min(input_ids), max(input_ids)):
        if not 0 <= wrong < tokens:
            raise ValueError(
                f"input_ids has {wrong}; accepted: 0 to {tokens - 1}, the tokens of the vocabulary"
            )


# ------------------------------------------------------------------ sampling parameters
def checked_params(params: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters as their declared types; ValueError names one and what is accepted."""
    fields = _fields()
    checked = {}
    for name, value in params.items():
        field = fields.get(name)
        if field is None:
            raise ValueError(f"{name} is not a sampling parameter; those are {', '.join(sorted(fields))}")
        checked[name] = _checked(name, value, field.type)
    n = checked.get("n", 1)
    if n is None or not 1 <= n <= MOST_ANSWERS:
        raise ValueError(f"n is {n}; accepted: whole numbers from 1 to {MOST_ANSWERS}")
    return checked


@functools.cache
def _fields() -> dict[str, msgspec.structs.FieldInfo]:
    """What a client may give."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    own = ("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized")
    return {field.name: field for field in msgspec.structs.fields(SamplingParams) if field.name not in own}


def _checked(name: str, value: Any, kind: Any) -> Any:
    if value is None or name == "custom_params":  # these are for the operator's own code
        return value
    if kind is bool and isinstance(value, int | float):
        return bool(value)
    if name == "stop_token_ids" and isinstance(value, list | set | tuple):
        value = [token for token in value if token is not None]  # as SGLang does
    if name == "logit_bias" and isinstance(value, dict):  # of the offline engine the tokens may be numbers
        value = {str(token) if type(token) is int else token: bias for token, bias in value.items()}
    try:
        value = _typed(value, kind)
        if name == "stop_regex":
            for pattern in [value] if isinstance(value, str) else value:
                re.compile(pattern)  # SGLang's measure of its length
                regex.compile(pattern)  # the search
    except (msgspec.ValidationError, re.error, regex.error) as error:
        raise ValueError(f"{name} is {value!r:.100}: {str(error).lower()}") from None
    return value


def _after_verify(result: None, params: Any, vocab_size: int) -> None:
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    params.top_k = min(params.top_k, TOP_K_ALL)  # all of the vocabulary; the scheduler counts in 32 bits
    seed = params.sampling_seed
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"sampling_seed is {seed}; accepted: whole numbers of 64 bits")
    for token, bias in (params.logit_bias or {}).items():
        if not abs(bias) <= MOST_BIAS:
            raise ValueError(
                f"logit_bias of token {token} is {bias:g}; accepted: -{MOST_BIAS:g} to {MOST_BIAS:g}"
            )
    if params.min_new_tokens > 0 and params.stop_token_ids:
        for token in params.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"stop_token_ids has {token}; accepted with min_new_tokens: 0 to {vocab_size - 1}"
                )


def _typed(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        if isinstance(value, bool | float) and math.isfinite(value) and value == int(value):
            return msgspec.convert(int(value), kind)  # 2.0 and true are the numbers that they were for SGLang
        raise


# ------------------------------------------------------------------ ids
def _normalize_rid(original: Callable[..., None], request: Any, num: int) -> None:
    """One id a prompt: SGLang also makes one for each of n answers, which none of them uses."""
    original(request, request.batch_size)


HOOKS = (
    (f"{_IO}.GenerateReqInput._determine_batch_size", _after_batch_size, "after"),
    (f"{_IO}.GenerateReqInput._normalize_rid", _normalize_rid, "around"),
    (f"{_MANAGER}._validate_one_request", _before_validate, "before"),
    (f"{_MANAGER}.score_request", _score_request, "around"),
    ("sglang.srt.sampling.sampling_params.SamplingParams.verify", _after_verify, "after"),
    (f"{_IO}.EmbeddingReqInput.normalize_batch_and_arguments", _before_embedding, "before"),
)
