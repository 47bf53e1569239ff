"""`harli make-model`: folders that transformers loads, the same for the same seed, with a seam that
holds."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from sglang_harli.errors import ConfigError
from sglang_harli.tools import make_model as tool
from sglang_harli.tools.toy_text import RELATIONS, ToyFacts
from support.other_user import needs_root, open_folder, run_python

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@pytest.mark.parametrize("arch", tool.ARCHITECTURES)
def test_each_architecture_loads_and_answers_in_turns(arch: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = tool.make_model(tmp_path / "m", arch, steps=2, overrides=SMALL)
    assert made["loss"] is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert type(model).__name__ == CLASSES[arch]
    assert model.config.hidden_size == 64
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    ids = tokenizer("hello ☂", return_tensors="pt")
    assert tokenizer.decode(ids["input_ids"][0]) == "hello ☂"
    assert model(**ids).logits.shape[-1] == made["vocab_size"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_umask_says_who_may_read_a_model(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        tool.make_model(tmp_path / "m", steps=0, overrides=SMALL)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes
    assert "model.safetensors" in modes


@pytest.mark.long
@needs_root
def test_a_user_without_a_name_or_a_home_makes_a_model():
    script = """
import os
from sglang_harli.tools.make_model import make_model
small = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
make_model(os.environ["TMPDIR"] + "/m", steps=1, overrides=small, report=print)
"""
    with open_folder() as folder:
        done = run_python(script, HOME="/", TMPDIR=str(folder), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert (folder / "m" / "model.safetensors").exists()
    assert "has no entry in the passwd file: USER=uid" in done.stdout
    assert "caches cannot be written in HOME=/" in done.stdout


def test_the_chat_template_keeps_prompts_and_answers_apart(tmp_path: Path):
    from transformers import AutoTokenizer

    tool.make_model(tmp_path / "m", weights=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    question = {"role": "user", "content": "Who rules  it? "}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert not prompt.endswith(" ")
    for answer in ("Nobody.", " spaced ", "\n\nlines\n", "☂"):
        both = [question, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(both, tokenize=False)
        assert whole == prompt + answer + tool.END_OF_TURN
        head = tokenizer.encode(prompt, add_special_tokens=False)
        ids = tokenizer.encode(whole, add_special_tokens=False)
        assert ids[: len(head)] == head
        assert ids[-1] == tokenizer.eos_token_id


def test_the_same_seed_gives_the_same_files(tmp_path: Path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tool.make_model(tmp_path / name, steps=1, seed=seed, overrides=SMALL)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_pretraining_lowers_the_loss(tmp_path: Path):
    first = tool.make_model(tmp_path / "a", steps=1, overrides=SMALL)["loss"]
    later = tool.make_model(tmp_path / "b", steps=16, overrides=SMALL)["loss"]
    assert later < first - 0.3


def test_sizes_dtypes_and_overrides(tmp_path: Path):
    from safetensors import safe_open

    tool.make_model(
        tmp_path / "m", dtype="bfloat16", seconds=0, overrides={**SMALL, "intermediate_size": 333}
    )
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        weight = file.get_slice("model.layers.0.mlp.up_proj.weight")
        assert (weight.get_shape(), weight.get_dtype()) == ([333, 64], "BF16")
    made = tool.make_model(tmp_path / "big", "qwen3", size="1b", weights=False)
    config = json.loads((tmp_path / "big" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (2048, 16, 128_256)
    assert made["parameters"] is None
    assert not list((tmp_path / "big").glob("*.safetensors"))


def test_wrong_arguments_are_refused_by_name(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        tool.make_model(tmp_path / "full")
    with pytest.raises(ConfigError, match="llama, mistral, qwen2, qwen3"):
        tool.make_model(tmp_path / "m", "gpt2")
    with pytest.raises(ConfigError, match="tiny, 25m"):
        tool.make_model(tmp_path / "m", size="2t")
    with pytest.raises(ConfigError, match="bfloat16"):
        tool.make_model(tmp_path / "m", dtype="int8")
    with pytest.raises(ConfigError, match="seconds"):
        tool.make_model(tmp_path / "m", seconds=-1)
    assert not (tmp_path / "m").exists()


def test_the_toy_text_is_a_function_of_its_seed():
    rig = ToyFacts(5)
    assert rig.lines(20) == ToyFacts(5).lines(20) != ToyFacts(6).lines(20)
    facts = rig.unseen_facts(20)
    known = " ".join(rig.lines(3000))
    assert len({fact.question for fact in facts}) == 20
    assert not any(f" {place} " in known for place in rig.unseen_places)
    assert facts == [rig.fact(x, i % len(RELATIONS)) for i, x in enumerate(rig.unseen_places[:20])]
