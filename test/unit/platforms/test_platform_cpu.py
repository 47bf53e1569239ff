"""Which device a server takes, and which processes get the stand-in for sgl_kernel on their
path."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from sglang_harli.errors import ConfigError
from sglang_harli.platforms.cpu import defaults, engine
from sglang_harli.platforms.device import choose_device

H100, NO_CUDA = (lambda: "H100"), (lambda: None)
CPU_ENV = {"SGLANG_USE_CPU_ENGINE": "1"}


@pytest.mark.parametrize(
    ("argv", "environ", "cuda", "device", "reason"),
    [
        ([], {}, H100, "cuda", "torch sees H100"),
        ([], {}, NO_CUDA, "cpu", "torch sees no CUDA device"),
        (["--device", "cpu"], {}, H100, "cpu", "--device cpu was given"),
        (["--device=cuda:1"], {}, H100, "cuda", "torch sees H100"),
        (["--device", "xpu"], {}, NO_CUDA, "xpu", "--device xpu was given"),
        ([], CPU_ENV, H100, "cpu", "SGLANG_USE_CPU_ENGINE=1 is set"),
        (["--device", "cpu"], CPU_ENV, H100, "cpu", "--device cpu was given"),
    ],
)
def test_the_device_and_its_reason(argv, environ, cuda, device, reason):
    choice = choose_device(argv, environ, cuda)
    assert (choice.device, choice.reason) == (device, reason)
    assert choice.cpu_engine == (device == "cpu")
    assert reason in str(choice)


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (["--device", "cuda"], {}, "torch sees no CUDA device; drop the option"),
        (["--device", "cuda"], CPU_ENV, "contradicts SGLANG_USE_CPU_ENGINE=1"),
    ],
)
def test_impossible_devices_are_refused(argv, environ, message):
    with pytest.raises(ConfigError, match=message):
        choose_device(argv, environ, NO_CUDA)


def test_the_device_in_a_config_file_is_respected_and_the_command_line_comes_first(tmp_path):
    config = tmp_path / "server.yaml"
    config.write_text("device: cpu\nport: 1\n")
    assert choose_device(["--config", str(config)], {}, H100).device == "cpu"
    assert choose_device(["--config", str(config), "--device", "cuda"], {}, H100).device == "cuda"


def test_turning_the_engine_on_puts_the_stand_in_first_once():
    folder = str(engine.STAND_IN)
    environ, path = {"PYTHONPATH": f"/a{os.pathsep}{folder}{os.pathsep}/b"}, ["/x"]
    for _ in range(2):
        engine.turn_on(environ, path)
    assert environ["PYTHONPATH"].split(os.pathsep) == [folder, "/a", "/b"]
    assert path == [folder, "/x"]
    assert engine.is_on(environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_stand_in_is_on_nobodys_path_otherwise():
    environ: dict[str, str] = {"HOME": "/h"}
    assert not engine.is_on(environ)
    engine.turn_on(environ, [])
    assert "PYTHONPATH" not in engine.without_stand_in(environ)
    assert engine.without_stand_in({**environ, "PYTHONPATH": f"{engine.STAND_IN}:/a"})["PYTHONPATH"] == "/a"


@pytest.mark.parametrize(
    ("budget", "per_token", "context", "tokens"),
    [
        (2**30, 256, 1024, defaults.KV_POOL_TOKENS),  # a tiny model: no millions of slots
        (2**30, 131_072, 8192, 8192),  # an 8B model: what 1 GiB holds
        (2**30, 256, 1_000_000, 1_000_001),  # one request of full length fits where it is affordable
        (2**20, 131_072, 8192, defaults.KV_POOL_MIN_TOKENS),
    ],
)
def test_the_kv_pool_is_bounded_by_memory_and_by_use(budget, per_token, context, tokens):
    assert defaults.pool_tokens(budget, per_token, context) == tokens


def test_the_operators_own_limits_stand():
    unread = pytest.fail  # the model's config is not needed
    given = SimpleNamespace(mem_fraction_static=0.5, max_total_tokens=None)
    assert defaults.kv_pool(given, unread) == []
    chosen = defaults.kv_pool(SimpleNamespace(mem_fraction_static=None, max_total_tokens=99), unread)
    assert [name for name, _, _ in chosen] == ["mem_fraction_static"]
