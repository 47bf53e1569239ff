"""The happens-before checker finds what no event orders; memory lent in place is ordered."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from sglang_harli.mem_cache.backing.static import StaticBacking
from support.cuda.happens_before import HappensBefore, OrderedDevice, UnorderedError
from support.pool_parts import small_geometry

GEOMETRY = small_geometry()


def test_work_on_two_streams_has_to_be_ordered():
    device = OrderedDevice()
    forward, copy = device.Stream(), device.Stream()
    with HappensBefore(device) as checker:
        with device.stream(forward):
            rows = torch.zeros(8)
        view = rows[2:4]
        with pytest.raises(UnorderedError, match=r"reads what .* on stream 1 used"), device.stream(copy):
            view + 1
        copy.wait_stream(forward)
        with device.stream(copy):
            view + 1
        with pytest.raises(UnorderedError, match="writes what"), device.stream(forward):
            rows.add_(1)  # the copy may still be reading
        event = device.Event()
        event.record(copy)
        forward.wait_event(event)
        with device.stream(forward):
            rows.add_(1)
            other = rows.clone()
        with device.stream(copy):
            pass
        with pytest.raises(UnorderedError), device.stream(copy):
            torch.add(rows, 1, out=other)
    assert checker.operations >= 6


def test_waits_pass_on_what_others_waited_for():
    device = OrderedDevice()
    first, second, third = (device.Stream() for _ in range(3))
    with HappensBefore(device):
        with device.stream(first):
            rows = torch.zeros(4)
        second.wait_stream(first)
        event = second.record_event()
        with device.stream(first):
            later = torch.zeros(4)
        third.wait_event(event)
        with device.stream(third):
            rows.add_(1)
            with pytest.raises(UnorderedError):
                later.add_(1)


def test_bytes_that_do_not_meet_need_no_order():
    device = OrderedDevice()
    first, second = device.Stream(), device.Stream()
    with HappensBefore(device):
        with device.stream(first):
            rows = torch.zeros(2, 4, 8)
        second.wait_stream(first)
        with device.stream(first):
            rows[0].fill_(1)
            rows[1, 2:].fill_(1)
        with device.stream(second):
            rows[1, :2].fill_(2)
            rows[1, 1:2].add_(rows[1, :1])
            with pytest.raises(UnorderedError):
                rows[1, 1:3].fill_(2)
            with pytest.raises(UnorderedError):
                rows[0, 3].clone()


def test_what_the_host_has_seen_comes_before_all_that_it_launches_later():
    device = OrderedDevice()
    first, second = device.Stream(), device.Stream()
    with HappensBefore(device):
        with device.stream(first):
            rows = torch.zeros(4)
        event = first.record_event()
        with device.stream(second):
            with pytest.raises(UnorderedError):
                rows.add_(1)
            assert event.query()
            rows.add_(1)
        later = second.record_event()
        later.synchronize()
        with device.stream(first):
            rows.add_(1)


@pytest.mark.parametrize("debug", [False, True])
def test_memory_lent_in_place_waits_for_both_streams(debug: bool):
    """The caller's stream may have used the rows, and may use them again."""
    device = OrderedDevice()
    forward, schedule = device.Stream(), device.Stream()
    with device.stream(schedule):
        with device.stream(forward):
            backing = StaticBacking(GEOMETRY, "cpu", stream=forward, debug=debug, module=device)
        with HappensBefore(device):
            rows = backing.kv_bytes(1)
            for _ in range(2):
                rows.fill_(3)  # on the scheduler's stream
                extents = backing.lend([4, 5])
                with device.stream(forward):
                    for extent in extents:
                        extent.fill_(7)
                backing.take_back([4, 5], extents)
                assert not rows[4 * GEOMETRY.chunk_bytes : 6 * GEOMETRY.chunk_bytes].clone().any()


def test_without_a_stream_of_its_own_nothing_is_waited_for():
    backing = StaticBacking(GEOMETRY, "cpu", module=nullcontext())
    backing.take_back([4], backing.lend([4]))
