"""The seam: what turns it on, the defaults and refusals that come with it, and that every row
takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sglang_harli.config import SWITCH_ENV, HarliOptions
from sglang_harli.errors import ConfigError, UnsupportedError
from sglang_harli.managers.http.start_up import refusals
from sglang_harli.managers.http.start_up.handshake import check_hello
from sglang_harli.managers.http.start_up.lora_paths import check_lora_paths
from sglang_harli.platforms.cpu import engine
from sglang_harli.sglang_versions import supported
from sglang_harli.sglang_versions.current import arguments
from support.model_runner import NEWEST

installed: list[str] = []
in_force, resolve = arguments.in_force, arguments.resolve


def field_names(kind: Any) -> list[str]:
    return list(kind.__struct_fields__) if NEWEST else [field.name for field in dataclasses.fields(kind)]


def copy_of(args: Any, **changes: Any) -> Any:
    return (msgspec.structs.replace if NEWEST else dataclasses.replace)(args, **changes)


@pytest.fixture(autouse=True)
def switch_off() -> Iterator[None]:
    os.environ.pop(SWITCH_ENV, None)
    yield
    os.environ.pop(SWITCH_ENV, None)


@pytest.fixture
def make_args(tiny_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``make_args(model_path=..., **values)`` -> HarliServerArgs, resolved, with the plugin's part
    recorded only."""
    from sglang_harli.server_args import HarliServerArgs, Seam

    installed.clear()
    seam = Seam(
        refusals.refuse_flags, refusals.refuse_model, check_lora_paths, lambda: installed.append("once")
    )
    monkeypatch.setattr(HarliServerArgs, "seam", seam)
    monkeypatch.setattr(HarliServerArgs, "_announced", set())
    defaults = {"model_path": tiny_model(), "skip_tokenizer_init": True, "random_seed": 1}

    def make(**values: Any) -> Any:
        args = HarliServerArgs(**(defaults | values))
        resolve(args)
        return args

    return make


