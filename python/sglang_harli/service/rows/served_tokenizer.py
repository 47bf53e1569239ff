"""The served model's tokenizer and chat template, as serving uses them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime
from typing import Any, Protocol

import jinja2
import msgspec

from sglang_harli.protocol.tokenizer_state import ChatTemplate, Probe, TokenizerState
from sglang_harli.sglang_versions.current import chat_fields

# What a chat template can raise over what a client sent; serving answers 400 or 500 to it.
TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    RuntimeError,  # RecursionError among them
)
# What a tokenizer class that is not of transformers' usual kind can raise where it is asked as one.
TOKENIZER_ERRORS = (TypeError, ValueError, LookupError, AttributeError, NotImplementedError, ImportError)
_PROBES = (
    "Which gate is open?",
    "  two blanks, a\ttab and\n\n lines \r\n",
    "Größe naïve 名前 Привет नमस्ते \u200d\u2028 \U0001f98a\U0001f3fd",
    "3.14159 1000000 2026-11-30 x=1;y!=2 don't WE'LL",
    "def f(x):\n    return {'a': [x, None]}  # \\n\n",
    " leading",
    "a",
)
# A default keyword of a template that serving itself passes, or that would replace what it passes.
_TAKEN = (
    *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding"),
    *("continue_final_message", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)
LONG_TEXT = 10_000  # characters, which take hundredths of a second


class Encoder(Protocol):
    """Texts to ids and back."""

    def encode(self, text: str, *, special: bool) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class BackendEncoder:
    """Encodes with a ``tokenizers.Tokenizer``."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self.encoding(text, special=special).ids

    def encoding(self, text: str, *, special: bool) -> Any:
        """The backend's ``Encoding``.  Other threads run meanwhile: ``encode`` alone would hold
        them, a second for each MiB, and with them the event loop."""
        if len(text) < LONG_TEXT:
            return self.backend.encode(text, add_special_tokens=special)
        return self.backend.encode_batch([text], add_special_tokens=special)[0]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


class LoadedEncoder:
    """Encodes with a transformers tokenizer that has no backend."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, special: bool) -> list[int]:
        return _encode(self._tokenizer, text, special)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class ServedTokenizer:
    """The server's tokenizer and chat template, rebuilt from its description.

    ``loaded``: the transformers tokenizer that ``state`` describes, needed where it has no backend.
    ``fingerprint``: differs where a row's ids would.  Raises ValueError: the tokenizer does not
    give the ids that the state names.
    """

    def __init__(self, state: TokenizerState, loaded: Any = None) -> None:
        self.chat = state.chat
        self.fingerprint = state.fingerprint
        self.refusal = state.refusal
        self.eos_id = state.eos_id
        self.special_ids = frozenset(state.special_ids)
        self.stop_ids = frozenset(state.stop_ids)
        self.chat_adds_special = state.chat_adds_special
        self._template_values = state.special_tokens | state.chat.kwargs
        self._loaded = None
        self.encoder: Encoder
        if state.backend is not None:
            self.encoder = BackendEncoder(_backend(state, loaded))
        elif loaded is not None:
            self.encoder, self._loaded = LoadedEncoder(loaded), loaded
            loaded.chat_template = state.chat.source
        elif state.refusal is None:
            raise ValueError("the tokenizer has no backend and was not loaded by its path")
        if state.refusal is None:
            self._check(state)

    def _check(self, state: TokenizerState) -> None:
        """Raises ValueError where a probe comes out differently."""
        for probe in state.probes:
            found = self.encode(probe.text), self.encoder.encode(probe.text, special=False)
            if found != (probe.ids, probe.plain):
                raise ValueError(f"the text {probe.text!r} gets other ids than in serving: {found[0][:12]}")
        if state.probes and state.chat.refusal is None:
            found_chat = self._chat_probe(state.probes[0].text)
            if found_chat != state.chat_probe:
                raise ValueError(f"the chat template gives {found_chat!r}, in serving {state.chat_probe!r}")

    def _chat_probe(self, text: str) -> str | None:
        try:
            return self.render([{"role": "user", "content": text}], None, opened=True, now=_same_day)
        except TEMPLATE_ERRORS:
            return None

    # ---- ids
    def encode(self, text: str) -> list[int]:
        """As ``/v1/completions`` encodes a prompt."""
        return self.encoder.encode(text, special=True)

    def encode_chat(self, text: str) -> list[int]:
        """As ``/v1/chat/completions`` encodes what the template made."""
        return self.encoder.encode(text, special=self.chat_adds_special)

    def decode(self, ids: list[int]) -> str:
        return self.encoder.decode(ids)

    # ---- chats
    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        opened: bool,
        now: Callable[[str], str] | None = None,
    ) -> str:
        """The chat as text; raises one of TEMPLATE_ERRORS.

        ``opened``: with the beginning of an answer, as serving asks for one.  ``now``: replaces
        ``strftime_now``, which templates ask for the date.
        """
        clock: dict[str, Any] = {"strftime_now": now or today}
        if self._loaded is not None:
            kwargs = clock | self.chat.kwargs
            return self._loaded.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=opened,
                return_dict=False,
                **kwargs,
            )
        from transformers.utils.chat_template_utils import render_jinja_template

        values: dict[str, Any] = clock | self._template_values
        rendered, _ = render_jinja_template(
            [messages],
            tools=tools,  # type: ignore[arg-type]
            chat_template=self.chat.source,
            add_generation_prompt=opened,
            **values,
        )
        return rendered[0]


def today(pattern: str) -> str:
    """The date, as transformers gives it to a template that asks for it."""
    return datetime.now().strftime(pattern)  # stamp: the date that a chat template asks for


# ------------------------------------------------------------------ of a loaded tokenizer
def describe(tokenizer: Any, chat: ChatTemplate, stop_ids: list[int]) -> TokenizerState:
    """The state of a transformers tokenizer with serving's chat template for it."""
    chat = msgspec.structs.replace(checked_kwargs(chat), form=chat_fields.FORM)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(getattr(tokenizer, "all_special_ids", ())) | {i for i, t in added.items() if t.special}
    try:
        # As SGLang asks: where nothing is added to an empty text, it lets the tokenizer add.
        adds_special = not _encode(tokenizer, "", True)
        some = (tokenizer.decode([i]) for i in sorted(special)[:4])
        texts = (*_PROBES, *(f"{t} a {t}b {t}\n{t}" for t in some))
        probes = [
            Probe(text=t, ids=_encode(tokenizer, t, True), plain=_encode(tokenizer, t, False)) for t in texts
        ]
        special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        eos_id = tokenizer.eos_token_id
    except TOKENIZER_ERRORS as error:
        name = type(tokenizer).__name__
        return TokenizerState(chat=chat, refusal=f"the server's tokenizer ({name}) cannot make rows: {error}")
    backend = _backend_text(tokenizer, probes)
    state = TokenizerState(
        chat=chat,
        backend=backend,
        special_tokens=special_tokens,
        special_ids=sorted(special),
        eos_id=eos_id,
        chat_adds_special=adds_special,
        split_special=bool(getattr(tokenizer, "split_special_tokens", False)),
        stop_ids=sorted(set(stop_ids)),
        probes=probes,
        chat_probe=_loaded_chat(tokenizer, chat, probes[0].text),
        vocabulary="" if backend else _vocabulary(tokenizer),
    )
    if backend is not None:
        try:
            ServedTokenizer(state, tokenizer)
        except ValueError:  # a class that renders chats in its own way
            return msgspec.structs.replace(state, backend=None, vocabulary=_vocabulary(tokenizer))
    return state


