"""The double of a CUDA device: streams run in order, events order them, the host waits where it
asks to."""

from __future__ import annotations

import pytest

from support.cuda.fake_device import FakeDevice

LAUNCH_S = 0.001


def device() -> FakeDevice:
    return FakeDevice(launch_s=LAUNCH_S, event_s=0.0)


def test_launches_cost_the_host_and_kernels_run_behind_one_another():
    gpu = device()
    begin_s = gpu.clock.s
    first, second = gpu.launch(0.5, "a"), gpu.launch(0.25, "b")
    assert gpu.clock.s == pytest.approx(begin_s + 2 * LAUNCH_S)
    assert first.begin_s == pytest.approx(begin_s + LAUNCH_S)
    assert (second.begin_s, second.end_s) == pytest.approx((first.end_s, first.end_s + 0.25))
    assert [kernel.name for kernel in gpu.named("a")] == ["a"]


def test_an_idle_stream_waits_for_the_host():
    gpu = device()
    gpu.launch(1e-5)
    gpu.clock.advance(1.0)
    late = gpu.launch(1e-5)
    assert late.begin_s == pytest.approx(late.launched_s + LAUNCH_S)


def test_streams_run_beside_one_another_until_one_waits():
    gpu = device()
    one, other = gpu.Stream(), gpu.Stream()
    with gpu.stream(one):
        assert gpu.current_stream() is one
        long = gpu.launch(1.0)
    assert gpu.current_stream() is gpu.default_stream() is not one
    beside = gpu.launch(0.1, stream=other)
    assert beside.end_s < long.end_s
    other.wait_stream(one)
    assert gpu.launch(0.1, stream=other).begin_s == pytest.approx(long.end_s)
    third = gpu.Stream()
    third.wait_event(gpu.Event())  # never recorded: nothing to wait for
    assert gpu.launch(0.1, stream=third).begin_s < long.end_s


def test_events_tell_the_devices_time_on_a_busy_stream_and_the_hosts_on_an_idle_one():
    gpu = device()
    stream = gpu.Stream()
    for before_s, took_s in ((1.0, 0.3), (0.0, LAUNCH_S + 0.3)):
        if before_s:
            gpu.launch(before_s, stream=stream)
        first, last = gpu.Event(enable_timing=True), gpu.Event(enable_timing=True)
        first.record(stream)
        gpu.launch(0.3, stream=stream)
        last.record(stream)
        assert not last.query()
        last.synchronize()
        assert last.query() and first.elapsed_time(last) == pytest.approx(took_s * 1e3)
    assert gpu.waited_s > 1.0


def test_the_host_waits_for_an_event_a_stream_or_all():
    gpu = device()
    one, other = gpu.Stream(), gpu.Stream()
    short, long = gpu.launch(0.1, stream=one), gpu.launch(0.7, stream=other)
    event = one.record_event()
    event.synchronize()
    assert gpu.clock.s == pytest.approx(short.end_s) and one.query() and not other.query()
    gpu.synchronize()
    assert gpu.clock.s == pytest.approx(long.end_s) and other.query()
    other.synchronize()
    assert gpu.clock.s == pytest.approx(long.end_s)


def test_a_time_is_refused_where_the_real_module_refuses_it():
    gpu = device()
    plain, timed, open_end = gpu.Event(), gpu.Event(enable_timing=True), gpu.Event(enable_timing=True)
    assert plain.query()
    timed.record()
    with pytest.raises(RuntimeError, match="record"):
        timed.elapsed_time(open_end)
    plain.record()
    with pytest.raises(RuntimeError, match="enable_timing"):
        timed.elapsed_time(plain)
    gpu.launch(1.0)
    open_end.record()
    with pytest.raises(RuntimeError, match="over"):
        timed.elapsed_time(open_end)


def test_an_event_can_be_recorded_again():
    gpu = device()
    event = gpu.Event()
    event.record()
    gpu.launch(1.0)
    assert event.query()
    event.record()
    assert not event.query()
    event.wait(stream := gpu.Stream())
    assert gpu.launch(0.1, stream=stream).begin_s >= gpu.kernels[0].end_s
