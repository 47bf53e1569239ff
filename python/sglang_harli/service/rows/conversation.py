"""A line of messages as rows: each learned answer behind the prompt that serving builds for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_harli.service.rows import chat_request
from sglang_harli.service.rows.error import RowError
from sglang_harli.service.rows.growing_text import GrowingText
from sglang_harli.service.rows.notes import ANSWERS_APART
from sglang_harli.service.rows.row import Reading, Row, end_of_text, over_limit
from sglang_harli.service.rows.served_tokenizer import TEMPLATE_ERRORS, ServedTokenizer, today

MAX_ANSWERS = 2048  # learned in one conversation: each has a prompt of its own that is rendered whole


class Conversation:
    """One chat row: its messages as serving renders them, and which tokens are learned.  ``record``
    has messages; see RowEncoder.each_row.  Raises RowError: they are not accepted."""

    def __init__(self, served: ServedTokenizer, record: dict[str, Any], reading: Reading) -> None:
        raw = record["messages"]
        self._served = served
        self._reading = reading
        self._notes = reading.notes
        self._messages = chat_request.read_messages(raw)
        self._learned = _learned(raw, self._messages)
        if served.chat.refusal is not None:
            raise RowError(served.chat.refusal, "messages")
        self._tools = chat_request.read_tools(record.get("tools"))
        self._given = [chat_request.for_template(m, served.chat.content_format) for m in self._messages]
        self._text = GrowingText(served)
        self._row = Row([], [])
        self._shown = ""  # the text that the row is of
        self._equal = 0  # the row and the text encoded last have at least so many first ids in common
        self._notes.add("message_fields_ignored", sorted(set().union(*map(_unknown, raw))))
        self._notes.add(
            "tool_fields_ignored", sorted(chat_request.unknown_tool_fields(record.get("tools") or []))
        )

    def rows(self) -> Iterator[Row]:
        for at in self._learned:
            self._reading.stop()
            done = self._turn(at)
            if done is not None:
                yield done
            tokens, limit = len(self._row.ids), self._reading.limit
            if limit is not None and tokens > limit:
                raise over_limit(tokens, limit, at_least=at != self._learned[-1])
        yield self._row

    def _turn(self, at: int) -> Row | None:
        """Append the ids that serving sees before answer ``at``, and the answer's to its end of
        turn.  Returns the row before, where these ids do not go on from it."""
        before, tools = self._prompt(at)
        # An empty list of calls is none; some templates refuse it.
        answered = {name: value for name, value in self._given[at].items() if name != "tool_calls" or value}
        after = self._render([*self._given[:at], answered], tools, opened=False)
        if not after.startswith(before):
            raise RowError(_two_forms(at, before, after), "messages")
        answer_text = after[len(before) :]
        self._check_rendered(at, answer_text, tools, after)
        self._note(at, before, answer_text, tools)
        done = None
        if not self._continues(before):
            done, self._row, self._equal = self._row, Row([], []), 0
            if before.startswith(self._shown):
                self._notes.add(ANSWERS_APART)
        self._put(self._text.ids[len(self._row.ids) :], learned=False)
        answer = self._answer(after, answer_text)
        special = self._served.special_ids
        ends = [i for i, token in enumerate(answer) if token in special]
        own_end = bool(ends) and not self._served.decode(answer[ends[-1] + 1 :]).strip()
        if own_end:
            answer = answer[: ends[-1] + 1]
        else:  # a template without an end of turn: serving stops at eos
            answer = [*self._without_separator(at, before, answer_text, answer), end_of_text(self._served)]
        self._note_end(at, answer, own_end=own_end)
        self._put(answer, learned=True)
        self._shown = after.rstrip()
        return done

    def _put(self, ids: list[int], *, learned: bool) -> None:
        self._row.ids.extend(ids)
        self._row.targets.extend([learned] * len(ids))

    def _without_separator(self, at: int, before: str, answer_text: str, answer: list[int]) -> list[int]:
        """The answer's ids without what the template writes between turns, where that is known."""
        content = chat_request.text_of(self._messages[at])
        end = answer_text.rfind(content) + len(content)
        if content and end >= len(content) and not answer_text[end:].strip():
            return self._answer(before + answer_text[:end], answer_text[:end])
        return answer

    # ---- rendering
    def _prompt(self, at: int) -> tuple[str, list[dict[str, Any]] | None]:
        """Serving's text of the messages before ``at``, and the tools in the form that made it."""
        try:
            return self._render(self._given[:at], self._tools, opened=True), self._tools
        except RowError:
            if not self._tools:
                raise
            tools = [tool["function"] for tool in self._tools]  # as serving tries next
            return self._render(self._given[:at], tools, opened=True), tools

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, opened: bool
    ) -> str:
        try:
            return self._served.render(messages, tools, opened=opened, now=self._now)
        except TEMPLATE_ERRORS as error:
            raise RowError(f"the chat template does not accept it: {error}", "messages") from error

    def _now(self, pattern: str) -> str:
        self._notes.add("date")
        return today(pattern)

    # ---- seams
    def _continues(self, text: str) -> bool:
        """Encode ``text``; whether its ids begin with the row's."""
        self._equal = min(self._equal, self._text.encode(text))
        row = self._row.ids
        if row[self._equal :] != self._text.ids[self._equal : len(row)]:
            return False
        self._equal = len(row)
        return True

    def _answer(self, whole_text: str, answer_text: str) -> list[int]:
        """The ids of an answer behind its prompt, which the row ends in.

        Encoded with its prompt where the prompt's ids stay as they are (some tokenizers mark the
        beginning of a text, which an answer is not); alone where tokens would span the seam.
        """
        if self._continues(whole_text):
            return self._text.ids[len(self._row.ids) :]
        return self._served.encoder.encode(answer_text, special=False)

    # ---- what the template leaves out
    def _check_rendered(
        self, at: int, answer_text: str, tools: list[dict[str, Any]] | None, after: str
    ) -> None:
        """Raise RowError where the template renders nothing of the answer, or of its calls."""
        message = self._messages[at]
        content, calls = chat_request.text_of(message).strip(), message["tool_calls"]
        beside = answer_text.replace(content, "", 1) if content else answer_text
        calls_shown = not calls or any((c["function"]["name"] or "\0") in beside for c in calls)
        if calls_shown and (content in answer_text if content else calls):
            return
        given = self._given[at]
        if calls and not calls_shown and content:
            without = {name: value for name, value in given.items() if name != "tool_calls"}
            if self._same(at, without, tools, after):
                raise _nothing(at, "its tool_calls", _NO_CALLS)
        same = self._same(at, {"role": "assistant", "content": ""}, tools, after)
        if same or (same is None and not self._visible(answer_text)):
            why = _NO_CALLS if calls else _NO_REASONING if message["reasoning_content"] else _BLANKS
            raise _nothing(at, "this answer", "" if content else why)

    def _same(
        self, at: int, other: dict[str, Any], tools: list[dict[str, Any]] | None, after: str
    ) -> bool | None:
        """Whether ``other`` in place of message ``at`` renders the same; None: it is refused."""
        return self._renders([*self._given[:at], other], tools, after, opened=False)

    def _renders(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str, *, opened: bool
    ) -> bool | None:
        """Whether the messages become ``text``; None: the template refuses them."""
        try:
            return self._render(messages, tools, opened=opened) == text
        except RowError:
            return None

    def _visible(self, text: str) -> bool:
        """Whether a text is more than control tokens and blanks."""
        ids = self._served.encoder.encode(text, special=False)
        return bool(self._served.decode([i for i in ids if i not in self._served.special_ids]).strip())

    def _note(self, at: int, before: str, answer_text: str, tools: list[dict[str, Any]] | None) -> None:
        """Notice what the template does not show, the first times that it could."""
        notes, answer = self._notes, self._messages[at]
        if at == self._learned[-1]:
            self._note_roles(at, before, tools)
        for name in ("content", "reasoning_content"):
            text = (chat_request.text_of(answer) if name == "content" else answer[name] or "").strip()
            if text and text not in answer_text and notes.worth_a_look(name):
                given = {k: v for k, v in self._given[at].items() if k != "reasoning_content"}
                without = self._given[at] | {"content": ""} if name == "content" else given
                if self._same(at, without, tools, before + answer_text):
                    notes.add("field_not_rendered", [f"the {name} of answers"])
        thought = answer["reasoning_content"] or "</think>" in chat_request.text_of(answer)
        if not thought and before.rstrip().endswith("<think>"):
            notes.add("opens_thinking")

    def _note_roles(self, at: int, before: str, tools: list[dict[str, Any]] | None) -> None:
        notes = self._notes
        for i, message in enumerate(self._messages[:at]):
            role = message["role"]
            if role != "assistant" and notes.worth_a_look(role):
                text = chat_request.text_of(message).strip()
                others = [*self._given[:i], self._given[i] | {"content": "harli?"}, *self._given[i + 1 : at]]
                if text and text not in before and self._renders(others, tools, before, opened=True):
                    notes.add("role_not_rendered", [role])
        given = self._given[:at]
        if tools and notes.worth_a_look("tools") and self._renders(given, None, before, opened=True):
            notes.add("field_not_rendered", ["tools"])

    def _note_end(self, at: int, answer: list[int], *, own_end: bool) -> None:
        served = self._served
        if own_end:
            self._notes.ended(answer[-1], served.decode(answer[-1:]), served)
        content = chat_request.text_of(self._messages[at])
        tokens = {served.decode([i]) for i in {*answer} & served.special_ids}
        self._notes.add("control_tokens", sorted(token for token in tokens if token in content))


