"""Stop patterns of clients: found where SGLang finds them, and none keeps the decode loop."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

LETTERS = SimpleNamespace(
    decode=lambda ids: "".join(chr(97 + token) for token in ids),
    encode=lambda text, **_: [ord(letter) - 97 for letter in text],
)


def request(text: str, **params: Any) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=1000, **params)
    sampling.normalize(LETTERS)
    made = Req("r", "", array("q", [1]), sampling, vocab_size=100)
    made.tokenizer, made.decoded_text = LETTERS, ""
    made.output_ids = array("q", [ord(letter) - 97 for letter in text])
    return made


def plainly(text: str, accepted: int, **params: Any) -> Any:
    """What SGLang's own method finds."""
    from sglang.srt.managers.schedule_batch import Req

    original = Req._check_str_based_finish.__wrapped__
    made = request(text, **params)
    return original(made, accepted), reason(made)


def reason(made: Any) -> Any:
    found = made.finished_reason
    return None if found is None else (found.to_json(), made.finished_len)


@pytest.mark.parametrize("accepted", [1, 3])
@pytest.mark.parametrize(
    "params",
    [
        {"stop_regex": "c+d"},
        {"stop_regex": ["zz", "[b-d]{2}"]},
        {"stop_regex": "zz", "stop": ["cd"]},
        {"stop_regex": "(?i)CD$"},
        {"stop_regex": "zz"},
        {"stop": ["zz"]},
    ],
)
@pytest.mark.parametrize("text", ["ab", "abcd", "abccde"])
def test_patterns_are_found_where_sglang_finds_them(sglang_patches, text, params, accepted):
    made = request(text, **params)
    assert (made._check_str_based_finish(accepted), reason(made)) == plainly(text, accepted, **params)
    assert made.sampling_params.stop_regex_strs == request(text, **params).sampling_params.stop_regex_strs


def test_a_pattern_without_end_ends_its_request_alone(sglang_patches):
    made = request("ab" * 200, stop_regex="(.+.+)+[xyz]")
    assert made._check_str_based_finish()  # without a limit this does not return
    said = made.finished_reason.to_json()
    assert (said["type"], said["status_code"]) == ("abort", 400)
    assert "stop_regex '(.+.+)+[xyz]' takes longer than 0.1 s" in said["message"]
    assert made.finished_len == 400


def test_a_pattern_that_the_search_does_not_read_is_refused(sglang_patches):
    from sglang_harli.patches.request_fields import checked_params

    assert checked_params({"stop_regex": ["a", "b+"]})["stop_regex"] == ["a", "b+"]
    with pytest.raises(ValueError, match=r"^stop_regex is '\(a'"):
        checked_params({"stop_regex": "(a"})
