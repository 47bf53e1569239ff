"""Data files: one report of all bad lines, and masks and seams that agree with what serving
sees."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.errors import DataError, NotReadyError
from sglang_harli.service.data import dataset
from sglang_harli.service.data.files import lines
from sglang_harli.service.data.token_store import TokenReader, TokenWriter
from sglang_harli.service.rows.encoder import Row, RowEncoder, RowError
from support.models import CHAT_TEMPLATE
from support.tokenizer import load_tokenizer, make_tokenizer_folder

# Ends in a space, which melts with the word behind it.
SPACE_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Like Qwen3: earlier answers lose what the last one has.
FORGETTING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt is not how an answer begins.
CONTRARY_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NO_END_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PICKY_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {}

    def get(template=CHAT_TEMPLATE, **options):
        key = (template, repr(options))
        if key not in made:
            folder = make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), template, **options)
            made[key] = load_tokenizer(folder)
        return made[key]

    return get


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers()


def chat(*turns: str) -> dict:
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]}


def serving_prompt(tokenizer, messages) -> list[int]:
    """What /v1/chat/completions makes of a conversation."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def learned(tokenizer, row) -> str:
    return tokenizer.decode([i for i, t in zip(row.ids, row.targets, strict=True) if t])


# ------------------------------------------------------------------ masks and seams
def test_only_answers_are_learned_with_their_end_of_turn(tokenizer):
    [row] = RowEncoder(tokenizer).rows(chat("hello", "good day", "and now", "bye"))
    assert learned(tokenizer, row) == "good day<|im_end|>bye<|im_end|>"
    assert row.ids[-1] == tokenizer.eos_token_id and row.targets[-1]