def from_command_line(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's own parser, after the replacement."""
    import sglang.srt.server_args as sglang_args

    from sglang_harli.server_args import HarliServerArgs

    monkeypatch.setattr(sglang_args, "ServerArgs", HarliServerArgs)
    args = sglang_args.prepare_server_args(argv)
    resolve(args)
    return args


# ------------------------------------------------------------------ the switch
def test_without_an_option_everything_is_sglangs(make_args, tiny_model):
    from sglang.srt.server_args import ServerArgs

    ours = make_args(device="cpu", attention_backend="torch_native")
    theirs = ServerArgs(
        model_path=tiny_model(),
        skip_tokenizer_init=True,
        random_seed=1,
        device="cpu",
        attention_backend="torch_native",
    )
    resolve(theirs)
    for name in field_names(ServerArgs):
        assert repr(getattr(in_force(ours), name)) == repr(getattr(in_force(theirs), name)), name
    assert not ours.harli_on
    assert not installed
    assert SWITCH_ENV not in os.environ


@pytest.mark.parametrize("field", dataclasses.fields(HarliOptions), ids=lambda field: field.name)
def test_any_option_turns_it_on_even_with_its_default_value(make_args, field):
    value = (
        field.default
        if field.default is not None
        else ("2GiB" if "mem" in field.name or "reserve" in field.name else 5)
    )
    mode = "null"
    if field.name == "prefill_url":  # of a pair alone
        value, mode = ("http://127.0.0.1:30001",), "decode"
    args = make_args(**{f"harli_{field.name}": value}, disaggregation_mode=mode)
    assert os.environ[SWITCH_ENV] == "1"
    assert installed == ["once"]
    assert getattr(args.harli_options(), field.name) == value


def test_the_switch_alone_turns_it_on(make_args):
    os.environ[SWITCH_ENV] = "1"  # as the launcher does
    assert make_args().harli_options() == HarliOptions()
    assert installed == ["once"]


def test_finetuning_off_leaves_serving_alone_but_for_the_cpu(make_args):
    args = in_force(make_args(harli_finetune="off", tp_size=2))
    assert os.environ[SWITCH_ENV] == "serve"
    assert not args.enable_lora
    assert (args.attention_backend, args.max_total_tokens) == ("torch_native", 131_072)


@pytest.mark.parametrize("off", ["off", '"off"', "false"])
def test_options_come_from_a_config_file_too(make_args, tiny_model, tmp_path, monkeypatch, off):
    config = tmp_path / "server.yaml"
    config.write_text(f"harli-finetune: {off}\nharli-tpot-slo-ms: 25\n")
    args = from_command_line(["--model-path", tiny_model(), "--config", str(config)], monkeypatch)
    assert args.harli_options() == HarliOptions(finetune="off", tpot_slo_ms=25.0)


def test_options_come_from_the_command_line(make_args, tiny_model, monkeypatch):
    argv = ["--model-path", tiny_model(), "--harli-quantum-rows", "2", "--harli-run-dir", "/tmp/x"]
    args = from_command_line(argv, monkeypatch)
    assert args.harli_options() == HarliOptions(quantum_rows=2, run_dir="/tmp/x")


def test_a_bad_value_ends_the_process_with_one_sentence(make_args):
    with pytest.raises(SystemExit, match="--harli-tpot-slo-ms -1 is not accepted: give a number"):
        make_args(harli_tpot_slo_ms=-1)
    assert not installed


def test_every_option_is_a_flag_with_its_help_and_default():
    import argparse

    from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass

    from sglang_harli.server_args import HarliServerArgs

    parser = argparse.ArgumentParser()
    add_cli_args_from_dataclass(parser, HarliServerArgs)
    actions = {action.dest: action for action in parser._actions}
    text = re.sub(r"\s+", " ", parser.format_help()).replace("- ", "-")
    for field in dataclasses.fields(HarliOptions):
        action = actions[f"harli_{field.name}"]
        assert action.option_strings == ["--harli-" + field.name.replace("_", "-")]
        assert action.default is None, "so that a value equal to the default still counts as given"
        assert field.metadata["help"].split(";")[0].split(" (")[0].rstrip(".") in text
        assert field.default is None or f"(default: {field.default})" in action.help


# ------------------------------------------------------------------ the arguments' way
def test_arguments_travel_and_can_be_made_anew(make_args):
    args = make_args(harli_tpot_slo_ms=25.0)
    os.environ.pop(SWITCH_ENV)
    child = pickle.loads(pickle.dumps(args))
    assert child.harli_options() == args.harli_options()
    assert type(child) is type(args)
    assert copy_of(args, port=1).harli_options() == args.harli_options()
    json.dumps([getattr(args, f"harli_{field.name}") for field in dataclasses.fields(HarliOptions)])


def test_values_stay_guarded_after_they_are_resolved(make_args, monkeypatch):
    from sglang_harli.architectures import ALL_LINEAR

    args = make_args(harli_tpot_slo_ms=25.0)
    monkeypatch.setenv("SGLANG_STRICT_CONFIG_MUTATION", "1")
    with pytest.raises(AttributeError, match="assigned after resolution"):
        args.max_running_requests = 3
    args.check_server_args()
    assert in_force(args).lora_target_modules == set(ALL_LINEAR)


# ------------------------------------------------------------------ defaults
@pytest.fixture
def unread_adapters(make_args, monkeypatch) -> None:
    """Adapters of --lora-paths need not be there."""
    from sglang_harli.server_args import HarliServerArgs

    assert HarliServerArgs.seam is not None
    seam = dataclasses.replace(HarliServerArgs.seam, check_lora_paths=lambda _: None)
    monkeypatch.setattr(HarliServerArgs, "seam", seam)


def test_cpu_defaults_are_filled_in_and_each_is_logged_once(make_args, caplog):
    with caplog.at_level("INFO"):
        args = make_args(harli_tpot_slo_ms=25.0)
        resolve(copy_of(args))
    expected = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "max_running_requests": 32,
        "disable_overlap_schedule": True,
        "max_total_tokens": 131_072,
        "mem_fraction_static": 0.88,
        "enable_lora": True,
        "lora_backend": "torch_native",
        "max_lora_rank": 32,
        "max_loaded_loras": 16,
    }
    for name, value in expected.items():
        assert getattr(in_force(args), name) == value
        lines = [line for line in caplog.messages if f"--{name.replace('_', '-')}" in line.split(" (")[0]]
        assert len([line for line in lines if line.startswith("harli default:")]) == 1, name
    resolved = [line for line in caplog.messages if line.startswith("harli options:")]
    assert len(resolved) == 1
    assert "tpot_slo_ms=25.0" in resolved[0]
    assert "busy: 50, idle: 250" in resolved[0]


