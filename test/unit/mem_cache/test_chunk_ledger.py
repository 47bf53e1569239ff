"""The ledger: every stripe has one owner, whatever is lent and given back."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sglang_harli.errors import HarliError
from sglang_harli.mem_cache.chunk_ledger import ChunkLedger, LedgerError
from support.pool_parts import small_geometry

STRIPES = 8


class LedgerMachine(RuleBasedStateMachine):
    """Random moves, allowed and forbidden, against a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.geometry = small_geometry(STRIPES)
        self.ledger = ChunkLedger(self.geometry)
        self.model: dict[str, list[int]] = {}

    @rule(
        name=st.sampled_from(["a", "b", "c", "kv", ""]),
        stripes=st.lists(st.integers(-1, STRIPES), max_size=4),
        quota=st.none() | st.integers(0, STRIPES),
    )
    def lend(self, name: str, stripes: list[int], quota: int | None) -> None:
        lent = [stripe for held in self.model.values() for stripe in held]
        allowed = (
            name not in ("kv", "", *self.model)
            and 0 < len(stripes) == len(set(stripes))
            and all(0 < stripe < STRIPES and stripe not in lent for stripe in stripes)
            and (quota is None or len(lent) + len(stripes) <= quota)
        )
        if allowed:
            self.ledger.lend(name, stripes, quota=quota)
            self.model[name] = stripes
        else:
            with pytest.raises(LedgerError):
                self.ledger.lend(name, stripes, quota=quota)

    @rule(name=st.sampled_from(["a", "b", "c", "kv"]))
    def give_back(self, name: str) -> None:
        if name in self.model:
            assert self.ledger.give_back(name) == tuple(self.model.pop(name))
        else:
            with pytest.raises(LedgerError):
                self.ledger.give_back(name)

    @invariant()
    def agrees(self) -> None:
        ledger, lent = self.ledger, {s: name for name, held in self.model.items() for s in held}
        ledger.check()
        assert [ledger.owner(stripe) for stripe in range(STRIPES)] == [
            lent.get(stripe, "kv") for stripe in range(STRIPES)
        ]
        assert ledger.lent() == sorted(lent)
        assert ledger.train_stripes == len(lent)
        assert all(ledger.stripes_of(name) == tuple(held) for name, held in self.model.items())
        assert ledger.moves_to_train - ledger.moves_to_kv == len(lent)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    ("name", "stripes", "quota", "says"),
    [
        ("kv", [1], None, "cannot be named"),
        ("held", [3], None, "in use"),
        ("new", [], None, "at least one"),
        ("new", [3, 3], None, "named twice"),
        ("new", [0], None, "stripe 0 is not lendable"),
        ("new", [8], None, "stripe 8 is not lendable"),
        ("new", [2], None, "belongs to 'held'"),
        ("new", [3, 4], 3, "quota is 3"),
    ],
)
def test_a_refusal_says_why_and_moves_nothing(name, stripes, quota, says):
    ledger = ChunkLedger(small_geometry(STRIPES))
    ledger.lend("held", [1, 2])
    with pytest.raises(LedgerError, match=says):
        ledger.lend(name, stripes, quota=quota)
    ledger.check()
    assert ledger.lent() == [1, 2]


def broken(ledger: ChunkLedger, what: str) -> None:
    if what == "two owners":
        ledger._leases["b"] = (1, 3)
    elif what == "reserved":
        ledger._leases["b"] = (0,)
    elif what == "count":
        ledger.moves_to_kv += 1
    elif what == "quota":
        ledger._quota = 1


@pytest.mark.parametrize("what", ["two owners", "reserved", "count", "quota"])
def test_the_check_sees_each_broken_invariant(what):
    ledger = ChunkLedger(small_geometry(STRIPES))
    ledger.lend("a", [1, 2], quota=4)
    ledger.check()
    broken(ledger, what)
    with pytest.raises(LedgerError) as caught:
        ledger.check()
    assert isinstance(caught.value, HarliError) and caught.value.code == "pool_ledger"
