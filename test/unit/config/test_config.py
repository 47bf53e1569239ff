"""HarliOptions: defaults, checks that name the flag, derived bounds, and what travels."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.config import (
    LIVE,
    LIVE_MS,
    SWITCHED,
    HarliOptions,
    ServiceConfig,
    parse_live,
    parse_size,
)
from sglang_harli.errors import ConfigError

MIB, GIB = 2**20, 2**30
milliseconds = st.floats(min_value=0.01, max_value=3_600_000)


def test_the_defaults_are_accepted():
    options = HarliOptions()
    assert options.enabled
    assert (options.tpot_slo_ms, options.busy_quantum_ms, options.idle_quantum_ms) == (50.0, 100.0, 250.0)
    assert options.logits_bytes("cpu") == 64 * MIB and options.logits_bytes("cuda") == 512 * MIB


@pytest.mark.parametrize(
    ("values", "accepted"),
    [
        ({"finetune": "yes"}, "one of on, off"),
        ({"overlap": "maybe"}, "one of auto, on, off"),
        ({"tpot_slo_ms": 0.0}, "milliseconds above 0"),
        ({"tpot_slo_ms": float("nan")}, "milliseconds above 0"),
        ({"ttft_slo_ms": -1.0}, "milliseconds above 0"),
        ({"max_itl_ms": float("inf")}, "milliseconds above 0"),
        ({"max_quantum_ms": 4e6}, "at most 3,600,000"),
        ({"quantum_rows": 0}, "at least 1"),
        ({"quantum_rows": 10**30}, "at most 1,000,000"),
        ({"keep_checkpoints": 0}, "at least 1"),
        ({"keep_checkpoints": 10**400}, "at most 1,000,000"),
        ({"tpot_slo_ms": 10**400}, "at most 3,600,000"),
        ({"finetune_endpoint": "tcp://0.0.0.0:30100"}, "loopback only"),
        ({"finetune_endpoint": "tcp://127.0.0.1:70000"}, "loopback only"),
        ({"finetune_endpoint": "tcp://::1:30100"}, r"in brackets: tcp://\[::1\]:30100"),
        ({"finetune_endpoint": "tcp://fe80::2:1:80", "curve_keys": "k"}, r"tcp://\[fe80::2:1\]:80"),
        (
            {"finetune_endpoint": "ipc://" + "/s" * 54},
            r"at most 107 bytes behind ipc:// \(this one has 108\)",
        ),
        ({"finetune_endpoint": "ipc:///" + "ü" * 60}, r"\(this one has 121\)"),
        ({"run_dir": ""}, "a folder"),
        ({"tpot_slo_ms": "fast"}, "milliseconds above 0"),
        ({"max_train_mem": "lots"}, "a size such as"),
        ({"max_train_mem": -1.0}, "a size such as"),
        ({"train_reserve": "1KiB"}, "at least 1MiB"),
        ({"prefix_keep": 1.5}, "a share from 0 to 1"),
        ({"prefix_keep": float("nan")}, "a share from 0 to 1"),
        ({"logits_mem": "1KiB"}, "at least 1MiB"),
        ({"logits_mem": "9" * 20 + "GiB"}, "at most 1073741824GiB"),
        ({"logits_mem": "9" * 400}, "a size such as"),
        ({"logits_mem": "inf"}, "a size such as"),
        ({"kernels": "fast"}, "auto, on, off, or family=one of them"),
        ({"kernels": "heads=off"}, "families: head, gated, norm, rotary, lora"),
        ({"kernels": "head=off,head=on"}, "by commas"),
        ({"kernels": ""}, "auto, on, off"),
    ],
)
def test_a_bad_value_names_the_flag_and_what_is_accepted(values, accepted):
    flag = "--harli-" + next(iter(values)).replace("_", "-")
    with pytest.raises(ConfigError, match=accepted) as caught:
        HarliOptions(**values)
    assert flag in str(caught.value)
    assert caught.value.param == flag


@pytest.mark.parametrize(
    "endpoint",
    [
        *("tcp://127.0.0.1:1", "tcp://localhost:30100", "tcp://[::1]:30100"),
        *("ipc:///run/harli.sock", "ipc://@abstract", "ipc:///" + "s" * 106),
    ],
)
def test_loopback_endpoints(endpoint):
    assert HarliOptions(finetune_endpoint=endpoint).finetune_endpoint == endpoint


@pytest.mark.parametrize(
    ("values", "busy", "idle"),
    [
        ({"tpot_slo_ms": 20.0}, 40.0, 250.0),
        ({"tpot_slo_ms": 20.0, "max_itl_ms": 30.0}, 30.0, 250.0),
        ({"ttft_slo_ms": 100.0}, 50.0, 50.0),
        ({"ttft_slo_ms": 2000.0}, 100.0, 250.0),
        ({"max_quantum_ms": 7.0, "max_itl_ms": 3.0}, 7.0, 250.0),
        ({"max_idle_quantum_ms": 900.0, "ttft_slo_ms": 100.0}, 50.0, 900.0),
    ],
)
def test_bounds_of_a_quantum(values, busy, idle):
    options = HarliOptions(**values)
    assert (options.busy_quantum_ms, options.idle_quantum_ms) == (busy, idle)


def test_kernels_are_switched_together_or_by_family():
    assert HarliOptions(kernels="off").kernel_switches == dict.fromkeys(SWITCHED, "off")
    some = HarliOptions(kernels="head=off, lora=on").kernel_switches
    assert some == {**dict.fromkeys(SWITCHED, "auto"), "head": "off", "lora": "on"}


@given(st.builds(HarliOptions, tpot_slo_ms=milliseconds, quantum_rows=st.none() | st.integers(1, 64)))
def test_options_survive_the_way_to_the_service(options):
    assert HarliOptions.from_json(options.to_json()) == options
    config = ServiceConfig(options=options, model_path="/m", tokenizer_path="/t", served_model_name="n")
    assert ServiceConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * MIB),
        ("1.5gb", 1_500_000_000),
        (" 2 GiB ", 2 * GIB),
        ("1048576", MIB),
        ("3kb", 3000),
        ("0.1GiB", GIB // 10),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1MiB", "1 TiB x", "nan", "1e3", "9" * 400, "9" * 9000, "\u0663MiB"]
)
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_a_size_that_no_machine_has():
    with pytest.raises(ConfigError, match="at most 1073741824GiB"):
        parse_size("2000000000GiB")


def test_what_may_be_lent_and_what_stays_outside_the_pool():
    assert HarliOptions().max_train_bytes is None
    assert HarliOptions(max_train_mem="3MiB").max_train_bytes == 3 * MIB
    assert (HarliOptions().reserve_bytes(cpu=True), HarliOptions().reserve_bytes(cpu=False)) == (
        256 * MIB,
        GIB,
    )
    assert HarliOptions(train_reserve="2MiB").reserve_bytes(cpu=False) == 2 * MIB


def test_without_a_pool_to_lend_the_training_budget_is_a_share_unless_given():
    assert HarliOptions().train_bytes(100 * GIB, cpu=False) == 10 * GIB
    assert HarliOptions().train_bytes(200 * GIB, cpu=True) == 8 * GIB
    assert HarliOptions(max_train_mem="3GiB").train_bytes(GIB, cpu=True) == 3 * GIB


@pytest.mark.parametrize("name", LIVE)
def test_live_options_are_options_and_parse(name):
    assert name in {field.name for field in dataclasses.fields(HarliOptions)}
    text, value = ("12.5", 12.5) if name in LIVE_MS else ("512MiB", "512MiB")
    assert parse_live(name.replace("_", "-"), text) == (name, value)


def test_live_options_that_are_not_accepted():
    assert parse_live("ttft-slo-ms", "none") == ("ttft_slo_ms", None)
    with pytest.raises(ConfigError, match="accepted: tpot-slo-ms"):
        parse_live("run-dir", "x")
    with pytest.raises(ConfigError, match="a number of milliseconds"):
        parse_live("tpot-slo-ms", "none")
    for text in ("-2", "0", "inf", "nan", "9" * 400, "fast", "caf\udce9"):
        with pytest.raises(ConfigError, match="a number of milliseconds above 0 and at most 3,600,000"):
            parse_live("max-itl-ms", text)
    assert parse_live("max-train-mem", "None") == ("max_train_mem", None)
    with pytest.raises(ConfigError, match="--harli-max-train-mem 'much' is not accepted: give a size"):
        parse_live("max-train-mem", "much")