TEMPLATES = (CHAT_TEMPLATE, SPACE_TEMPLATE, FORGETTING_TEMPLATE, NO_END_TEMPLATE)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: "<|" not in text
)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(turns=st.lists(TEXT, min_size=2, max_size=6).map(lambda t: t[: len(t) // 2 * 2]))
def test_before_each_answer_stand_the_ids_that_serving_sees(tokenizers, template, turns):
    tokenizer = tokenizers(template)
    messages = chat(*turns)["messages"]
    rows = RowEncoder(tokenizer).rows({"messages": messages})
    answers = []
    for row in rows:
        starts = [i for i, t in enumerate(row.targets) if t and not row.targets[i - 1]]
        answers += [(row, start) for start in starts]
    assert len(answers) == len(turns) // 2
    for number, (row, start) in enumerate(answers):
        assert row.ids[:start] == serving_prompt(tokenizer, messages[: 2 * number + 1])
        end = start + row.targets[start:].index(False) if False in row.targets[start:] else len(row.ids)
        assert row.ids[end - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.ids[start : end - 1]).endswith(messages[2 * number + 1]["content"])


def test_a_template_that_ends_in_a_space(tokenizers):
    tokenizer = tokenizers(SPACE_TEMPLATE)
    [row] = RowEncoder(tokenizer).rows(chat("say", "hello"))
    prompt = serving_prompt(tokenizer, chat("say")["messages"])
    answer = tokenizer.encode("hello", add_special_tokens=False)
    assert row.ids == [*prompt, *answer, tokenizer.eos_token_id]


def test_a_template_that_rewrites_earlier_answers_gives_one_row_per_answer(tokenizers):
    tokenizer = tokenizers(FORGETTING_TEMPLATE)
    rows = RowEncoder(tokenizer).rows(chat("a", "b", "c", "d"))
    assert [learned(tokenizer, row) for row in rows] == [
        "<think>\n\n</think>\n\nb<|im_end|>",
        "<think>\n\n</think>\n\nd<|im_end|>",
    ]


def test_a_template_whose_two_forms_disagree_is_refused_with_both(tokenizers):
    with pytest.raises(RowError, match=r"message 2: the chat template opens.*<think>.*prompt.*completion"):
        RowEncoder(tokenizers(CONTRARY_TEMPLATE)).rows(chat("a", "b"))


def test_what_the_template_itself_refuses(tokenizers):
    record = {"messages": [{"role": "system", "content": "x"}, *chat("a", "b")["messages"]]}
    with pytest.raises(RowError, match="no system role"):
        RowEncoder(tokenizers(PICKY_TEMPLATE)).rows(record)


def test_a_message_of_weight_zero_is_read_and_not_learned(tokenizer):
    record = chat("a", "b", "c", "d")
    record["messages"][1]["weight"] = 0
    [row] = RowEncoder(tokenizer).rows(record)
    assert learned(tokenizer, row) == "d<|im_end|>"
    record["messages"][3]["weight"] = 0
    with pytest.raises(RowError, match="weight 0"):
        RowEncoder(tokenizer).rows(record)


def test_prompt_and_completion(tokenizer):
    [row] = RowEncoder(tokenizer).rows({"prompt": "2 + 2 =", "completion": " 4"})
    prompt = tokenizer.encode("2 + 2 =")
    assert row.ids[: len(prompt)] == prompt
    assert learned(tokenizer, row) == " 4<|im_end|>"
    [same] = RowEncoder(tokenizer).rows({"prompt": "2 + 2 =", "completion": " 4<|im_end|>"})
    assert same == row


def test_a_beginning_of_text_token_stands_once_and_first(tokenizers):
    tokenizer = tokenizers()
    from tokenizers import processors

    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    try:
        [row] = RowEncoder(tokenizer).rows({"prompt": "ab", "completion": "cd"})
        assert row.ids[0] == 0 and 0 not in row.ids[1:]
        [row] = RowEncoder(tokenizer).rows(chat("a", "b"))  # serving adds none to a rendered template
        assert 0 not in row.ids
    finally:
        backend.post_processor = before


def test_an_empty_prompt(tokenizer):
    [row] = RowEncoder(tokenizer).rows({"prompt": "", "completion": "hello there"})
    assert row.target_tokens == len(row.ids) - 1  # nothing predicts the first token


# ------------------------------------------------------------------ the report
def scan(tmp_path, tokenizer, content: str | bytes, **options):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return dataset.scan(path, RowEncoder(tokenizer), name="data.jsonl", **options)


GOOD = json.dumps(chat("a question", "an answer"))
GOOD_PAIR = json.dumps({"prompt": "a question", "completion": "an answer"})


def test_all_bad_lines_in_one_report(tmp_path, tokenizer):
    rows = [GOOD_PAIR] * 10
    rows[6] = '{"messages": [{"role": "user", "content"'
    rows[8] = json.dumps({"prompt": "a prompt alone"})
    with pytest.raises(DataError) as caught:
        scan(tmp_path, tokenizer, "\n".join(rows))
    assert [row["line"] for row in caught.value.details] == [7, 9]
    assert "2 of 10 lines" in caught.value.message
    assert "line 7: not JSON" in caught.value.message
    assert "line 9: field 'completion' is missing" in caught.value.message


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1, 2], "a JSON object is expected, this is a list"),
        (3, "this is a number"),
        ({"text": "x"}, "field 'messages' .* is missing; found 'text'"),
        ({}, "found nothing"),
        ({"messages": "x"}, "must be a list"),
        ({"messages": []}, "at least one message"),
        ({"messages": ["x"]}, "message 1 must be an object"),
        ({"messages": [{"content": "x"}]}, "message 1: field 'role' is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'robot'; accepted: system"),
        ({"messages": [{"role": "user"}]}, "message 1: field 'content' is missing"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "must be a string or a list of text parts, it is a number",
        ),
        (chat("x"), "the last message has role 'user'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the first message is an answer"),
        (chat("x", ""), "message 2: field 'content' is empty"),
        ({"prompt": 1, "completion": "x"}, "field 'prompt' must be a string"),
        ({"completion": "x"}, "field 'prompt' is missing"),
        ({"prompt": "x", "completion": ""}, "field 'completion' is empty"),
        (chat("x", "y") | {"prompt": "x"}, "both 'messages' and 'prompt'"),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "y", "weight": 2},
                ]
            },
            "weight",
        ),
    ],
)
def test_reasons(tmp_path, tokenizer, record, reason):
    with pytest.raises(DataError, match=reason) as caught:
        pair = isinstance(record, dict) and {"prompt", "completion"} & {*record} and "messages" not in record
        scan(tmp_path, tokenizer, (GOOD_PAIR if pair else GOOD) + "\n" + json.dumps(record))
    assert caught.value.details[0]["line"] == 2