def checked_kwargs(chat: ChatTemplate) -> ChatTemplate:
    """The same, with a refusal where its keywords make each chat request an error in serving."""
    taken = [name for name in chat.kwargs if name in _TAKEN]
    if chat.refusal is None and chat.source is None:
        why = "the model has no chat template: use 'prompt' and 'completion'"
    elif chat.refusal is None and taken:
        why = f"--default-chat-template-kwargs has {', '.join(taken)}, which serving itself sets"
    else:
        return chat
    return msgspec.structs.replace(chat, refusal=why)


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    # The keyword is left out where it changes nothing, as in SGLang: it slows some classes down.
    return list(tokenizer.encode(text) if special else tokenizer.encode(text, add_special_tokens=False))


def _backend_text(tokenizer: Any, probes: list[Probe]) -> str | None:
    """The JSON of the tokenizers library, where that alone gives the tokenizer's ids."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    encoder = BackendEncoder(backend)
    for probe in probes:
        if encoder.encode(probe.text, special=True) != probe.ids:
            return None
        if encoder.encode(probe.text, special=False) != probe.plain:
            return None
    return backend.to_str()


def _backend(state: TokenizerState, loaded: Any) -> Any:
    if loaded is not None:
        return loaded.backend_tokenizer
    from tokenizers import Tokenizer

    assert state.backend is not None
    backend = Tokenizer.from_str(state.backend)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = state.split_special
    return backend


def _vocabulary(tokenizer: Any) -> str:
    try:
        tokens = sorted(tokenizer.get_vocab().items())
    except TOKENIZER_ERRORS:
        return ""
    return hashlib.sha256(repr(tokens).encode()).hexdigest()


def _loaded_chat(tokenizer: Any, chat: ChatTemplate, text: str) -> str | None:
    if chat.refusal is not None:
        return None
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            return_dict=False,
            chat_template=chat.source,
            **({"strftime_now": _same_day} | chat.kwargs),
        )
    except TEMPLATE_ERRORS:
        return None


def _same_day(pattern: str) -> str:
    return pattern
