"""Values that clients give: converted, or refused with name, value and bounds, in the same words on
both ends."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli import architectures
from sglang_harli.errors import ConfigError, ProtocolError
from sglang_harli.protocol import accepted, public
from sglang_harli.protocol.calls import messages
from sglang_harli.protocol.public import Hyperparameters, parse_hyperparameters
from sglang_harli.service.endpoint import live_options

# name: (what a refusal says is accepted, some values that are not)
REFUSED: dict[str, tuple[str, list[Any]]] = {
    "n_epochs": ("1 to 10,000", ["auto", "0", 0, -1, 10_001, True, None, [3], "1e400", 10**30]),
    "learning_rate": ("above 0, at most 10", ["auto", 0, -1e-9, "nan", "inf", 10.1, {}, 10**400]),
    "lr_scheduler": ("one of linear, cosine, constant", ["Linear", "", 3, None, "polynomial"]),
    "warmup_ratio": ("0 to 1", ["5%", -0.1, 1.01, "-inf"]),
    "batch_size": ("1 to 4,096", ["auto", 0, 4097, 2**63, 2**64]),
    "gradient_accumulation_steps": ("1 to 4,096", [0, 4097, "many"]),
    "lora_r": ("1 to 1,024", [0, 1025, "r16"]),
    "lora_alpha": ("above 0, at most 65,536", [0, 65_537, "inf", "two"]),
    "lora_dropout": ("0 or more, below 1", [1, -0.1, "none"]),
    "use_rslora": ("true or false", ["yes please", 2, None, 0.5]),
    "max_seq_length": ("2 to 10,000,000 or none", ["auto", 1, 10**30, str(10**30), 10_000_001]),
    "weight_decay": ("0 to 10", [-1, 11, "nan", "inf"]),
    "max_grad_norm": ("0 to 1,000,000,000", ["inf", float("inf"), float("nan"), -1, "auto", 1e30, None]),
    "checkpoint_every": ("0 to 1,000,000,000", ["100000000000000000000", 2**64, 10**30, -1, "never"]),
    "seed": ("0 to 9,223,372,036,854,775,807", [-1, 2**63, 2**64, "lucky", "1" * 400]),
    "on_overflow": ("one of error, truncate, drop", ["ignore", 1, None]),
    "eval_steps": ("0 to 1,000,000,000 or none", [-1, "always", 10**10]),
    "eval_rows": ("1 to 1,000,000,000 or none", [0, "some", 10**10]),
    "validation_split": ("0 to 0.5", [-0.1, 0.51, "half", "nan"]),
    "early_stopping_patience": ("1 to 1,000,000 or none", [0, "soon", 10**7]),
    "early_stopping_min_delta": ("0 to 1,000,000", [-1, "inf", "nan", 10**7]),
    "publish_best": ("true or false", ["yes please", 2, None]),
    "target_modules": (
        "one or more of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, each once, or all",
        ["q_proj, v_proj", "", [], ["lm_head"], "q_proj,q_proj", 7, None, [["q_proj"]]],
    ),
}
CASES = [(name, text, value) for name, (text, values) in REFUSED.items() for value in values]


def test_every_hyperparameter_is_tried():
    assert set(REFUSED) == set(Hyperparameters.__struct_fields__)


@pytest.mark.parametrize(("name", "text", "value"), CASES)
def test_a_refusal_names_hyperparameter_value_and_bounds(name, text, value):
    with pytest.raises(ConfigError) as caught:
        parse_hyperparameters({name: value})
    shown = repr(value)
    assert caught.value.message.startswith(f"{name}={shown[:60]}")
    assert caught.value.message.endswith(f" is not accepted: give {text}")
    assert caught.value.param == name
    assert caught.value.code == "invalid_value"


def test_auto_and_fractions_in_full():
    for value, text in (("auto", "n_epochs='auto'"), ("0", "n_epochs='0'"), (0, "n_epochs=0")):
        with pytest.raises(ConfigError) as caught:
            parse_hyperparameters({"n_epochs": value})
        assert caught.value.message == f"{text} is not accepted: give 1 to 10,000"
    for value in (1.5, "1.5"):
        with pytest.raises(ConfigError, match="give a whole number, 1 to 10,000"):
            parse_hyperparameters({"n_epochs": value})


def test_what_people_write_is_read():
    texts = {
        "n_epochs": "3.0",
        "batch_size": "1e1",
        "learning_rate": "1e-4",
        "use_rslora": "True",
        "seed": "0",
    }
    found = parse_hyperparameters({**texts, "max_seq_length": "None", "target_modules": "all"})
    assert (found.n_epochs, found.batch_size, found.learning_rate) == (3, 10, 1e-4)
    assert (found.use_rslora, found.seed, found.max_seq_length) == (True, 0, None)
    assert found.target_modules == architectures.ALL_LINEAR
    assert parse_hyperparameters({"target_modules": "v_proj,q_proj"}).target_modules == ("v_proj", "q_proj")


NUMBERS = st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.binary(max_size=4))


@given(st.sampled_from(sorted(REFUSED)), NUMBERS)
def test_any_value_is_converted_or_refused(name, value):
    try:
        found = parse_hyperparameters({name: value})
    except ConfigError as error:
        assert error.param == name
    else:  # it survives the wire, the store and the way to the scheduler
        plain = json.loads(public.encode(found))
        assert parse_hyperparameters(plain) == found
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=Hyperparameters) == found


def test_jobs_stored_with_values_beyond_the_bounds_of_today_stay_readable():
    stored = {"checkpoint_every": 10**12, "max_grad_norm": 1e12, "max_seq_length": 10**9}
    found = msgspec.json.decode(json.dumps(stored), type=Hyperparameters)
    assert found.checkpoint_every == 10**12
    with pytest.raises(ConfigError, match="max_seq_length=1000000000 is not accepted"):
        found.check()


# ------------------------------------------------------------------ arguments of a request
@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (public.ListArgs, {"limit": 0}, "limit=0 is not accepted: give 1 to 10,000"),
        (public.ListArgs, {"limit": 10**30}, f"limit={10**30} is not accepted: give 1 to 10,000"),
        (public.ListArgs, {"status": 5}, "status=5 is not accepted: give a text or none"),
        (public.JobArgs, {"job": "caf\udce9"}, r"job='caf\udce9' is not accepted: give a text in UTF-8"),
        (
            public.PrioritizeArgs,
            {"job": "x", "priority": 101},
            "priority=101 is not accepted: give -100 to 100",
        ),
        (public.EventsArgs, {"job": "x", "after": -1}, "after=-1 is not accepted: give 0 or more"),
        (public.SetArgs, {"values": {}, "if_revision": 1.5}, "give a whole number, an integer or none"),
        (public.SubmitArgs, {"suffix": "no spaces"}, "give 1 to 40 of A-Z a-z 0-9 . _ - beginning with"),
        (public.SubmitArgs, {"idempotency_key": "k" * 129}, "give a text of 1 to 128 characters or none"),
        (
            public.UploadArgs,
            {"upload": "x", "size": 1, "sha256": "0" * 64, "offset": 0},
            "give 32 hex digits",
        ),
    ],
)
def test_a_client_and_the_service_refuse_an_argument_with_the_same_words(kind, values, says):
    with pytest.raises(ConfigError) as before_sending:
        messages.header("verb", kind(**values))
    with pytest.raises(ProtocolError) as at_the_service:
        public.convert_args(values, kind)
    assert before_sending.value.message == at_the_service.value.message
    assert says in before_sending.value.message
    assert before_sending.value.param == at_the_service.value.param


def test_unknown_and_missing_arguments_are_named():
    with pytest.raises(ProtocolError, match="unknown argument 'more'; accepted: job") as caught:
        public.convert_args({"job": "x", "more": 1}, public.JobArgs)
    assert caught.value.param == "more"
    with pytest.raises(ProtocolError, match="job is missing: give a text"):
        public.convert_args({}, public.JobArgs)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ConfigError) as caught:
        parse_hyperparameters({"n_epochs": "9" * 100_000})
    assert len(caught.value.message) < 200 and "(100,002 characters)" in caught.value.message
    with pytest.raises(ConfigError) as caught:
        parse_hyperparameters({"n" * 100_000: 1})
    assert len(caught.value.message) < 600
    with pytest.raises(ConfigError, match="tpot"):
        live_options.check({"x" * 100_000: 1.0})


def test_wording():
    assert accepted.wording(public.Priority) == "-100 to 100"
    assert accepted.wording(bool) == "true or false"
    assert accepted.wording(float | None) == "a number or none"