def test_bytes_that_are_not_text(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match=r"line 1: not UTF-8: byte 0xff .* at column 13: save the file as UTF-8"
    ):
        scan(tmp_path, tokenizer, b'{"prompt": "\xff\xfe", "completion": "x"}\n')


def test_byte_order_mark_carriage_returns_and_blank_lines(tmp_path, tokenizer):
    content = "\ufeff" + GOOD + "\r\n\r\n   \n" + GOOD + "\r\n" + "oops"
    with pytest.raises(DataError) as caught:
        scan(tmp_path, tokenizer, content)
    assert [row["line"] for row in caught.value.details] == [5]
    assert scan(tmp_path, tokenizer, content.removesuffix("oops")).rows == 2


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_an_empty_file(tmp_path, tokenizer, content):
    with pytest.raises(DataError, match="holds no line of data"):
        scan(tmp_path, tokenizer, content)


def test_the_report_is_bounded(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"5000 of 5000 lines.*lines 1 to 1000: .*; and 4000 more") as caught:
        scan(tmp_path, tokenizer, "{}\n" * 5000)
    assert len(caught.value.details) == dataset.MAX_REPORTED


def test_a_reason_that_quotes_a_long_value_is_cut(tmp_path, tokenizer):
    turns = chat("q", "a")
    turns["messages"][1]["weight"] = "heavy" * 10_000
    with pytest.raises(DataError, match="1 of 1 lines not accepted") as caught:
        scan(tmp_path, tokenizer, json.dumps(turns))
    [detail] = caught.value.details
    assert detail["reason"].startswith("message 2: field 'weight' is 'heavyheavy")
    assert len(caught.value.message) < 3000 and len(detail["reason"]) < 3000


