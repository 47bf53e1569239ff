"""What rows are refused, what is said of a file, and that a long conversation takes linear work."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.errors import DataError, NotReadyError
from sglang_harli.protocol.tokenizer_state import ChatTemplate
from sglang_harli.service.data import dataset
from sglang_harli.service.rows import conversation as conversation_module
from sglang_harli.service.rows.encoder import Reading, RowEncoder, RowError
from sglang_harli.service.rows.growing_text import GrowingText
from sglang_harli.service.rows.served_tokenizer import BackendEncoder, ServedTokenizer, describe
from support.chat_templates import FAMILIES, make_family
from support.tokenizer import load_tokenizer

ASK = {"role": "user", "content": "Is the lamp lit?"}
YES = {"role": "assistant", "content": "It is lit."}
CALL = {"id": "c", "type": "function", "function": {"name": "lamp", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "lit"}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return {name: load_tokenizer(make_family(tmp_path_factory.mktemp(name), name)) for name in FAMILIES}


def served(tokenizer: Any, stop_ids: list[int] | None = None, **chat: Any) -> RowEncoder:
    """With flags of the server's."""
    own = RowEncoder(tokenizer).served.chat
    values = {"source": own.source, "content_format": own.content_format} | chat
    return RowEncoder(ServedTokenizer(describe(tokenizer, ChatTemplate(**values), stop_ids or []), tokenizer))


def learned(tokenizer, rows) -> list[str]:
    return [tokenizer.decode([i for i, t in zip(r.ids, r.targets, strict=True) if t]) for r in rows]


def scan(tmp_path, rows: RowEncoder, *records: Any, **options: Any) -> dataset.DataSummary:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records))
    return dataset.scan(path, rows, name="data.jsonl", **options)


def notes(tmp_path, rows: RowEncoder, *records: Any) -> dict[str, Any]:
    return {note.code: note for note in scan(tmp_path, rows, *records).notes}


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("family", "messages", "reason"),
    [
        (
            "plain",
            [ASK, CALLED],
            "message 2: the chat template renders nothing of this answer: it knows no tool calls",
        ),
        (
            "plain",
            [ASK, CALLED | {"content": "I look at the lamp."}],
            "message 2: .* renders nothing of its tool_calls: .* --chat-template FILE.jinja",
        ),
        (
            "llama3.1",
            [ASK, {"role": "assistant", "content": " \n"}],
            "renders nothing of this answer: .* blanks",
        ),
        (
            "qwen2.5",
            [ASK, {"role": "assistant", "reasoning_content": "hm"}],
            "renders nothing of this answer: it does not show reasoning_content",
        ),
        ("plain", [ASK, CALLED, YES], "message 3 is an answer to an answer"),
        (
            "plain",
            [ASK, {"role": "assistant", "content": None}],
            "'content' is null, and there are no tool_calls",
        ),
        ("plain", [ASK, {"role": "assistant"}], "'content' is missing, and there are no tool_calls"),
        (
            "plain",
            [ASK, {"role": "assistant", "function_call": {"name": "x"}}],
            "'function_call' is not accepted",
        ),
        (
            "qwen2.5",
            [ASK, CALLED | {"tool_calls": {"name": "x"}}],
            "message 2: field 'tool_calls' must be a list",
        ),
        (
            "qwen2.5",
            [ASK, CALLED | {"tool_calls": [{}]}],
            r"message 2: tool_calls\[0\]: field 'function' is missing",
        ),
        (
            "qwen2.5",
            [ASK, {"role": "tool", "content": 3}, YES],
            "message 2: field 'content' must be a string",
        ),
        (
            "plain",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, YES],
            r"message 1: content\[0\]: a part of type 'image_url' cannot be trained on",
        ),
        ("r1", [ASK, YES], r"opens an answer with.*<think>.*--chat-template FILE\.jinja"),
    ],
)
def test_what_is_refused_by_name(families, family, messages, reason):
    with pytest.raises(RowError, match=f"(?s){reason}"):
        RowEncoder(families[family]).rows({"messages": messages})


