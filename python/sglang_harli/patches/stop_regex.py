"""Runtime half of ``patches/16-stop-regex``: a stop pattern takes bounded time of decode.

Leans on: ``srt.managers.schedule_batch`` (``Req._check_str_based_finish``,
``_locate_str_stop_finished_len``, ``tail_str``, ``_stop_match_tail_len``;
``FINISHED_MATCHED_REGEX``, ``FINISH_ABORT``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import regex

from sglang_harli.sglang_versions.current import stop_regex as versions

SEARCH_S = 0.1  # of one pattern in one output; a search takes some microseconds


def _check(original: Callable[..., bool], req: Any, new_accepted_len: int = 1) -> bool:
    """SGLang's own for stop strings; then the patterns, as it would."""
    params = req.sampling_params
    patterns = params.stop_regex_strs
    if not patterns:
        return original(req, new_accepted_len)
    if params.stop_strs:
        params.stop_regex_strs = []
        try:
            if original(req, new_accepted_len):
                return True
        finally:
            params.stop_regex_strs = patterns
    text = req.tail_str(new_accepted_len)
    for pattern in patterns:
        try:
            finished_len = _finished_len(req, pattern, text, new_accepted_len)
        except TimeoutError:
            _give_up(req, pattern)
            return True
        if finished_len is not None:
            _finish(req, pattern, finished_len)
            return True
    return False


def _found(pattern: str, text: str) -> bool:
    return regex.search(pattern, text, timeout=SEARCH_S) is not None


def _finished_len(req: Any, pattern: str, text: str, new_accepted_len: int) -> int | None:
    """Of the output, up to the first newly accepted token behind which the pattern is found; None:
    it is not."""
    found = _found(pattern, text)
    if not found and (new_accepted_len == 1 or not versions.BEHIND_EACH_TOKEN):
        return None
    window = req.output_ids[len(req.output_ids) - req._stop_match_tail_len(new_accepted_len) :]
    ends = range(max(1, len(window) - new_accepted_len + 1), len(window))
    behind = next((end for end in ends if _found(pattern, req.tokenizer.decode(window[:end]))), None)
    if behind is None:
        return len(req.output_ids) if found else None
    return len(req.output_ids) - len(window) + behind


def _finish(req: Any, pattern: str, finished_len: int) -> None:
    from sglang.srt.managers.schedule_batch import FINISHED_MATCHED_REGEX

    req.finished_reason = FINISHED_MATCHED_REGEX(matched=pattern)
    req.finished_len = finished_len


def _give_up(req: Any, pattern: str) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    text = f"stop_regex {pattern!r:.100} takes longer than {SEARCH_S:g} s to search for: write it without nested repeats"
    req.finished_reason = FINISH_ABORT(text, 400, "BadRequestError")
    req.finished_len = len(req.output_ids)


HOOKS = (("sglang.srt.managers.schedule_batch.Req._check_str_based_finish", _check, "around"),)
