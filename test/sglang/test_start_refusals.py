"""What only one version of SGLang has and finetuning does not work with: refused at start, or shown
to be without effect."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_harli.errors import UnsupportedError
from sglang_harli.managers.http.start_up.refusals import refuse_flags
from sglang_harli.managers.scheduler.scheduler import HarliScheduler
from sglang_harli.sglang_versions.current import arguments
from support.model_runner import NEWEST
from support.plain_arguments import plain_arguments

newest = pytest.mark.skipif(not NEWEST, reason="SGLang 0.5.16 does not have it")


def given(**fields: Any) -> Any:
    args = plain_arguments(served_model_name="base", device="cpu", model_path="/models/base", **fields)
    return arguments.in_force(args)


def test_plain_arguments_are_not_refused() -> None:
    refuse_flags(given())


@newest
def test_the_http_server_in_rust_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    args = given()
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(UnsupportedError, match=r"SGLANG_RUST_SERVER=1 .*Rust.* --harli-finetune off"):
        refuse_flags(args)


@pytest.mark.skipif(NEWEST, reason="SGLang 0.5.23 has no torchao")
def test_torchao_is_refused_by_its_flag() -> None:
    with pytest.raises(UnsupportedError, match="--torchao-config"):
        refuse_flags(given(torchao_config="int8wo"))


# ------------------------------------------------------------------ a switch of roles
@newest
def test_a_server_that_may_become_a_prefill_server_is_refused() -> None:
    refuse_flags(given(disaggregation_mode="decode"))
    with pytest.raises(UnsupportedError, match="--enable-pd-role-switch"):
        refuse_flags(given(disaggregation_mode="decode", enable_pd_role_switch=True))


@newest
def test_without_that_flag_sglang_switches_no_roles() -> None:
    from sglang.srt.disaggregation.role_switch import handle_pd_role_switch
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.managers.io_struct import PdRoleSwitchReqInput

    scheduler = SimpleNamespace(
        disaggregation_mode=DisaggregationMode.DECODE,
        server_args=SimpleNamespace(enable_pd_role_switch=False),
        _pd_role_switch_unhealthy=False,
        _pd_role_switch_in_progress=False,
    )
    answer = handle_pd_role_switch(scheduler, PdRoleSwitchReqInput(new_role="prefill"))  # type: ignore[arg-type]
    assert not answer.success and "--enable-pd-role-switch is not set" in answer.message


@newest
def test_what_ends_the_loop_of_sglangs_scheduler_comes_through_ours() -> None:
    from sglang.srt.disaggregation.role_switch import PdRoleSwitchRestart

    given(enable_pd_role_switch=True)
    scheduler = HarliScheduler.__new__(HarliScheduler)
    scheduler.waiting_queue = []
    scheduler.session_controller = SimpleNamespace(maybe_reap=lambda now: None)  # type: ignore[assignment]
    scheduler.flush_wrapper = SimpleNamespace(check_pending=lambda: None)  # type: ignore[assignment]
    scheduler.external_corpus_manager = None
    scheduler.scheduler_stage_metrics = None  # type: ignore[assignment]
    scheduler._event_loop_should_restart = True
    with pytest.raises(PdRoleSwitchRestart):
        scheduler.process_input_requests([])
    scheduler.process_input_requests([])  # it is said once