@pytest.mark.parametrize("text", ["", '{"a": ', "[1]", "null"])
def test_arguments_that_are_no_object_are_named(families, text):
    call = {"function": {"name": "lamp", "arguments": text}}
    record = {"messages": [ASK, {"role": "assistant", "tool_calls": [CALL, call]}]}
    with pytest.raises(RowError, match=r"message 2: tool_calls\[1\]\.function: field 'arguments'"):
        RowEncoder(families["qwen2.5"]).rows(record)


def test_an_index_of_thousands_of_digits_is_named(families):
    call = CALL | {"index": "9" * 5000}
    record = {"messages": [ASK, {"role": "assistant", "tool_calls": [CALL, call]}]}
    with pytest.raises(RowError, match=r"tool_calls\[1\]: field 'index' must be an .*a text of 5000 digits"):
        RowEncoder(families["qwen2.5"]).rows(record)


@pytest.mark.parametrize("field", ["pattern", "patternProperties"])
def test_a_pattern_that_python_cannot_count_is_no_schema(families, field):
    pattern = "a{99999999999999999999}"
    parameters = {field: pattern if field == "pattern" else {pattern: {}}}
    tools = [{"type": "function", "function": {"name": "lamp", "parameters": parameters}}]
    with pytest.raises(
        RowError, match=r"tools\[0\]\.function: field 'parameters': not a JSON schema: the repetition"
    ):
        RowEncoder(families["qwen2.5"]).rows({"messages": [ASK, YES], "tools": tools})


class Failing(BackendEncoder):
    """Raises ``error`` for texts with "lit", as the tokenizers library raises a plain Exception."""

    def __init__(self, backend: Any, error: Exception) -> None:
        super().__init__(backend)
        self._error = error

    def encode(self, text: str, *, special: bool) -> list[int]:
        if "lit" in text:
            raise self._error
        return super().encode(text, special=special)


def test_what_nobody_expects_of_a_line_is_its_reason_and_the_others_are_named(tmp_path, families, caplog):
    rows = RowEncoder(families["plain"])
    rows.served.encoder = Failing(families["plain"].backend_tokenizer, Exception("no such word"))
    lit, dark = ({"prompt": text, "completion": "b"} for text in ("lit", "dark"))
    with pytest.raises(DataError) as caught:
        scan(tmp_path, rows, dark, lit, {"prompt": 1}, lit)
    reason = "it cannot be made a row (Exception: no such word)"
    assert [(d["line"], d["reason"]) for d in caught.value.details if d["line"] != 3] == [
        (2, reason),
        (4, reason),
    ]
    assert len(caught.value.details) == 3
    assert [r.message for r in caplog.records] == ["data.jsonl: line 2 cannot be made a row"]


@pytest.mark.parametrize(
    "error", [OSError("no disk"), MemoryError(), ImportError("torch"), NotReadyError("no")]
)
def test_trouble_of_the_environment_is_no_fault_of_a_line(tmp_path, families, error):
    rows = RowEncoder(families["plain"])
    rows.served.encoder = Failing(families["plain"].backend_tokenizer, error)
    with pytest.raises(type(error)):
        scan(tmp_path, rows, {"prompt": "lit", "completion": "b"})


def test_a_tool_call_is_learned_as_the_template_writes_it(families):
    tokenizer = families["qwen2.5"]
    for arguments in ('{"at": "north"}', '{"at":"north"}', {"at": "north"}):
        call = {"function": {"name": "lamp", "arguments": arguments}}
        record = {"messages": [ASK, {"role": "assistant", "tool_calls": [call]}, RESULT, YES]}
        assert learned(tokenizer, RowEncoder(tokenizer).rows(record)) == [
            '<tool_call>\n{"name": "lamp", "arguments": {"at": "north"}}\n</tool_call><|im_end|>It is lit.<|im_end|>'
        ]


