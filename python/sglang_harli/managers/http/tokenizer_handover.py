"""HTTP process: writes the live tokenizer and chat template to a file for the finetune service.

SGLang repairs tokenizers after loading and has several sources of templates, so only what is live
here gives the ids that serving computes.  The file is written before the server serves; its content
stays in memory, so that a lost file can be written again without the tokenizer.

Leans on SGLang's TokenizerManager (tokenizer, server_args, model_config), TemplateManager
(chat_template_name, jinja_template_content_format, reasoning_config) and
``chat_encoding.resolve_chat_encoding_spec``; mirrors which keywords ``OpenAIServingChat`` gives
every template.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sglang_harli.protocol import tokenizer_state
from sglang_harli.protocol.tokenizer_state import ChatTemplate, TokenizerState
from sglang_harli.service.rows.served_tokenizer import describe
from sglang_harli.service.tokenizer.own_tokenizer import own_template
from sglang_harli.sglang_versions.current import arguments

logger = logging.getLogger(__name__)


class TokenizerHandover:
    """The server's tokenizer for the service; ``fingerprint`` goes with HttpHello."""

    def __init__(self, state: TokenizerState, run_dir: str | Path) -> None:
        self.fingerprint = state.fingerprint
        self._content = tokenizer_state.encode(state)
        self._run_dir = run_dir

    def write(self) -> bool:
        """Blocking.  A failure (False) is logged: the service says that it lacks the file."""
        try:
            tokenizer_state.write(self._run_dir, self._content)
        except OSError as error:
            logger.error(
                "harli: the tokenizer cannot be handed to the finetune service (%s): no job starts until it can",
                error,
            )
            return False
        return True


def hand_over(tokenizer_manager: Any, template_manager: Any, run_dir: str | Path) -> TokenizerHandover | None:
    """Write the live tokenizer's state; blocking, before the server serves.  None: no tokenizer."""
    if tokenizer_manager.tokenizer is None:
        return None
    try:
        state = state_of(tokenizer_manager, template_manager)
    except Exception as error:  # boundary: a tokenizer without a description makes no rows; serving goes on
        reason = f"this server's tokenizer cannot be used for training ({type(error).__name__}: {error})"
        logger.exception("harli: %s", reason)
        state = TokenizerState(chat=ChatTemplate(), refusal=reason)
    handover = TokenizerHandover(state, run_dir)
    handover.write()
    return handover


def state_of(tokenizer_manager: Any, template_manager: Any) -> TokenizerState:
    """What turns texts and chats into ids in this process."""
    tokenizer, model = tokenizer_manager.tokenizer, tokenizer_manager.model_config
    stops = set(getattr(model, "hf_eos_token_id", None) or ())
    stops |= set(getattr(tokenizer, "additional_stop_token_ids", None) or ())
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is not None:
        stops.add(eos)
    return describe(tokenizer, _chat_template(tokenizer_manager, template_manager), sorted(stops))


def _chat_template(tokenizer_manager: Any, template_manager: Any) -> ChatTemplate:
    from sglang.srt.entrypoints.openai.chat_encoding import resolve_chat_encoding_spec

    tokenizer, server_args = tokenizer_manager.tokenizer, arguments.in_force(tokenizer_manager.server_args)
    kwargs = _template_kwargs(server_args, template_manager)
    if template_manager.chat_template_name is not None:
        return ChatTemplate(kwargs=kwargs, refusal=own_template(template_manager.chat_template_name))
    spec = resolve_chat_encoding_spec(
        hf_config=tokenizer_manager.model_config.hf_config,
        tokenizer=tokenizer,
        tool_call_parser=server_args.tool_call_parser,
    )
    if spec is not None:
        return ChatTemplate(kwargs=kwargs, refusal=own_template(spec))
    source = getattr(tokenizer, "chat_template", None)
    return ChatTemplate(
        source=source if isinstance(source, str) else None,
        content_format=template_manager.jinja_template_content_format or "string",
        kwargs=kwargs,
    )


def _template_kwargs(server_args: Any, template_manager: Any) -> dict[str, Any]:
    """What a template gets of a request that names no keywords of its own."""
    kwargs = dict(server_args.default_chat_template_kwargs or {})
    reasoning = template_manager.reasoning_config
    if (
        reasoning is not None
        and reasoning.effort_kwarg is not None
        and kwargs.get("reasoning_effort") == "low"
    ):
        kwargs.setdefault(reasoning.effort_kwarg, True)
    return kwargs