# ------------------------------------------------------------------ parts
_NO_CALLS = ": it knows no tool calls; start the server with --chat-template FILE.jinja, a template that does"
_NO_REASONING = ": it does not show reasoning_content, and there is no content"
_BLANKS = ": there are no more than blanks in its content"


def _nothing(at: int, of_what: str, why: str) -> RowError:
    return RowError(f"message {at + 1}: the chat template renders nothing of {of_what}{why}", "messages")


def _learned(raw: list[dict[str, Any]], messages: list[dict[str, Any]]) -> list[int]:
    """Which messages are learned: the assistant's, unless their weight is 0. Raises RowError: there
    is none, or serving cannot be asked for one of them."""
    if messages[-1]["role"] != "assistant":
        raise RowError(
            f"the last message has role {messages[-1]['role']!r}: it must be 'assistant'", "messages"
        )
    learned = []
    for at, (given, message) in enumerate(zip(raw, messages, strict=True)):
        where = f"message {at + 1}"
        if message["role"] != "assistant" or not _weighs(given, where):
            continue
        if at == 0:
            raise RowError("the first message is an answer: a prompt must come before it", "messages")
        if messages[at - 1]["role"] == "assistant":
            raise RowError(
                f"{where} is an answer to an answer: serving, asked for it, takes the message before as the user's. "
                'Join the two, put the result of a tool call between them, or give this one "weight": 0',
                "messages",
            )
        _check_answer(given, message, where)
        learned.append(at)
    if not learned:
        raise RowError("there is nothing to learn: every assistant message has weight 0", "messages")
    if len(learned) > MAX_ANSWERS:
        raise RowError(f"{len(learned)} answers, at most {MAX_ANSWERS} are accepted: split it", "messages")
    return learned


