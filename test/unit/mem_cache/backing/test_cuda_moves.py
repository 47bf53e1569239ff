"""Random lends and returns of device memory against the driver's double."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from sglang_harli.mem_cache.backing.cuda_driver import DriverError
from support.cuda.cuda_driver_double import DriverDouble
from support.cuda.cuda_pool import BUFFERS, FORWARD, SCHEDULE, STRIPES, is_all, make, rows

CALLS = ("map", "unmap", "set_access")


class Moves(RuleBasedStateMachine):
    """Random lends and returns, with kernels in flight; every chunk is where the model says."""

    @initialize(debug=st.booleans())
    def start(self, debug: bool):
        self.driver = DriverDouble()
        self.debug = debug
        self.backing = make(self.driver, debug=debug)
        self.addresses = [self.backing.kv_bytes(b).data_ptr() for b in range(BUFFERS)]
        self.kv = {(b, s): 0 for b in range(BUFFERS) for s in range(STRIPES)}  # value of each chunk of KV
        self.lent: dict[tuple[int, ...], tuple[list[Tensor], int | None]] = {}  # stripes -> extents, value

    def free(self) -> list[int]:
        return sorted({s for _, s in self.kv} - {0})

    @rule(data=st.data(), value=st.integers(0, 255), later=st.booleans())
    def forward(self, data: st.DataObject, value: int, later: bool):
        """A forward writes one chunk of KV, now or when the stream gets to it."""
        buffer, stripe = data.draw(st.sampled_from(sorted(self.kv)))
        self.driver.write_later(FORWARD, rows(self.backing, buffer, stripe), value)
        if not later:
            self.driver.advance(FORWARD)
        self.kv[buffer, stripe] = value

    @precondition(lambda self: self.free())
    @rule(data=st.data())
    def lend(self, data: st.DataObject):
        stripes = tuple(data.draw(st.lists(st.sampled_from(self.free()), min_size=1, unique=True)))
        extents = self.backing.lend(stripes)
        (extent,) = extents
        assert extent.nbytes == len(stripes) * self.backing.geometry.stripe_bytes
        if not self.debug:
            chunks = extent.view(-1, self.backing.geometry.chunk_bytes)
            expected = [self.kv[b, s] for s in stripes for b in range(BUFFERS)]
            assert [int(c[-1]) for c in chunks] == expected
        for stripe in stripes:
            for buffer in range(BUFFERS):
                del self.kv[buffer, stripe]
        self.lent[stripes] = (extents, 0xFF if self.debug else None)

    @precondition(lambda self: self.lent)
    @rule(data=st.data(), value=st.integers(0, 255), later=st.booleans())
    def train(self, data: st.DataObject, value: int, later: bool):
        stripes = data.draw(st.sampled_from(sorted(self.lent)))
        extents, _ = self.lent[stripes]
        self.driver.write_later(FORWARD, extents[0], value)
        if not later:
            self.driver.advance(FORWARD)
        self.lent[stripes] = (extents, value)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject):
        stripes = data.draw(st.sampled_from(sorted(self.lent)))
        extents, _ = self.lent.pop(stripes)
        self.backing.take_back(stripes, extents)
        self.kv |= {(b, s): 0 for b in range(BUFFERS) for s in stripes}

    @precondition(lambda self: self.free())
    @rule(data=st.data(), call=st.sampled_from(CALLS), after=st.integers(0, 8))
    def refuse(self, data: st.DataObject, call: str, after: int):
        """A lend in which the driver refuses a call changes nothing."""
        stripes = data.draw(st.lists(st.sampled_from(self.free()), min_size=1, unique=True))
        self.driver.refuse[call] = after
        try:
            self.backing.take_back(sorted(stripes), self.backing.lend(sorted(stripes)))
        except MemoryError:
            return
        except DriverError:  # the return was refused: once more
            (at,) = [a for a, lent in self.backing._lent.items() if lent == tuple(sorted(stripes))]
            nbytes = len(stripes) * self.backing.geometry.stripe_bytes
            self.backing.take_back(sorted(stripes), [self.driver.tensor(at, nbytes)])
        self.driver.refuse.clear()
        self.kv |= {(b, s): 0 for b in range(BUFFERS) for s in stripes}

    @invariant()
    def everything_is_where_it_belongs(self):
        for stream in (SCHEDULE, FORWARD):
            self.driver.advance(stream)
        for (buffer, stripe), value in self.kv.items():
            assert is_all(rows(self.backing, buffer, stripe), value)
        for stripes, (extents, value) in self.lent.items():
            assert value is None or is_all(extents[0], value)
            for stripe in stripes:
                assert is_all(rows(self.backing, 0, stripe), 0xFF if self.debug else 0)
        assert [self.backing.kv_bytes(b).data_ptr() for b in range(BUFFERS)] == self.addresses

    def teardown(self):
        if hasattr(self, "backing"):
            self.backing.close()
            self.driver.assert_clean()
            self.driver.close()


TestMoves = Moves.TestCase
TestMoves.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