def test_nulls_are_fields_that_are_not_there(families):
    for tokenizer in families.values():
        if tokenizer is families["r1"]:
            continue
        rows = RowEncoder(tokenizer)
        plain = rows.rows({"messages": [ASK, YES]})
        nulls = dict.fromkeys(("tool_calls", "name", "tool_call_id", "reasoning_content", "weight"))
        assert rows.rows({"messages": [ASK | nulls, YES | nulls], "tools": None, "prompt": None}) == plain
    [row] = rows.rows({"prompt": "a", "completion": " b", "messages": None, "tools": None})
    assert row == rows.rows({"prompt": "a", "completion": " b"})[0]


def test_a_template_that_opens_think_can_be_trained_on_with_another_template(families):
    """The ways that the refusal names."""
    tokenizer = families["r1"]
    agreeing = (
        FAMILIES["r1"]
        .template.replace("<|im_end|>{{ m['content'].split('</think>')[-1] }}", "")
        .replace(
            "{% elif m['role'] == 'assistant' %}",
            "{% elif m['role'] == 'assistant' %}<|im_end|>{{ m['content'] }}",
        )
    )
    rows = served(tokenizer, source=agreeing)
    thought = {"role": "assistant", "content": "<think>\nI see it.\n</think>\n\nIt is lit."}
    assert learned(tokenizer, rows.rows({"messages": [ASK, thought]})) == [
        "I see it.\n</think>\n\nIt is lit.<|im_end|>"
    ]
    prompt = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    [row] = RowEncoder(tokenizer).rows(
        {"prompt": prompt.removeprefix("<|begin|>"), "completion": "I see it.\n</think>\n\nIt is lit."}
    )
    assert [row] == rows.rows({"messages": [ASK, thought]})


def test_keywords_of_the_template(families):
    tokenizer = families["qwen3"]
    [row] = served(tokenizer, kwargs={"enable_thinking": False}).rows({"messages": [ASK, YES]})
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\nIt is lit." in tokenizer.decode(row.ids)
    assert learned(tokenizer, [row]) == ["It is lit.<|im_end|>"]


def test_chats_that_the_server_renders_in_another_way_are_refused_and_prompts_are_not(families):
    rows = served(families["plain"], refusal="the server renders chats by its own template 'x'")
    with pytest.raises(RowError, match="its own template 'x'"):
        rows.rows({"messages": [ASK, YES]})
    assert rows.rows({"prompt": "a", "completion": "b"})


# ------------------------------------------------------------------ what is said once
def test_what_the_template_drops_is_said(tmp_path, families):
    found = notes(
        tmp_path,
        RowEncoder(families["qwen3"]),
        {"messages": [ASK, YES]},
        {"messages": [{"role": "developer", "content": "Be short."}, ASK, YES]},
    )
    assert found["role_not_rendered"].names == ["developer"] and found["role_not_rendered"].line == 2
    tools = {"messages": [ASK, YES], "tools": [{"type": "function", "function": {"name": "lamp"}}]}
    reasons = {"messages": [ASK, YES | {"reasoning_content": "I see it."}]}
    found = notes(tmp_path, RowEncoder(families["plain"]), tools, reasons)
    assert found["field_not_rendered"].names == ["tools", "the reasoning_content of answers"]
    assert not notes(tmp_path, RowEncoder(families["qwen3"]), tools, reasons)


def test_fields_of_messages_and_tools_that_serving_drops_are_said(tmp_path, families):
    tool = {"type": "function", "function": {"name": "lamp", "returns": "x"}, "cache": 1}
    summary = scan(
        tmp_path,
        RowEncoder(families["qwen2.5"]),
        {
            "messages": [ASK, YES | {"train": False, "weight": 1}, ASK | {"name": "bob"}, YES | {"loss": 0}],
            "id": 3,
        },
        {"messages": [ASK, YES], "tools": [tool]},
    )
    found = {note.code: note for note in summary.notes}
    assert found["message_fields_ignored"].names == ["loss", "name", "train"]
    assert '"weight": 0' in found["message_fields_ignored"].text and found["message_fields_ignored"].line == 1
    assert found["tool_fields_ignored"].names == ["cache", "returns"]
    assert summary.ignored_fields == ["id"]
    assert "fields of messages ignored: loss, name, train" in summary.text()


