"""Which backing may lend memory that a transport writes into: transport by backing."""

from __future__ import annotations

import pytest

from sglang_harli.errors import ConfigError
from sglang_harli.managers.scheduler.memory.backing_choice import ACCEPTED, OFF, choose
from sglang_harli.managers.scheduler.memory.registered_memory import ALL, NONE, transport_of

TRITON = ["triton", "triton"]
TCP = {"MC_FORCE_TCP": "1"}
FREE = [
    ("null", "mooncake", {}),
    ("null", "nixl", {}),
    ("prefill", "mooncake", {}),  # it lends nothing
    ("decode", "fake", {}),
    ("decode", "mooncake_tcp", {}),
    ("decode", "mooncake", TCP),
]
PINNED = [
    ("decode", "mooncake", {}),
    ("decode", "mooncake", {"MC_FORCE_TCP": "0"}),
    ("decode", "mooncake", {"MC_FORCE_TCP": "true"}),  # read by mooncake's library, perhaps
    ("decode", "nixl", {}),
    ("decode", "nixl", TCP),  # another library's variable
    ("decode", "mori", {}),
    ("decode", "ascend", {}),
    ("decode", "one of tomorrow", {}),
]


def works() -> str | None:
    return None


def test_every_backing_that_lends_has_its_column():
    assert {*ALL, OFF} == set(ACCEPTED)


@pytest.mark.parametrize(("mode", "backend", "environment"), FREE)
def test_where_nothing_is_pinned_every_backing_may_lend(mode, backend, environment):
    transport = transport_of(mode, backend, environment)
    assert transport.backings == ALL
    assert choose(None, "cpu", TRITON, works, transport).name == "host"
    assert choose(None, "cuda", TRITON, works, transport).name == "aliased"
    assert choose("remapped", "cuda", TRITON, works, transport).name == "remapped"


@pytest.mark.parametrize(("mode", "backend", "environment"), PINNED)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_pages_are_pinned_only_static_memory_lends(mode, backend, environment, device):
    transport = transport_of(mode, backend, environment)
    assert transport.backings == ("static",)
    found = choose(None, device, TRITON, works, transport)
    assert found.name == "static" and backend in found.why and "pin" in found.why
    assert choose("static", device, TRITON, works, transport).name == "static"


@pytest.mark.parametrize(("mode", "backend", "environment"), PINNED)
@pytest.mark.parametrize("asked", ["host", "aliased", "remapped"])
def test_another_one_is_refused_by_name(mode, backend, environment, asked):
    transport = transport_of(mode, backend, environment)
    with pytest.raises(ConfigError) as refusal:
        choose(asked, "cpu" if asked == "host" else "cuda", TRITON, works, transport)
    text = refusal.value.message
    assert f"HARLI_POOL_BACKING={asked}" in text and backend in text and "Accepted: static, off" in text
    assert "mooncake_tcp" in text  # the way to have it


def test_a_server_without_a_pair_has_no_transport():
    assert transport_of("null", "mooncake", TCP) is NONE
