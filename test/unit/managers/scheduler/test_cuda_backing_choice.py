"""Which backing holds the pool's memory: by name, by the device, by the attention back end."""

from __future__ import annotations

import re

import pytest

from sglang_harli.errors import ConfigError
from sglang_harli.managers.scheduler.memory.backing_choice import Choice, choose
from sglang_harli.mem_cache.backing.stray_reads import MASKED


def never() -> str | None:
    raise AssertionError("the device was tried out for nothing")


def works() -> str | None:
    return None


def refuses() -> str | None:
    return "cuMemMap answered CUDA_ERROR_NOT_PERMITTED: set HARLI_POOL_BACKING=static"


TRITON, BOTH = ["triton", "triton"], ["fa3", "flashinfer"]


@pytest.mark.parametrize(
    ("asked", "device", "attention", "refusal", "name", "why"),
    [
        (None, "cpu", ["torch_native"] * 2, never, "host", "the CPU engine's"),
        ("host", "cpu", TRITON, never, "host", "the CPU engine's"),
        ("static", "cpu", TRITON, never, "static", "HARLI_POOL_BACKING=static"),
        ("static", "cuda", TRITON, never, "static", "HARLI_POOL_BACKING=static"),
        (None, "cuda", TRITON, works, "aliased", "attention by triton masks reads"),
        ("", "cuda", BOTH, works, "aliased", "attention by fa3 and flashinfer masks"),
        (None, "cuda", ["trtllm_mha"] * 2, works, "remapped", "by trtllm_mha masks reads .* is not known"),
        (None, "cuda", ["fa3", "fa4"], works, "remapped", "by fa4 masks"),
        (None, "cuda", [None, None], works, "remapped", "by an unnamed one masks"),
        ("remapped", "cuda", TRITON, works, "remapped", "HARLI_POOL_BACKING=remapped"),
        ("aliased", "cuda", ["fa4", "fa4"], works, "aliased", "HARLI_POOL_BACKING=aliased"),
        (None, "cuda", TRITON, refuses, "static", "memory cannot be mapped here: cuMemMap answered"),
        ("aliased", "cuda", TRITON, refuses, "static", "memory cannot be mapped here: cuMemMap answered"),
    ],
)
def test_the_choice_and_its_reason(asked, device, attention, refusal, name, why):
    found = choose(asked, device, attention, refusal)
    assert isinstance(found, Choice) and found.name == name
    assert re.search(why, found.why), found.why


@pytest.mark.parametrize(
    ("asked", "device", "match"),
    [
        ("cuda", "cuda", "HARLI_POOL_BACKING=cuda: accepted are host, aliased, remapped, static, off"),
        ("aliased", "cpu", "needs a GPU; on a CPU: host, static, off"),
        ("remapped", "cpu", "needs a GPU"),
        ("host", "cuda", "is for the CPU engine; on a GPU: aliased, remapped, static, off"),
    ],
)
def test_what_does_not_exist_here_is_refused_by_name(asked, device, match):
    with pytest.raises(ConfigError, match=match):
        choose(asked, device, TRITON, works)


def test_each_back_end_says_where_it_was_read():
    assert set(MASKED) == {"triton", "fa3", "flashinfer"}
    for name, masked in MASKED.items():
        assert masked.kernels and masked.keys and masked.values, name
