"""Misses of two appliances at some distance, beside an echo over the same link.

A process passes every byte on half a round trip late, in each direction, for the pair and for the
echo alike.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.loads import KIB
from tests.bench.pairlinks import echo_between, middle, pair_of, quartiles
from tests.support import rawnbd
from tests.support.pairlink import Link
from tests.support.pairs import Pair

ROUND_TRIPS_MS = (0.2, 0.5, 1.0, 5.0)


def measure_distance(
    turns: int, requests: int, size_bytes: int, round_trips_ms: Sequence[float] = ROUND_TRIPS_MS
) -> dict[str, Any]:
    """What a miss takes beside a hit, in round trips of an echo, by the distance."""
    options = ("--extent-size", "64KiB", "--record-limit", f"{size_bytes}B", "--predictor", "lru")
    links: list[Link] = []

    def through_a_link(pair: Pair) -> None:
        said = pair[2].options
        said[said.index("--partner") + 1] = f"unix://{pair.folder}/link"
        links.append(Link(pair.folder / "link", pair.folder / "p1"))

    found: dict[str, list[float]] = {}
    for _ in range(turns):
        for round_trip_ms in round_trips_ms:
            with pair_of(size_bytes, *options, prepare=through_a_link) as pair:
                link = links.pop()
                link.delay_s = round_trip_ms / 2000
                pair[1].ask("pause")
                places = [number * 64 * KIB for number in range(min(requests, size_bytes >> 16))]
                new, again = (write_us(pair, places) for _ in range(2))  # again: hits
                pair[1].ask("resume")
                link.close()
            echo = far_echo_us(min(requests, 500), link.delay_s)
            for name, value in (
                (f"{round_trip_ms:g} ms: bare echo us", echo),
                (f"{round_trip_ms:g} ms: miss us", new),
                (
                    f"{round_trip_ms:g} ms: what it takes beside a hit, in echoes",
                    (new - again) / echo,
                ),
            ):
                found.setdefault(name, []).append(value)
    return {name: quartiles(values) for name, values in found.items()}


def write_us(pair: Pair, offsets: list[int]) -> float:
    """The median of writes of 4 KiB, one after another."""
    took = []
    with pair[1].host() as host:
        for offset in offsets:
            began = time.perf_counter()
            host.call(rawnbd.WRITE, offset, 4 * KIB, bytes(4 * KIB))
            took.append((time.perf_counter() - began) * 1e6)
        host.disconnect()
    return middle(took)


def far_echo_us(rounds: int, delay_s: float) -> float:
    with tempfile.TemporaryDirectory(prefix="be", dir="/dev/shm") as folder:
        outer, inner = Path(folder) / "outer", Path(folder) / "inner"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(inner))
            listener.listen()
            link = Link(outer, inner)
            link.delay_s = delay_s
            here = socket.socket(socket.AF_UNIX)
            here.connect(str(outer))
            there, _ = listener.accept()
        try:
            return echo_between(here, there, rounds)
        finally:
            link.close()