def _weighs(given: dict[str, Any], where: str) -> bool:
    weight = given.get("weight")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"{where}: field 'weight' is {weight!r}; accepted: 0, 1", "messages")
    return weight is None or weight == 1


def _check_answer(given: dict[str, Any], message: dict[str, Any], where: str) -> None:
    """Raise RowError for an answer in which there is nothing."""
    if chat_request.text_of(message) or message["tool_calls"] or message["reasoning_content"]:
        return
    if given.get("function_call") is not None:
        raise RowError(
            f"{where}: field 'function_call' is not accepted, as in serving: give 'tool_calls'", "messages"
        )
    problem = (
        "is empty" if given.get("content") is not None else "is null" if "content" in given else "is missing"
    )
    raise RowError(f"{where}: field 'content' {problem}, and there are no tool_calls", "messages")


def _unknown(message: dict[str, Any]) -> set[str]:
    return chat_request.unknown_fields(message) - {"weight"}


def _two_forms(at: int, before: str, after: str) -> str:
    return (
        f"message {at + 1}: the chat template opens an answer with {before[-40:]!r} when it asks for one, "
        f"but renders this answer as {after[max(0, len(before) - 40) :][:80]!r}: no prompt that serving "
        "sees leads to it; use 'prompt' and 'completion', or start the server with --chat-template FILE.jinja, "
        "a template whose two forms agree (docs/data.md, Templates that open <think>)"
    )
