"""One line of data as token ids and the mask of what is learned.

The rule at every seam: the ids before an answer are exactly those that serving computes for the same
prompt (``/v1/chat/completions`` renders the template with its generation prompt and encodes that,
``/v1/completions`` encodes the prompt), and the answer's ids follow.  The end-of-turn token is learned,
what a template writes behind it is not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import jinja2

ROLES = ("system", "developer", "user", "assistant", "tool")


class RowError(ValueError):
    """A line that is not accepted; the text is the reason, ``field`` what it is about."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


@dataclass(frozen=True, slots=True)
class Row:
    """``targets[i]``: whether token ``ids[i]`` is learned (at its own position, not shifted)."""

    ids: list[int]
    targets: list[bool]

    @property
    def target_tokens(self) -> int:
        """Targets that count: nothing predicts the first token."""
        return sum(self.targets[1:])

    def cut(self, length: int) -> Row:
        return Row(self.ids[:length], self.targets[:length])


class RowTokenizer:
    """Args:
    tokenizer: a transformers tokenizer (``PreTrainedTokenizerBase``) of the served model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = set(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}

    @property
    def fingerprint(self) -> str:
        """Differs where ids or the chat template would."""
        digest = hashlib.sha256()
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        digest.update(
            backend.to_str().encode()
            if backend
            else repr(sorted(self._tokenizer.get_vocab().items())).encode()
        )
        digest.update(repr(self._tokenizer.chat_template).encode())
        return digest.hexdigest()[:32]

    def rows(self, record: Any) -> list[Row]:
        """The training rows of one line's JSON value.

        Almost always one.  A template that renders earlier answers differently once a conversation goes
        on (Qwen3 drops their reasoning) gives one row per answer, so that each prompt is what serving saw.

        Raises:
            RowError: with the reason.
        """
        if not isinstance(record, dict):
            raise RowError(f"a JSON object is expected, this is {_kind(record)}")
        if "messages" in record and ("prompt" in record or "completion" in record):
            raise RowError(
                "it has both 'messages' and 'prompt'/'completion': give one of the two forms", "messages"
            )
        if "messages" in record:
            return self._conversation(record["messages"], record.get("tools"))
        if "prompt" in record or "completion" in record:
            return [self._completion(record)]
        found = ", ".join(repr(k) for k in list(record)[:5]) or "nothing"
        raise RowError(
            f"field 'messages' (or 'prompt' and 'completion') is missing; found {found}", "messages"
        )

    # ---- prompt and completion
    def _completion(self, record: dict[str, Any]) -> Row:
        for name in ("prompt", "completion"):
            if name not in record:
                raise RowError(f"field '{name}' is missing", name)
            if not isinstance(record[name], str):
                raise RowError(f"field '{name}' must be a string, it is {_kind(record[name])}", name)
        if not record["completion"]:
            raise RowError("field 'completion' is empty: there is nothing to learn", "completion")
        prompt = self._tokenizer.encode(record["prompt"])
        answer = self._answer(record["prompt"], prompt, record["completion"], special=True)
        if answer[-1:] != [self._eos]:
            answer = [*answer, self._end()]
        return _row([(prompt, answer, True)])

    # ---- messages
    def _conversation(self, messages: Any, tools: Any) -> list[Row]:
        check_messages(messages)
        if tools is not None and not isinstance(tools, list):
            raise RowError(f"field 'tools' must be a list, it is {_kind(tools)}", "tools")
        if not self._tokenizer.chat_template:
            raise RowError("the model has no chat template: use 'prompt' and 'completion'", "messages")
        plain = [_plain(m) for m in messages]
        rows: list[Row] = []
        turns: list[tuple[list[int], list[int], bool]] = []
        so_far: list[int] = []
        for at, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            prompt, answer = self._turn(plain, at, tools)
            if turns and prompt[: len(so_far)] != so_far:
                rows.append(_row(turns))
                turns = []
            learned = messages[at].get("weight", 1) == 1
            turns.append((prompt, answer, learned))
            so_far = prompt + answer
        rows.append(_row(turns))
        learned_rows = [row for row in rows if row.target_tokens]
        if not learned_rows:
            raise RowError("there is nothing to learn: every assistant message has weight 0", "messages")
        return learned_rows

    def _turn(self, messages: list[dict[str, Any]], at: int, tools: Any) -> tuple[list[int], list[int]]:
        """The ids that serving sees before answer ``at``, and the answer's ids with its end of turn."""
        before = self._render(messages[:at], tools, opened=True)
        after = self._render(messages[: at + 1], tools, opened=False)
        if not after.startswith(before):
            raise RowError(
                f"message {at + 1}: the chat template opens an answer with {before[-40:]!r} when it asks for one, "
                f"but renders this answer as {after[max(0, len(before) - 40) :][:80]!r}: no prompt that serving "
                "sees leads to it; use 'prompt' and 'completion', or a template whose two forms agree",
                "messages",
            )
        prompt = self._tokenizer.encode(before, add_special_tokens=False)
        answer_text = after[len(before) :]
        answer = self._answer(before, prompt, answer_text, special=False)
        ends = [i for i, token in enumerate(answer) if token in self._special]
        if ends and not self._tokenizer.decode(answer[ends[-1] + 1 :]).strip():
            return prompt, answer[: ends[-1] + 1]
        # A template without an end of turn: serving stops at eos.  What separates turns is not learned.
        content = messages[at]["content"]
        end = answer_text.rfind(content) + len(content)
        if content and end >= len(content) and not answer_text[end:].strip():
            answer = self._answer(before, prompt, answer_text[:end], special=False)
        return prompt, [*answer, self._end()]

    def _render(self, messages: list[dict[str, Any]], tools: Any, *, opened: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=opened
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise RowError(f"the chat template does not accept it: {error}", "messages") from error

    # ---- seams
    def _answer(self, prompt_text: str, prompt: list[int], answer_text: str, *, special: bool) -> list[int]:
        """The ids of an answer behind ``prompt``.

        Encoded together with its prompt where that leaves the prompt's ids as they are (some tokenizers
        mark the beginning of a text, which an answer is not); alone where tokens would melt at the seam.
        """
        whole = self._tokenizer.encode(prompt_text + answer_text, add_special_tokens=special)
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return self._tokenizer.encode(answer_text, add_special_tokens=False)

    def _end(self) -> int:
        if self._eos is None:
            raise RowError("the tokenizer has no end-of-text token, so an answer could never end")
        return self._eos


def check_messages(messages: Any) -> None:
    """Raise RowError naming the message (counted from 1) and the field at fault."""
    if not isinstance(messages, list) or not messages:
        raise RowError("field 'messages' must be a list of at least one message", "messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise RowError(f"message {number} must be an object, it is {_kind(message)}", "messages")
        role = message.get("role")
        if role not in ROLES:
            known = ", ".join(ROLES)
            problem = "is missing" if role is None else f"is {role!r}"
            raise RowError(f"message {number}: field 'role' {problem}; accepted: {known}", "messages")
        content = message.get("content")
        calls = role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            problem = "is missing" if content is None else f"must be a string, it is {_kind(content)}"
            raise RowError(f"message {number}: field 'content' {problem}", "messages")
        if role == "assistant":
            if not content and not calls:
                raise RowError(f"message {number}: field 'content' is empty", "messages")
            if message.get("weight", 1) not in (0, 1):
                raise RowError(
                    f"message {number}: field 'weight' is {message['weight']!r}; accepted: 0, 1", "messages"
                )
    if messages[0]["role"] == "assistant":
        raise RowError("the first message is an answer: a prompt must come before it", "messages")
    if messages[-1]["role"] != "assistant":
        raise RowError(
            f"the last message has role {messages[-1]['role']!r}: it must be 'assistant'", "messages"
        )


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """What the template gets: as serving does it, without our own field, an absent content as an empty one."""
    kept = {k: v for k, v in message.items() if k != "weight"}
    return {**kept, "content": message.get("content") or ""}


def _row(turns: list[tuple[list[int], list[int], bool]]) -> Row:
    """Turns of which each prompt begins with all before it, as one row."""
    targets: list[bool] = []
    for prompt, answer, learned in turns:
        targets += [False] * (len(prompt) - len(targets)) + [learned] * len(answer)
    prompt, answer, _ = turns[-1]
    return Row(prompt + answer, targets)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