def test_tools_beside_a_prompt_are_an_ignored_field(tmp_path, families):
    summary = scan(tmp_path, RowEncoder(families["plain"]), {"prompt": "a", "completion": "b", "tools": []})
    assert summary.ignored_fields == ["tools"]


def test_a_date_in_the_template_is_said(tmp_path, families):
    assert "date" in notes(tmp_path, RowEncoder(families["llama3.1"]), {"messages": [ASK, YES]})
    fixed = served(families["llama3.1"], kwargs={"date_string": "1 Jan 2026"})
    assert not notes(tmp_path, fixed, {"messages": [ASK, YES]})


def test_control_tokens_in_answers_are_said(tmp_path, families):
    rows = RowEncoder(families["plain"])
    inside = {"messages": [ASK, {"role": "assistant", "content": "It<|im_end|> is."}]}
    found = notes(tmp_path, rows, {"messages": [ASK | {"content": "<|im_end|>"}, YES]}, inside)
    assert found["control_tokens"].names == ["<|im_end|>"] and found["control_tokens"].line == 2
    found = notes(
        tmp_path, rows, {"prompt": "a", "completion": "b<|endoftext|>c"}, {"prompt": "a", "completion": "b"}
    )
    assert found["control_tokens"].names == ["<|endoftext|>"]
    assert not notes(tmp_path, rows, {"prompt": "a", "completion": "b<|im_end|>"})


def test_an_end_of_turn_at_which_serving_does_not_stop_is_said(tmp_path, families):
    record = {"messages": [ASK, YES]}
    end = families["plain"].eos_token_id
    assert not notes(tmp_path, served(families["plain"], [0, end]), record)
    assert not notes(tmp_path, served(families["plain"]), record)  # not known where it stops
    found = notes(tmp_path, served(families["plain"], [0]), record)
    assert (
        found["end_is_no_stop"].names == ["<|im_end|>"]
        and "generation_config.json" in found["end_is_no_stop"].text
    )


def test_an_opened_think_without_reasoning_is_said(tmp_path, families):
    source = FAMILIES["qwen3"].template.replace(
        "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable",
        "{{- '<|im_start|>assistant\\n<think>\\n' }}\n    {%- if enable",
    )
    rows = served(families["qwen3"], source=source)
    assert "opens_thinking" in notes(tmp_path, rows, {"messages": [ASK, YES]})
    thought = YES | {"reasoning_content": "I see it."}
    assert "opens_thinking" not in notes(tmp_path, rows, {"messages": [ASK, thought]})


# ------------------------------------------------------------------ long conversations
class Counting(BackendEncoder):
    """Counts the characters that are encoded."""

    def __init__(self, backend: Any) -> None:
        super().__init__(self)
        self._real = backend
        self.characters = 0
        self.encode_special_tokens = False
        self.get_added_tokens_decoder = backend.get_added_tokens_decoder
        self.decode = backend.decode  # type: ignore[method-assign]

    def encode(self, text: str, *, special: bool = False, add_special_tokens: bool | None = None) -> Any:
        self.characters += len(text)
        if add_special_tokens is not None:
            return self._real.encode(text, add_special_tokens=add_special_tokens)
        return self._real.encode(text, add_special_tokens=special).ids


