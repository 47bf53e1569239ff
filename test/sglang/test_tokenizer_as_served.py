"""What the HTTP process hands over is the live tokenizer and template, whatever flags and repairs
made them; a service without SGLang makes the same rows of it, and loads the same by itself with the
same flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglang_harli.config import TokenizerFlags
from sglang_harli.managers.http.tokenizer_handover import hand_over, state_of
from sglang_harli.protocol import tokenizer_state
from sglang_harli.service.rows.encoder import RowEncoder, RowError
from sglang_harli.service.rows.served_tokenizer import ServedTokenizer
from sglang_harli.service.tokenizer import hidden_torch, model_files, own_tokenizer
from support.chat_templates import FAMILIES, QWEN3, make_family
from support.serving_chat import Serving

ASK = {"role": "user", "content": "Is the lamp lit, at 3.14 Größe?"}
RECORD = {"messages": [ASK, {"role": "assistant", "content": "It is lit."}]}
OTHER = QWEN3.replace("<|im_start|>' +", "<|im_start|>[other]' +").strip("\n")


@pytest.fixture(autouse=True)
def torch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service hides torch from itself; this process is SGLang's too."""
    monkeypatch.setattr(hidden_torch, "hide", lambda: None)


def folder_of(tmp_path: Path, family: str, **settings: Any) -> Path:
    return make_family(tmp_path / family, family, **settings)


def llama_class(tmp_path: Path, **settings: Any) -> Path:
    """A byte-level tokenizer.json whose config names the class that transformers 5 rebuilds as
    SentencePiece's."""
    folder = make_family(tmp_path / "rebuilt", "plain", tokenizer_class="LlamaTokenizerFast", **settings)
    return folder


def flags_of(folder: Path, **server_args: Any) -> TokenizerFlags:
    names = {"default_chat_template_kwargs": "chat_template_kwargs"}
    values = {names.get(name, name): value for name, value in server_args.items()}
    return TokenizerFlags(model_path=str(folder), tokenizer_path=str(folder), **values)


def check(folder: Path, **server_args: Any) -> tuple[Serving, RowEncoder]:
    """The rows of the handed-over state have the prompts that serving computes; loaded by its path
    it is the same."""
    serving = Serving(folder, **server_args)
    handover = hand_over(serving.manager, serving.templates, folder)
    assert handover is not None
    state = tokenizer_state.read(folder)
    assert state.fingerprint == handover.fingerprint and state.backend is not None
    rows = RowEncoder(ServedTokenizer(state))
    own = own_tokenizer.load(flags_of(folder, **server_args))
    assert own.fingerprint == state.fingerprint
    assert own.stop_ids == frozenset(state.stop_ids)
    if state.chat.refusal is None:
        [row] = rows.rows(RECORD)
        assert row.ids[: row.targets.index(True)] == serving.prompt([ASK])
    [row] = rows.rows({"prompt": "The lamp is", "completion": " lit."})
    prompt = serving.tokenizer("The lamp is")["input_ids"]
    assert row.ids[: len(prompt)] == prompt and row.targets.index(True) == len(prompt)
    return serving, rows


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "r1"])
def test_the_families(tmp_path, family):
    check(folder_of(tmp_path, family))


@pytest.mark.parametrize(
    "kwargs", [{"enable_thinking": False}, {"enable_thinking": True}, {"reasoning_effort": "low"}]
)
def test_default_keywords_of_the_template(tmp_path, kwargs):
    folder = folder_of(tmp_path, "qwen3")
    _, rows = check(folder, default_chat_template_kwargs=kwargs)
    [row] = rows.rows(RECORD)
    plain, _ = check(folder)
    closed = "<think>\n\n</think>" in rows.served.decode(row.ids)
    assert closed
    same = plain.prompt([ASK]) == row.ids[: row.targets.index(True)]
    assert same == (kwargs != {"enable_thinking": False})


def test_a_chat_template_from_a_file(tmp_path):
    folder = folder_of(tmp_path, "qwen3")
    file = tmp_path / "other.jinja"
    file.write_text("\n\n" + OTHER + "\n")
    _, rows = check(folder, chat_template=str(file))
    [row] = rows.rows(RECORD)
    assert "[other]" in rows.served.decode(row.ids)


def test_one_of_several_templates(tmp_path):
    several = [
        {"name": "default", "template": FAMILIES["plain"].template},
        {"name": "tool_use", "template": OTHER},
    ]
    folder = folder_of(tmp_path, "qwen3", chat_template=several)
    _, first = check(folder)
    _, second = check(folder, hf_chat_template_name="tool_use")
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True, "bos_token": "<|im_start|>"}])
def test_what_transformers_rebuilds_is_repaired_on_both_sides(tmp_path, settings):
    folder = llama_class(tmp_path, **settings)
    serving, rows = check(folder)
    assert type(serving.tokenizer.backend_tokenizer.pre_tokenizer).__name__ == "ByteLevel"
    [row] = rows.rows({"prompt": "ab", "completion": "c"})
    assert (row.ids[0] == 1) == bool(settings)  # the beginning of text, where the config asks for it


