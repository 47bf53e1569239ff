"""Small parts of the service on their own: acknowledgements, admission, leftovers, what `set`
accepts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.config import LIVE, LIVE_MS, contradiction
from sglang_harli.errors import ConfigError, UnsupportedError
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.endpoint import live_options, router
from sglang_harli.service.jobs import admission
from sglang_harli.service.submit.submission import remove_leftovers
from support.service.service_peers import limits


def test_targets_that_are_not_served_are_named():
    with pytest.raises(
        ConfigError, match="up_proj, down_proj not accepted: this server serves q_proj, v_proj"
    ):
        admission.check_hyperparameters(
            Hyperparameters(target_modules=("q_proj", "up_proj", "down_proj")),
            limits(lora_target_modules=("q_proj", "v_proj")),
        )


def test_the_memory_budget_says_what_to_lower():
    tight = limits(train_memory_bytes=4 << 20)
    hp = Hyperparameters(batch_size=64)
    largest = tight.largest_batch(hp, 100)
    fits = rf"batch_size {largest} or less fits \(now 64\).*longest row: 100 tokens.*--harli-max-train-mem"
    with pytest.raises(ConfigError, match=fits) as caught:
        admission.check_data(hp, 100, 1, 64, tight)
    assert caught.value.code == "memory_budget" and 0 < largest < 64
    admission.check_data(Hyperparameters(batch_size=largest), 100, 1, 64, tight)
    admission.check_data(
        Hyperparameters(batch_size=4096), 100, 1, largest, tight
    )  # only as many rows as there are
    with pytest.raises(ConfigError, match=rf"batch_size {largest} or less fits"):
        admission.check_data(Hyperparameters(batch_size=4096), 100, 1, largest + 1, tight)
    with pytest.raises(ConfigError, match="not even batch_size 1 fits"):
        admission.check_data(hp, 100, 1, 64, limits(train_memory_bytes=1 << 16))
    admission.check_data(Hyperparameters(batch_size=1, lora_r=1), 4, 1, 64, limits())


@pytest.mark.parametrize(
    ("overflow", "mend"),
    [
        ("error", "shorten it, or submit with on_overflow=truncate or on_overflow=drop"),
        ("truncate", "submit it again, and on_overflow=truncate applies to it"),
        ("drop", "submit it again, and on_overflow=drop applies to it"),
    ],
)
def test_a_row_over_a_limit_that_was_learnt_later(overflow, mend):
    """Advice that was followed already is not given again."""
    hp = Hyperparameters(on_overflow=overflow)
    with pytest.raises(ConfigError, match=r"line 7 has 9000 tokens and the model's limit is \d+: ") as caught:
        admission.check_data(hp, 9000, 7, 4, limits())
    assert caught.value.message.endswith(mend)


def test_data_of_another_vocabulary():
    admission.check_vocabulary(399, limits())
    with pytest.raises(UnsupportedError, match="ids up to 400"):
        admission.check_vocabulary(400, limits())


def test_leftovers_of_a_crash_go_and_jobs_stay(tmp_path):
    for name in (".incoming-ftjob-a", "ftjob-unknown", "ftjob-known", "ftjob-lost", "mine"):
        (tmp_path / name / "data").mkdir(parents=True)
    (tmp_path / "ftjob-lost" / "job.json").write_text("{}")
    remove_leftovers(tmp_path, {"ftjob-known"})
    assert {p.name for p in tmp_path.iterdir()} == {"ftjob-known", "ftjob-lost", "mine"}


@pytest.mark.parametrize("values", [{}, {"run_dir": 1.0}, {"tpot_slo_ms": None}, {"tpot_slo_ms": 0.0}])
def test_what_cannot_be_set(values):
    with pytest.raises(ConfigError):
        live_options.check(values)


def test_what_can_be_set_and_what_contradicts_itself():
    live_options.check(dict.fromkeys(LIVE_MS, 25.0) | {"max_train_mem": "1GiB"})
    live_options.check(dict.fromkeys(LIVE[1:]))
    assert contradiction(max_itl_ms=40.0, tpot_slo_ms=50.0)
    assert contradiction(max_itl_ms=None, tpot_slo_ms=50.0) is None


@given(st.binary(max_size=100))
def test_any_header_has_an_id_or_none(header):
    assert [type(value) for value in router.peek(header)] == [str, str]