def conversation(turns: int, size: int) -> dict[str, Any]:
    messages = []
    for i in range(turns):
        messages += [
            {"role": "user", "content": f"{i} " + "ask " * (size // 4)},
            {"role": "assistant", "content": f"{i} " + "say " * (size // 4)},
        ]
    return {"messages": messages}


@pytest.mark.parametrize("family", ["plain", "qwen2.5", "qwen3", "llama3.1"])
def test_a_conversation_is_encoded_about_once(families, family):
    rows = served(families[family], kwargs={"date_string": "1 Jan 2026"} if family == "llama3.1" else {})
    counting = Counting(families[family].backend_tokenizer)
    rows.served.encoder = counting
    record = conversation(40, 400)
    encoded = rows.rows(record)
    assert counting.characters < 3.5 * len(json.dumps(record))
    rows.served.encoder = BackendEncoder(families[family].backend_tokenizer)
    assert rows.rows(record) == encoded


def peak_memory(rows: RowEncoder, record: dict[str, Any]) -> int:
    tracemalloc.start()
    try:
        for row in rows.each_row(record, Reading()):
            assert row.target_tokens
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("family", ["plain", "qwen3"])
def test_a_text_of_many_turns_takes_no_more_memory_than_one_of_few(families, family):
    rows = RowEncoder(families[family])
    rows.rows(conversation(2, 4))  # what is loaded and compiled once
    few, many = (peak_memory(rows, conversation(*shape)) for shape in ((4, 40_000), (160, 1000)))
    assert many < 1.5 * few


def test_a_conversation_over_the_limit_ends_at_the_answer_that_crosses_it(tmp_path, families):
    rows = RowEncoder(families["plain"])
    counting = Counting(families["plain"].backend_tokenizer)
    rows.served.encoder = counting
    record = conversation(40, 400)
    with pytest.raises(DataError, match=r"line 1: at least \d+ tokens, the limit is 300"):
        scan(tmp_path, rows, record, max_length=300)
    assert counting.characters < len(json.dumps(record)) / 5
    assert scan(tmp_path, rows, record, max_length=300, on_overflow="truncate").longest_row == 300


def test_a_scan_can_be_stopped_within_a_conversation(tmp_path, families):
    asked = iter([False] * 5 + [True])
    with pytest.raises(NotReadyError):
        scan(tmp_path, RowEncoder(families["plain"]), conversation(40, 40), stop=lambda: next(asked))


def test_too_many_answers(families, monkeypatch):
    monkeypatch.setattr(conversation_module, "MAX_ANSWERS", 3)
    rows = RowEncoder(families["plain"])
    assert rows.rows(conversation(3, 4), Reading())
    with pytest.raises(RowError, match="4 answers, at most 3 are accepted: split it"):
        rows.rows(conversation(4, 4))


PIECES = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>",
        "\n",
        " ",
        "ask",
        "say it",
        "ä\u200d",
        "</s>",
        "<s>",
        "[INST]",
        "<|eot_id|>",
        "x",
    ]
)


@pytest.mark.parametrize("kind", ["plain", "mistral", "metaspace", "prepend", "unigram"])
@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.lists(PIECES, max_size=6).map("".join), min_size=1, max_size=6), fork=st.integers(0, 5)
)
def test_a_text_that_grows_has_the_ids_of_the_whole(families, tmp_path_factory, kind, texts, fork):
    tokenizer = families[kind] if kind in families else sentence_like(kind)
    whole = RowEncoder(tokenizer).served
    growing = GrowingText(whole)
    text = "<|im_start|>"
    for i, piece in enumerate(texts):
        if i == fork:  # as a template does that renders earlier answers differently
            growing.encode(text + "<|im_end|>other")
        text += piece
        growing.encode(text)
        assert growing.ids == whole.encode_chat(text)


def sentence_like(kind: str) -> Any:
    """Tokenizers that mark the beginnings of words, as SentencePiece does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({*"▁ askyitxä\u200d<>|_/[]INSTmedoen\n"})
    if kind == "unigram":
        backend = Tokenizer(
            models.Unigram([("<unk>", 0.0), *((c, -1.0) for c in letters), ("▁say", -0.5)], 0)
        )
    else:
        vocabulary = {c: i for i, c in enumerate(["<unk>", *letters, "▁a", "▁s"])}
        backend = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "s")], unk_token="<unk>"))
    if kind == "prepend":  # Llama's own: a normalizer marks the beginning of each section
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "first" if kind == "metaspace" else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<s>", "<|im_start|>", "<|im_end|>")]
    )
    backend.add_special_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