def test_a_line_without_end_is_not_held_in_memory(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    with pytest.raises(DataError) as caught:
        scan(tmp_path, tokenizer, GOOD + "\n" + "x" * 5000 + "\n" + GOOD + "\n" + "y" * 1001)
    assert [row["line"] for row in caught.value.details] == [2, 4]


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_any_bytes_are_rows_or_a_report(tmp_path_factory, tokenizers, content):
    folder = tmp_path_factory.getbasetemp()
    try:
        assert scan(folder, tokenizers(), content).rows
    except DataError as error:
        assert all(row["line"] >= 1 and row["reason"] for row in error.details)


def test_a_scan_can_be_stopped(tmp_path, tokenizer):
    with pytest.raises(NotReadyError):
        scan(tmp_path, tokenizer, GOOD, stop=lambda: True)


# ------------------------------------------------------------------ rows over the limit
LONG = json.dumps({"prompt": "short", "completion": "word " * 60})
LONG_PROMPT = json.dumps({"prompt": "word " * 60, "completion": "short"})


def test_over_long_rows_are_an_error_by_default(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"line 2: \d+ tokens, the limit is 40.*on_overflow=truncate"):
        scan(tmp_path, tokenizer, GOOD_PAIR + "\n" + LONG, max_length=40)


def test_truncated_and_dropped_rows_are_counted(tmp_path, tokenizer):
    content = f"{GOOD_PAIR}\n{LONG}\n{LONG}"
    short = scan(tmp_path, tokenizer, content, max_length=40, on_overflow="truncate")
    assert (short.rows, short.truncated, short.dropped, short.longest_row) == (3, 2, 0, 40)
    assert "2 rows truncated to 40 tokens" in short.text()
    fewer = scan(tmp_path, tokenizer, content, max_length=40, on_overflow="drop")
    assert (fewer.rows, fewer.truncated, fewer.dropped) == (1, 0, 2)
    assert "2 rows over 40 tokens dropped" in fewer.text()


def test_why_a_conversation_became_several_rows(tmp_path, tokenizers):
    """Templates that rewrite earlier answers, that end answers without a token, and tokens across
    turns."""
    content = json.dumps(chat("a", "b", "c", "d"))
    rewritten = scan(tmp_path, tokenizers(FORGETTING_TEMPLATE), content)
    assert (
        "1 conversations became one row per answer, because the chat template renders earlier"
        in rewritten.text()
    )
    assert rewritten.notes == []
    without_end = scan(tmp_path, tokenizers(NO_END_TEMPLATE), content)
    assert (without_end.rows, [note.code for note in without_end.notes]) == (2, ["answers_apart"])
    assert "renders earlier answers differently" not in without_end.text()
    assert "the chat template ends answers without a token of their own" in without_end.text()
    assert scan(tmp_path, tokenizers(), content).cut_conversations == 0


def test_truncation_may_not_eat_all_that_is_learned(tmp_path, tokenizer):
    with pytest.raises(DataError, match="line 1: truncated to 40 tokens nothing is left to learn"):
        scan(tmp_path, tokenizer, LONG_PROMPT, max_length=40, on_overflow="truncate")


def test_nothing_left_after_dropping(tmp_path, tokenizer):
    with pytest.raises(DataError, match="every row is over the limit"):
        scan(tmp_path, tokenizer, LONG, max_length=40, on_overflow="drop")


# ------------------------------------------------------------------ stored tokens
def test_stored_rows_come_back(tmp_path, tokenizer):
    content = "\n".join(json.dumps(chat(f"question {i}" * i, f"answer {i}")) for i in range(1, 8))
    with TokenWriter(tmp_path / "data") as writer:
        summary = scan(tmp_path, tokenizer, content, writer=writer)
    reader = TokenReader(tmp_path / "data")
    assert len(reader) == summary.rows == 7
    assert int(np.diff(reader.offsets).sum()) == summary.tokens
    assert int(reader.target_tokens.sum()) == summary.target_tokens
    assert int(np.diff(reader.offsets).max()) == summary.longest_row
    for index, line in enumerate(content.splitlines()):
        [row] = RowEncoder(tokenizer).rows(json.loads(line))
        ids, labels = reader.row(index)
        assert ids.dtype == labels.dtype == np.int32
        assert ids.tolist() == row.ids
        assert labels.tolist() == [i if t else -100 for i, t in zip(row.ids, row.targets, strict=True)]
    assert np.load(tmp_path / "data" / "ids.npy").shape == (summary.tokens,)


def test_the_fingerprint_tells_tokenizers_and_templates_apart(tokenizers):
    prints = {RowEncoder(tokenizers(template)).fingerprint for template in TEMPLATES}
    assert len(prints) == len(TEMPLATES)
    assert RowEncoder(tokenizers()).fingerprint == RowEncoder(tokenizers()).fingerprint


@pytest.mark.parametrize("name", ["ids.npy", "targets.npy", "rows.npz"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "other"])
def test_damaged_data_files_are_named(tmp_path, name, damage):
    with TokenWriter(tmp_path) as writer:
        writer.append(Row([1, 2, 3], [False, True, True]), 1)
    path = tmp_path / name
    if damage == "gone":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-2], "empty": b"", "other": b"x" * len(whole)}[damage])
    with pytest.raises((OSError, ValueError)):
        TokenReader(tmp_path)


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error(tmp_path):
    with TokenWriter(tmp_path) as writer:
        for line in range(1, 2000):
            writer.append(Row([line] * 4, [False, True, True, True]), line)
    reader = TokenReader(tmp_path)
    os.truncate(tmp_path / "ids.npy", 4096)
    assert reader.row(3)[0].tolist() == [4] * 4
    with pytest.raises(OSError, match=r"ids\.npy.*cut off"):
        reader.row(1990)
    reader.close()
