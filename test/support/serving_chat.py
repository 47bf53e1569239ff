"""SGLang's own way from a chat request to prompt ids, without a server: its request model, its
validation, its template manager, its tokenizer and ``OpenAIServingChat``."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import (
    OpenAIServingChat,
    normalize_assistant_tool_call_arguments,
)
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from transformers import AutoConfig

from sglang_harli.sglang_versions.current import arguments
from support.plain_arguments import plain_arguments, read_arguments


class RefusedError(Exception):
    """A request that serving answers 400 (or 500) to."""


class Serving:
    """Args:
    folder: of tokenizer and config.
    server_args: fields of ServerArgs, such as chat_template.

    Attributes:
        manager: what stands for SGLang's TokenizerManager: its tokenizer, arguments and model
            config.
        templates: SGLang's TemplateManager.
    """

    def __init__(self, folder: Path, **server_args: Any) -> None:
        args = plain_arguments(**{"model_path": str(folder), "tokenizer_path": str(folder)} | server_args)
        given = arguments.in_force(args)
        self.tokenizer = get_tokenizer(
            given.tokenizer_path, trust_remote_code=given.trust_remote_code or False
        )
        config = AutoConfig.from_pretrained(folder)
        eos = config.eos_token_id
        model = SimpleNamespace(
            hf_config=config,
            is_multimodal=False,
            get_default_sampling_params=dict,
            hf_eos_token_id={eos} if isinstance(eos, int) else set(eos or ()),
            context_len=1024,
        )
        self.manager = SimpleNamespace(
            server_args=args,
            tokenizer=self.tokenizer,
            processor=None,
            model_config=model,
            served_model_name="base",
            request_logger=SimpleNamespace(log_requests=False),
        )
        read_arguments(self.manager)
        self.templates = TemplateManager()
        self.templates.load_chat_template(self.manager, given.chat_template, given.model_path)
        self.chat = OpenAIServingChat(self.manager, self.templates)

    def prompt(self, messages: list[Any], tools: Any = None, **fields: Any) -> list[int]:
        """The ids that a request's prompt gets.

        Raises:
            RefusedError: serving refuses the request.
        """
        request = self.read(messages, tools, **fields)
        try:
            return list(self.chat._process_messages(request, False).prompt_ids)
        except Exception as error:
            raise RefusedError(f"{type(error).__name__}: {error}") from error

    def read(self, messages: list[Any], tools: Any = None, **fields: Any) -> ChatCompletionRequest:
        """The request as serving reads and checks it, before the template.

        Raises:
            RefusedError: it refuses it.
        """
        body = copy.deepcopy({"model": "base", "messages": messages, **fields})
        if tools is not None:
            body["tools"] = copy.deepcopy(tools)
        try:
            request = ChatCompletionRequest(**body)
            for message in request.messages:
                normalize_assistant_tool_call_arguments(message.model_dump())
        except (pydantic.ValidationError, ValueError) as error:
            raise RefusedError(str(error)) from error
        wrong = self.chat._validate_request(request)
        if wrong:
            raise RefusedError(wrong)
        return request
