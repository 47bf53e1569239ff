"""How launches and the device's time are told apart, and what is queued, on a fake device."""

from __future__ import annotations

import pytest

from sglang_harli.core import LatencyEstimate, QuantumKind
from sglang_harli.managers.scheduler.step_timer import BatchLoad, EventTimer, current_stream, stream_of
from sglang_harli.managers.scheduler.training.quantum_timer import DeviceQuantumTimer, Measured, Work
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from support.cuda.fake_device import FakeDevice, FakeStream

WORK = Work(QuantumKind.FORWARD, 64, 64)
DECODE = BatchLoad(True, 1, 10, 1, 10)


class Rig:
    """A timer over one stream; each quantum is launched in 2 ms."""

    def __init__(self) -> None:
        self.gpu = FakeDevice(launch_s=0.002, event_s=0.0)
        self.stream = self.gpu.Stream()
        self.timer = DeviceQuantumTimer(self.gpu, lambda: self.stream, self.gpu.clock)

    def quantum(self, seconds: float, upper_s: float = 0.1) -> None:
        with self.timer.span():
            self.gpu.launch(seconds)
        self.timer.close(WORK, lambda: LatencyEstimate(upper_s / 2, upper_s))

    def measured(self) -> Measured:
        self.gpu.synchronize()
        (found,) = self.timer.take()
        return found


def test_behind_a_batch_the_device_alone_is_measured():
    rig = Rig()
    rig.gpu.launch(0.05, stream=rig.stream)
    rig.quantum(0.0005)
    found = rig.measured()
    assert (found.seconds, found.launch_s, found.starved) == (
        pytest.approx(0.0005),
        pytest.approx(0.002),
        False,
    )


def test_on_an_idle_stream_the_launch_is_in_what_is_measured_and_that_is_said():
    rig = Rig()
    rig.quantum(0.0005)
    found = rig.measured()
    assert (found.seconds, found.launch_s, found.starved) == (
        pytest.approx(0.0025),
        pytest.approx(0.002),
        True,
    )


def test_what_is_queued_is_bounded_and_expected_until_it_is_over():
    rig = Rig()
    for _ in range(3):
        rig.quantum(0.05)
    assert (rig.timer.queued_s, rig.timer.expected_queued_s) == (pytest.approx(0.3), pytest.approx(0.15))
    rig.timer.settle()
    assert rig.timer.queued_s == pytest.approx(0.1)
    rig.timer.settle(most_s=0.1)
    assert rig.timer.queued_s == pytest.approx(0.1)
    rig.timer.settle(most_s=0.05)
    assert rig.timer.queued_s == rig.timer.expected_queued_s == 0.0
    assert len(rig.timer.take()) == 3


def test_the_stream_is_asked_for_at_each_use():
    rig = Rig()
    rig.quantum(0.001)
    rig.stream = other = rig.gpu.Stream()
    rig.quantum(0.001)
    assert rig.gpu.kernels[-1].stream is other is not rig.gpu.kernels[0].stream
    timer = EventTimer(rig.gpu, lambda: rig.stream)
    timer.begin()
    rig.gpu.launch(0.02, stream=other)
    timer.end(DECODE)
    rig.gpu.synchronize()
    assert timer.take() == [(DECODE, pytest.approx(0.02, abs=0.0021))] and not timer.pending


def test_forwards_run_on_the_current_stream_without_overlap():
    class Scheduler:
        enable_overlap = True
        forward_stream: FakeStream

    gpu, scheduler = FakeDevice(), Scheduler()
    scheduler.forward_stream = gpu.Stream()
    stream = stream_of(scheduler)  # type: ignore[arg-type]
    assert stream is not None and stream() is scheduler.forward_stream
    scheduler.forward_stream = swapped = gpu.Stream()
    assert stream() is swapped
    scheduler.enable_overlap = False
    assert stream_of(scheduler) is None
    with gpu.stream(swapped):
        assert current_stream(gpu)() is swapped
    assert current_stream(gpu)() is gpu.default_stream()


# ------------------------------------------------------------------ what is learnt of both
def taught(*, launch_s: float, device_s: float, every: int = 2, runs: int = 60) -> LatencyPredictor:
    """Of quanta that wait for the host, but for one in ``every``."""
    predictor = LatencyPredictor()
    for n in range(runs):
        starved = n % every > 0
        seconds = max(device_s, launch_s) if starved else device_s
        predictor.observe_quantum(QuantumKind.FORWARD, 64, 64, seconds, launch_s=launch_s, starved=starved)
    return predictor


def test_a_price_is_the_longer_of_launch_and_device():
    for launch_s, device_s in ((2.5e-3, 3e-4), (5e-4, 2e-2)):
        predictor = taught(launch_s=launch_s, device_s=device_s)
        ((_, price_s),) = predictor.prices(QuantumKind.FORWARD, [1], 64)
        longer_s = max(launch_s, device_s)
        assert longer_s <= price_s <= 1.3 * longer_s
        assert predictor.quantum(QuantumKind.FORWARD, 64, 64).expected_s == pytest.approx(longer_s, rel=0.1)
        assert predictor.device(QuantumKind.FORWARD, 64, 64).expected_s == pytest.approx(device_s, rel=0.1)
        assert predictor.costs()["forward"]["upper_ratio"] < 1.5


def test_a_device_that_always_waits_for_the_host_is_known_by_its_bounds():
    host_bound = taught(launch_s=2.5e-3, device_s=3e-4, every=10**9)
    assert host_bound.quantum(QuantumKind.FORWARD, 64, 64).expected_s == pytest.approx(2.5e-3, rel=0.1)
    busy = taught(launch_s=5e-4, device_s=2e-2, every=10**9)
    assert busy.quantum(QuantumKind.FORWARD, 64, 64).expected_s == pytest.approx(2e-2, rel=0.1)


def test_a_first_launch_that_loads_kernels_widens_first_runs_alone():
    predictor = taught(launch_s=1e-3, device_s=1e-2)
    plain = predictor.prices(QuantumKind.FORWARD, [1], 64, firsts=[False])
    for _ in range(30):
        predictor.observe_quantum(
            QuantumKind.FORWARD, 64, 64, 1e-2, first_of_shape=True, launch_s=0.1, starved=False
        )
    assert predictor.prices(QuantumKind.FORWARD, [1], 64, firsts=[False]) == plain
    ((_, first_s),) = predictor.prices(QuantumKind.FORWARD, [1], 64, firsts=[True])
    assert first_s > 2 * plain[0][1]


def test_without_launches_nothing_is_different():
    """A CPU computes what it launches."""
    with_none, plain = LatencyPredictor(), LatencyPredictor()
    for n in range(30):
        plain.observe_quantum(QuantumKind.FORWARD, 64 * (n % 4 + 1), 64, 1e-3 * (n % 4 + 1))
        with_none.observe_quantum(
            QuantumKind.FORWARD, 64 * (n % 4 + 1), 64, 1e-3 * (n % 4 + 1), launch_s=0.0, starved=False
        )
    kind = QuantumKind.FORWARD
    assert with_none.prices(kind, [1, 2, 4], 64) == plain.prices(kind, [1, 2, 4], 64)
    assert plain.device(kind, 64, 64) == plain.quantum(kind, 64, 64)
    assert not [name for name in plain.summary() if name.startswith("launch")]
