"""Whether training computes what serving computes, measured on one prompt: the scheduler's half.

The HTTP process has the server answer a fixed prompt and sends its tokens' log-probabilities
(``parity_request``). Here the frozen base computes them in quanta, as training does and in fp32:

    mean |served - trained|  <=  max(ACCEPTED, TIMES_ROUNDING * mean |trained - fp32|)

Until that is known, and where it does not hold, no run starts (``hold``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from sglang_harli.core import Claim, QuantumKind, QuantumOffer
from sglang_harli.errors import ConfigError
from sglang_harli.managers.scheduler.training.quantum_timer import Work
from sglang_harli.peft_trainer.bare_forward import BareForward
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.predictor.latency_predictor import LatencyPredictor

logger = logging.getLogger(__name__)

ACCEPTED = 0.02
TIMES_ROUNDING = 4.0
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of its quanta that one of the policy's may be
WAITS = "training is compared with serving first, which takes a moment"


class Parity:
    """One scheduler's comparison; lives on its thread.

    Args:
        mode: ``refuse``, ``warn`` or ``off`` (``--harli-parity``).
        head_tokens: most tokens whose logits are computed at once.
        rounds: what serving alone rounds, so that a difference only warns; "": nothing.
        released: whether SGLang has released its memory, or is in the midst of an update of its
            weights: nothing is asked for, or computed, then.

    Attributes:
        state: off, waiting (for the served values), computing, agrees, differs or failed.
        difference, rounding: means over the prompt's tokens, once they are known.
    """

    def __init__(
        self,
        base: FrozenBase,
        mode: str,
        *,
        head_tokens: int,
        rounds: str = "",
        released: Callable[[], bool] = lambda: False,
    ) -> None:
        self._base, self._head_tokens, self._released = base, head_tokens, released
        self._warns = mode == "warn" or bool(rounds)
        self._rounds = rounds
        self.state = "off" if mode == "off" else "waiting"
        self.difference = self.rounding = math.nan
        self._tokens = 0
        self._why = ""  # it failed
        self._version = 0  # of the served weights
        self._served: list[float] = []
        # As training computes, then in fp32 where that is another dtype.
        self._forwards: list[BareForward] = []

    # ---- questions and answers
    def wanted(self) -> dict[str, Any]:
        """For the HTTP process: whether it is to measure, and what it says back."""
        wanted = self.state in ("waiting", "failed") and not self._released()
        positions = self._base.positions or self._base.config.max_position_embeddings
        vocabulary = self._base.config.vocab_size
        return {"wanted": wanted, "version": self._version, "vocab": vocabulary, "positions": positions}

    def begin(self, ids: list[int], served: list[float], version: int) -> None:
        """Compute the same; nothing is done if the served weights were updated since.

        ``served``: of each token but the first.

        Raises:
            ConfigError: they are not of one prompt.
        """
        if self.state == "off" or version != self._version:
            return
        if len(ids) < 2 or len(served) != len(ids) - 1:
            raise ConfigError(f"{len(served)} log-probabilities of {len(ids)} tokens", code="internal")
        kinds = (False, True) if self._base.dtype.itemsize < 4 else (False,)
        self._forwards = [BareForward(self._base, ids, self._head_tokens, exact=exact) for exact in kinds]
        self._served, self._tokens, self.state = served, len(served), "computing"

    def fail(self, why: str) -> None:
        """It could not be measured; the HTTP process tries again."""
        if self.state in ("off", "agrees", "differs"):
            return
        if why != self._why:
            logger.warning("harli: training could not be compared with serving: %s", why)
        self.state, self._why, self._forwards = "failed", why, []

    def weights_updated(self) -> None:
        """What is served now is to be compared anew."""
        self._version += 1
        if self.state != "off":
            self.state, self._forwards = "waiting", []

    @property
    def hold(self) -> str:
        """Why no run starts now; "": it may."""
        if self._warns or self.state in ("off", "agrees"):
            return ""
        return WAITS if self.state in ("waiting", "computing") else self.sentence()

    # ---- the work
    @property
    def pending(self) -> bool:
        """Whether there is work, or a result on its way from the device."""
        return self.state == "computing" and not self._released()

    def offer(self, predictor: LatencyPredictor, claim: Claim = Claim.POLICY) -> QuantumOffer | None:
        """The quanta that are left, as one, cut anywhere; None: the device still computes."""
        left = sum(forward.whole - forward.quanta for forward in self._forwards)
        if not left:
            self.collect()
            return None
        kind = QuantumKind.CHECK
        sizes = [*(size for size in SIZES if size < left), left]
        return QuantumOffer(
            kind, predictor.prices(kind, sizes, self._tokens), False, predictor.doubt(kind), claim
        )

    def run(self, quanta: int) -> Work:
        """The next ones, as many as are left at most."""
        for _ in range(quanta):
            next(forward for forward in self._forwards if not forward.finished).run()
        self.collect()
        return Work(QuantumKind.CHECK, quanta * self._tokens, self._tokens)

    def collect(self) -> None:
        """Compare, where the result has come; never waits."""
        found = [forward.logprobs() for forward in self._forwards]
        if not self.pending or any(values is None for values in found):
            return
        trained = found[0]
        assert trained is not None and found[-1] is not None
        self.difference, self.rounding = _distance(self._served, trained), _distance(trained, found[-1])
        self._forwards = []
        self.state = "agrees" if self.difference <= self.accepted else "differs"  # NaN differs
        (logger.info if self.state == "agrees" else logger.warning)("harli: %s", self.sentence())

    # ---- what is shown
    @property
    def accepted(self) -> float:
        rounding = self.rounding if math.isfinite(self.rounding) else 0.0
        return max(ACCEPTED, TIMES_ROUNDING * rounding)

    def sentence(self) -> str:
        but = f" ({self._rounds or '--harli-parity warn'}: jobs run all the same)" if self._warns else ""
        way_out = but or " (--harli-parity warn lets jobs run all the same)"
        if self.state == "failed":
            return (
                f"training could not be compared with serving yet, which is tried again: {self._why}{way_out}"
            )
        figures = (
            f"over {self._tokens} tokens their log-probabilities differ by {self.difference:.3g} on average, "
            f"and at most {self.accepted:.3g} is accepted"
        )
        if self.state == "agrees":
            return f"training computes what is served: {figures}"
        return f"training does not compute what is served: {figures}{way_out}"

    def status(self) -> dict[str, Any]:
        """For ``harli status``; ``why`` says it in a sentence."""
        known = self.state in ("agrees", "differs")
        return {
            "state": self.state,
            "difference": _shown(self.difference) if known else None,
            "accepted": _shown(self.accepted) if known else None,
            "rounding": _shown(self.rounding) if known else None,
            "tokens": self._tokens if known else None,
            "why": self._said(),
        }

    def _said(self) -> str:
        if self.state == "off":
            return "training is not compared with serving (--harli-parity off)"
        if self.state == "waiting":
            return f"{WAITS}: the server answers one prompt"
        if self.state == "computing":
            done, whole = (sum(getattr(f, name) for f in self._forwards) for name in ("quanta", "whole"))
            return f"{WAITS}: {done} of {whole} parts are computed"
        return self.sentence()


def _distance(one: list[float], other: list[float]) -> float:
    """The mean absolute difference; infinite where a value is not a number or infinite."""
    mean = math.fsum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
    return mean if math.isfinite(mean) else math.inf


def _shown(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