@pytest.mark.parametrize(
    ("given", "loaded"),
    [
        ({"max_loras_per_batch": 4}, 8),
        ({"max_loras_per_batch": 4, "lora_paths": [f"a{n}=/x" for n in range(20)]}, 24),
        ({"max_loras_per_batch": 4, "lora_paths": ["a=/x"] * 7, "enable_lora_overlap_loading": True}, 8),
    ],
)
def test_as_many_adapters_stay_loaded_as_are_given_and_as_a_batch_takes(
    make_args, unread_adapters, given, loaded
):
    args = make_args(harli_finetune="on", max_lora_rank=8, lora_target_modules=["q_proj"], **given)
    assert in_force(args).max_loaded_loras == loaded
    assert in_force(make_args(harli_finetune="off")).max_loaded_loras is None


def test_the_operators_values_stand(make_args):
    given = {
        "max_running_requests": 7,
        "max_total_tokens": 5000,
        "mem_fraction_static": 0.3,
        "enable_lora": True,
        "max_lora_rank": 8,
        "max_loaded_loras": 9,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
    args = in_force(make_args(harli_finetune="on", **given))
    assert {name: getattr(args, name) for name in given} == given


def test_start_up_adapters_size_the_slots_as_sglang_does(make_args, unread_adapters):
    args = in_force(make_args(harli_finetune="on", lora_paths=["a=/some/adapter"]))
    assert (args.enable_lora, args.max_lora_rank, args.lora_target_modules) == (True, None, None)


@pytest.mark.parametrize(("overlap", "disabled"), [("auto", True), ("off", True), ("on", False)])
def test_overlap(make_args, overlap, disabled):
    assert in_force(make_args(harli_overlap=overlap)).disable_overlap_schedule is disabled


def test_overlap_that_contradicts_itself(make_args):
    with pytest.raises(SystemExit, match="--harli-overlap on contradicts --disable-overlap-schedule"):
        make_args(harli_overlap="on", disable_overlap_schedule=True)


def test_adapters_need_lora_serving(make_args):
    with pytest.raises(SystemExit, match="enable_lora=False"):
        make_args(harli_finetune="on", enable_lora=False)


def test_the_cpu_without_its_engine_names_the_launcher(make_args, monkeypatch):
    monkeypatch.delenv(engine.CPU_ENGINE_ENV)
    with pytest.raises(SystemExit, match=r"--device cpu: .*sglang_harli\.launch_server"):
        make_args(harli_finetune="on", device="cpu")


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"dp_size": 2}, "--dp-size"),
        ({"tp_size": 2}, "--tp-size"),
        ({"pp_size": 2}, "--pp-size"),
        ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm"),
        ({"quantization": "fp8"}, "--quantization"),
        *([] if NEWEST else [({"torchao_config": "int8wo"}, "--torchao-config")]),
        ({"enable_pdmux": True}, "--enable-pdmux"),
        ({"nnodes": 2}, "--nnodes"),
        ({"enable_dp_attention": True}, "--enable-dp-attention"),
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb"),
    ],
)
def test_what_does_not_work_yet_is_refused_with_the_way_out(make_args, values, flag):
    with pytest.raises(SystemExit) as caught:
        make_args(harli_finetune="on", **values)
    assert re.fullmatch(
        rf"sglang-harli: {flag} \(.+\) does not work .*--harli-finetune off", str(caught.value)
    )
    assert not installed


def test_a_prefill_server_does_not_train_and_says_where_to(make_args):
    with pytest.raises(SystemExit) as caught:
        make_args(harli_finetune="on", disaggregation_mode="prefill")
    text = str(caught.value)
    assert text.startswith("sglang-harli: --disaggregation-mode prefill does not train: ")
    assert "on the decode server" in text and text.endswith("--harli-finetune off")
    assert not installed
    assert not make_args(harli_finetune="off", disaggregation_mode="prefill").harli_options().enabled


def test_prefill_servers_are_of_a_decode_server(make_args):
    from sglang_harli.config import HarliOptions

    with pytest.raises(SystemExit, match="--harli-prefill-url is for a decode server"):
        make_args(harli_prefill_url=["http://127.0.0.1:30001"])
    for wrong in (["127.0.0.1:30001"], ["http://a:1", "http://a:1/"], ["ftp://a"], [3]):
        with pytest.raises(ConfigError, match="--harli-prefill-url"):
            HarliOptions(prefill_url=wrong)
    two = ["http://a:1", "https://b"]
    assert HarliOptions(prefill_url=two).prefill_url == ("http://a:1", "https://b")
    assert HarliOptions.from_json(HarliOptions(prefill_url=two).to_json()) == HarliOptions(prefill_url=two)


