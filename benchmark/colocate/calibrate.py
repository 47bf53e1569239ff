"""How fast is serving alone here: request rates for the loads asked for, and the TPOT that targets
are multiples of."""

from __future__ import annotations

import math
import statistics
from typing import Any

from colocate.client import Load
from colocate.judge import SERVE
from colocate.modes import START_LIMIT_S, Rig
from colocate.plan import Cell
from common import servers

ALONE = 6  # requests, one after the other


def offered(busy: float, service_s: float) -> float:
    """Requests per second that keep a server busy for this share of the time, each taking
    ``service_s`` of it.

    Requests that come at random and are served at once, however many there are, leave
    ``exp(-rate * service_s)`` of the time to nobody.  The seconds grow with the batch: so they are
    measured at the load itself (``served``).
    """
    return -math.log(1 - busy) / service_s


def served(busy: float, rate: float) -> float:
    """The inverse: seconds that each request takes where ``rate`` per second keep the server
    ``busy``."""
    return -math.log(1 - min(max(busy, 0.001), 0.99)) / rate


def calibrate(rig: Rig, loads: list[int], requests: int, rounds: int) -> dict[str, Any]:
    """Rates at which serve-only is so many per cent busy, and its median TPOT there, in ``rounds``
    corrections.

    Returns:
        ``service_s`` and ``tpot_ms`` of requests one by one; ``loads``: {per cent: {rate, tpot_ms,
        seconds, measured: (rate, busy) of each round}}; the TPOT is of all rounds, the seconds are
        those of the last.
    """
    place, server = rig.place, rig.servers["plain"]
    alone = Load(ALONE, math.inf, 1, place.prompt_tokens, place.output_tokens, place.ratio, concurrency=1)
    with servers.running(server):
        found = rig.client.run(server.url, place.model, alone, START_LIMIT_S, lambda: None)
    service_s = (found["ended_s"] - found["began_s"]) / ALONE
    answer: dict[str, Any] = {
        str(load): {"rate": offered(load / 100, service_s), "measured": []} for load in loads
    }
    tpots_ms: dict[str, list[float]] = {name: [] for name in answer}
    services_s: dict[str, list[float]] = {name: [] for name in answer}
    for number in range(rounds):  # load by load in each: a machine's speed changes in minutes
        for load in loads:
            name = str(load)
            rate = answer[name]["rate"]
            cell = rig.measure(Cell(SERVE, "", load, -number, requests=requests, rate=rate))
            answer[name]["measured"].append((round(rate, 4), round(cell["busy"], 4)))
            tpots_ms[name] += [t for t in cell["tpots_ms"] if t is not None]
            came = (
                requests / cell["seconds"]
            )  # few requests may come much faster or slower than the rate says
            services_s[name].append(served(cell["busy"], came))
            answer[name] |= {
                "rate": offered(load / 100, statistics.median(services_s[name])),
                "tpot_ms": statistics.median(tpots_ms[name]),
                "seconds": cell["seconds"],
            }
    return {
        "service_s": round(service_s, 4),
        "tpot_ms": statistics.median(t for t in found["tpots_ms"] if t is not None),
        "loads": answer,
    }