def test_templates_of_sglangs_own_are_refused_by_name(tmp_path):
    guessed = make_family(tmp_path / "my-vicuna-7b", "plain")
    _, rows = check(guessed)
    with pytest.raises(RowError, match=r"SGLang's own template 'vicuna_v1\.1'.*--chat-template FILE\.jinja"):
        rows.rows(RECORD)
    folder = folder_of(tmp_path, "plain")
    _, rows = check(folder, chat_template="chatml")
    with pytest.raises(RowError, match="SGLang's own template 'chatml'"):
        rows.rows(RECORD)
    file = tmp_path / "own.json"
    values = {
        "name": "mine",
        "system": "s",
        "user": "u",
        "assistant": "a",
        "sep_style": "CHATML",
        "stop_str": ["x"],
    }
    file.write_text(json.dumps(values))
    serving = Serving(folder, chat_template=str(file))
    assert "'mine'" in str(state_of(serving.manager, serving.templates).chat.refusal)
    assert own_tokenizer.load(flags_of(folder, chat_template=str(file))).chat.refusal is not None


def test_another_encoding_than_the_template_is_refused(tmp_path):
    serving = Serving(folder_of(tmp_path, "plain"), tool_call_parser="deepseekv32")
    assert "'dsv32'" in str(state_of(serving.manager, serving.templates).chat.refusal)


def test_stop_tokens_are_those_of_config_and_generation_config(tmp_path):
    folder = folder_of(tmp_path, "llama3.1")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert model_files.stop_ids(str(folder)) == {3, 4}
    assert own_tokenizer.load(flags_of(folder)).stop_ids == {3, 4}


def test_a_server_without_tokenizer_hands_nothing_over(tmp_path):
    serving = Serving(folder_of(tmp_path, "plain"))
    serving.manager.tokenizer = None
    assert hand_over(serving.manager, serving.templates, tmp_path) is None


def test_a_disk_that_refuses_does_not_end_the_server(tmp_path, caplog):
    serving = Serving(folder_of(tmp_path, "plain"))
    handover = hand_over(serving.manager, serving.templates, tmp_path / "missing")
    assert handover is not None and "cannot be handed to the finetune service" in caplog.text
    (tmp_path / "missing").mkdir()
    handover.write()
    assert tokenizer_state.read(tmp_path / "missing").fingerprint == handover.fingerprint


def test_a_tokenizer_that_cannot_be_described_still_serves(tmp_path):
    serving = Serving(folder_of(tmp_path, "plain"))

    class Odd:
        eos_token_id = 2
        chat_template = None

        def encode(self, text: str, **_: Any) -> list[int]:
            raise RuntimeError("no such thing")

    serving.manager.tokenizer = Odd()
    assert hand_over(serving.manager, serving.templates, tmp_path) is not None
    rows = RowEncoder(ServedTokenizer(tokenizer_state.read(tmp_path)))
    with pytest.raises(RowError, match=r"cannot be used for training .RuntimeError: no such thing"):
        rows.rows(RECORD)


PATHS = (
    *(
        "acme/vicuna-13b",
        "/models/Llama-3.1-8B",
        "Qwen/Qwen3-8B",
        "x/llava-v1.5-7b",
        "x/llava-v1.6-34b",
        "a/points-1",
    ),
    *(
        "a/my_points",
        "OpenGVLab/InternVL2",
        "deepseek-ai/Janus-Pro",
        "deepseek-ai/deepseek-vl2",
        "x/MiniCPM-V-2_6",
    ),
    *(
        "x/MiniCPM-V-4_6",
        "x/minicpm-o-2",
        "x/Phi-4-multimodal",
        "x/DeepSeek-OCR",
        "x/unlimited",
        "x/PaddleOCR-VL",
    ),
    *(
        "openai/whisper-large",
        "x/MOSS-VL",
        "mistralai/Mistral-7B",
        "llava-next-video-7b",
        "llava-onevision-qwen2-7b",
    ),
)


@pytest.mark.parametrize("path", PATHS)
def test_sglangs_guess_of_a_template_by_the_path(path):
    from sglang.srt.parser.conversation import get_conv_template_by_model_path

    flags = TokenizerFlags(model_path=path, tokenizer_path=path)
    assert own_tokenizer.conversation_template(flags) == get_conv_template_by_model_path(path)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
    ],
)
def test_the_models_limit_is_the_one_that_sglang_derives(tmp_path, values):
    from sglang.srt.utils.hf_transformers.common import get_context_length
    from transformers import AutoConfig

    folder = folder_of(tmp_path, "plain")
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    derived = get_context_length(AutoConfig.from_pretrained(folder))
    assert model_files.context_length(str(folder)) == derived


def test_a_state_survives_the_file(tmp_path):
    serving = Serving(folder_of(tmp_path, "qwen3"))
    state = state_of(serving.manager, serving.templates)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=tokenizer_state.TokenizerState) == state