def test_the_flag_may_be_repeated():
    from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass

    from sglang_harli.server_args import HarliServerArgs

    parser = argparse.ArgumentParser()
    add_cli_args_from_dataclass(parser, HarliServerArgs, fields=["harli_prefill_url"])
    given = ["--harli-prefill-url", "http://a:1", "--harli-prefill-url", "http://b:2"]
    assert parser.parse_args(given).harli_prefill_url == ["http://a:1", "http://b:2"]


def test_a_decode_server_trains(make_args):
    args = make_args(
        harli_finetune="on", disaggregation_mode="decode", disaggregation_transfer_backend="mooncake_tcp"
    )
    assert args.harli_options().enabled


def changed_config(model_path: str, folder: Path, **changes: Any) -> str:
    config = json.loads((Path(model_path) / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_unknown_architectures_are_refused_by_name(make_args, tiny_model, tmp_path):
    path = changed_config(
        tiny_model(), tmp_path, architectures=["Olmo2ForCausalLM"], model_type="olmo2", rms_norm_eps=1e-6
    )
    with pytest.raises(SystemExit, match=r"is a Olmo2ForCausalLM, .*--harli-finetune off"):
        make_args(harli_finetune="on", model_path=path)
    assert not make_args(harli_finetune="off", model_path=path).harli_options().enabled


@pytest.mark.skipif(not NEWEST, reason="SGLang 0.5.16 resolves in the constructor, which gives none")
@pytest.mark.usefixtures("make_args")
def test_refused_arguments_are_never_resolved(tiny_model, tmp_path):
    from sglang_harli.server_args import HarliServerArgs

    path = changed_config(tiny_model(), tmp_path, architectures=["Olmo2ForCausalLM"], model_type="olmo2")
    args = HarliServerArgs(harli_finetune="on", model_path=path, skip_tokenizer_init=True)
    with pytest.raises(SystemExit, match="Olmo2ForCausalLM"):
        resolve(args)
    with pytest.raises(RuntimeError, match="already failed"):
        resolve(args)


def test_quantised_weights_are_refused_by_name():
    model = SimpleNamespace(architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "awq"})
    config = SimpleNamespace(hf_config=model)
    args = SimpleNamespace(
        model_path="/m", quantization=None, get_model_config=lambda: config, _model_config=config
    )
    with pytest.raises(UnsupportedError, match=r"/m has quantised weights \(awq\).*--harli-finetune off"):
        refusals.refuse_model(args)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_supported_architectures_pass(make_args, tiny_model, arch):
    assert make_args(harli_finetune="on", model_path=tiny_model(arch)).harli_options().enabled


# ------------------------------------------------------------------ version and hello
def test_a_served_name_with_a_colon_is_refused_before_the_model_is_looked_at(make_args):
    with pytest.raises(SystemExit, match=r"'a:b' holds a colon.*: give --served-model-name a-b"):
        make_args(harli_tpot_slo_ms=5.0, served_model_name="a:b")
    with pytest.raises(
        SystemExit, match=r"--model-path '/m/a:b' holds a colon.*: give --served-model-name a-b"
    ):
        make_args(harli_tpot_slo_ms=5.0, model_path="/m/a:b")


def test_another_sglang_is_refused_where_harli_was_asked_for(monkeypatch, caplog):
    import sglang.version

    from sglang_harli import plugin

    monkeypatch.setattr(sglang.version, "__version__", "0.5.99")
    monkeypatch.setattr(plugin, "_done", set())
    for argv, env in ((["serve", "--harli-run-dir", "x"], ""), (["serve"], "1")):
        monkeypatch.setattr(sys, "argv", ["sglang", *argv])
        monkeypatch.setenv(SWITCH_ENV, env)
        with pytest.raises(SystemExit, match=r"supports sglang 0\.5\.23 and 0\.5\.16, and this is 0\.5\.99"):
            plugin.activate()
    monkeypatch.setattr(sys, "argv", ["sglang", "serve"])
    monkeypatch.delenv(SWITCH_ENV)
    plugin.activate()
    plugin.activate()
    warnings = [line for line in caplog.messages if "stays out of the way" in line]
    assert len(warnings) == 1, "not asked for: one warning, and nothing is replaced"
    assert plugin._done == {"version"}


@pytest.mark.parametrize(
    ("infos", "sentence"),
    [
        ([], "no scheduler reported"),
        ([{"status": "ready"}], "scheduler 0 runs without it"),
        ([{"harli": {"refusal": "q_proj is packed"}}], "q_proj is packed; serve without finetuning"),
        (
            [{"harli": {"refusal": "packed: --harli-finetune off serves"}}],
            "packed: --harli-finetune off serves$",
        ),
    ],
)
def test_a_server_whose_schedulers_lack_the_seam_stops(infos, sentence):
    with pytest.raises(SystemExit, match=sentence):
        check_hello(infos)


def test_a_hello_is_enough():
    check_hello([{"harli": {"version": "0.1.0", "refusal": None}}])


# ------------------------------------------------------------------ every row takes, in a process of its own
APPLIED = """
import json, os, pkgutil, sys
from sglang.srt.plugins import load_plugins
load_plugins(); load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_harli import plugin
heavy = [m for m in ("peft", "sglang_harli.managers.scheduler.scheduler") if m in sys.modules]
first = sorted(plugin._done)
import sglang as sgl
from sglang.srt.entrypoints import engine
args = engine.Engine.server_args_class(model_path=sys.argv[1], harli_tpot_slo_ms=25.0, skip_tokenizer_init=True)
main = sorted(HookRegistry._patched)
trainer = [m for m in ("peft", "sglang_harli.managers.scheduler.scheduler") if m in sys.modules]
plugin._register(row for row in plugin.TABLE if not row.main)  # what a scheduler process adds
HookRegistry.apply_hooks()
from sglang.srt.managers import scheduler
others = sorted(m for m in sys.modules if m.startswith("sglang_harli.sglang_versions." + sys.argv[2]))
print("\\n" + json.dumps(dict(first=first, main=main, all=sorted(HookRegistry._patched), heavy=heavy,
    trainer=trainer, others=others, elsewhere=[row.target for row in plugin.TABLE if not row.main], table=[row.target for row in plugin.TABLE], hooks=len(HookRegistry._hooks),
    scheduler=scheduler.Scheduler.__name__, args=type(args).__name__)))
"""


def test_the_whole_table_is_applied(tiny_model):
    mine, other = supported.folder(), "pinned" if supported.folder() == "newest" else "newest"
    # Whatever the environment says: the variable is for processes that cannot look.
    environment = dict(os.environ) | {
        supported.VERSION_ENV: next(v for v, name in supported.FOLDERS.items() if name != mine)
    }
    engine.turn_on(environment, path=[])
    done = subprocess.run(
        [sys.executable, "-c", APPLIED, tiny_model(), other],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["first"] == ["sglang.srt.server_args.ServerArgs"], "without an option, nothing else"
    assert seen["others"] == [], "files of another version"
    assert not seen["heavy"]
    assert not seen["trainer"], "the main process needs no trainer"
    assert set(seen["table"]) <= set(seen["all"])
    assert set(seen["table"]) - set(seen["main"]) == set(seen["elsewhere"])
    assert "sglang.srt.managers.scheduler.Scheduler" in seen["elsewhere"]
    assert len(seen["all"]) == seen["hooks"], "some hook could not be applied"
    assert (seen["scheduler"], seen["args"]) == ("HarliScheduler", "HarliServerArgs")


OFF = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.entrypoints import engine
from sglang_harli import plugin
engine.Engine.server_args_class(model_path=sys.argv[1], harli_finetune="off", skip_tokenizer_init=True)
assert {row.target for row in plugin.TABLE if row.always} == {row.target for row in plugin.TABLE} & set(HookRegistry._patched)
print("applied", sum(row.always for row in plugin.TABLE))
"""


def test_with_finetuning_off_only_the_rows_that_say_so_are_applied(tiny_model):
    environment = dict(os.environ)
    engine.turn_on(environment, path=[])
    done = subprocess.run(
        [sys.executable, "-c", OFF, tiny_model()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "applied 2"


def test_the_launcher_refuses_another_sglang_in_one_sentence(tiny_model, tmp_path):
    """Before anything that another version may not have is imported; whatever the environment
    says."""
    metadata = tmp_path / "sglang-0.5.99.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.99\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ) | {supported.VERSION_ENV: supported.NEWEST, "PYTHONPATH": path}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sglang_harli.launch_server",
            "--model-path",
            tiny_model(),
            "--device=cpu",
            "--port=0",
        ],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert (
        f"harli supports sglang {' and '.join(supported.SUPPORTED)}, and this is 0.5.99: "
        f"pip install sglang=={supported.NEWEST}, or start SGLang itself" in done.stderr
    )
    assert "Traceback" not in done.stderr
