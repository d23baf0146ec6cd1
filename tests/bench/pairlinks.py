"""What the link of a pair costs and bears: TLS, reads of what the other writes, cuts, flaps.

Each part makes a pair of its own and returns figures by name; `tests.bench.pair` prints them.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import os
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from bitmapd.media.base import Done
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore
from tests.bench import loads, machine
from tests.bench.loads import KIB, MIB, Load
from tests.support import rawnbd
from tests.support.pairlink import Link
from tests.support.pairs import Pair
from tests.support.records import blank_image, load_image
from tests.support.sockets import free_ports

GIB, TIB = 1 << 30, 1 << 40
ADD_BYTES, GRANT_BYTES = 32 + 4 * 3 + 8 * 2, 32 + 4 * 4 + 8 * 2
TRACES = Path(__file__).resolve().parents[1] / "data" / "traces"
TIMEOUT_S = 0.5  # of the partner, where it is to be noticed that it is gone

Found = dict[str, Any]

ECHO = f"""
import socket, ssl, sys
sock = socket.socket(fileno=int(sys.argv[1]))
if len(sys.argv) > 2:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(sys.argv[2] + "/node-cert.pem", sys.argv[2] + "/node-key.pem")
    sock = context.wrap_socket(sock, server_side=True)
got = bytearray({ADD_BYTES})
while True:
    view = memoryview(got)
    while view:
        count = sock.recv_into(view)
        if not count:
            sys.exit()
        view = view[count:]
    sock.sendall(bytes({GRANT_BYTES}))
"""


def quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4)


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def part(values: list[float], of_1000: int) -> float:
    return sorted(values)[len(values) * of_1000 // 1000]


@contextmanager
def pair_of(
    size_bytes: int, *options: str, prepare: Callable[[Pair], None] | None = None
) -> Iterator[Pair]:
    """Both have started, are paired and in sync; everything lies in memory.  `prepare` is called
    before they are created."""
    with (
        tempfile.TemporaryDirectory(prefix="bp", dir="/dev/shm") as folder,
        Pair(Path(folder), size_bytes, *options) as pair,
    ):
        if prepare is not None:
            prepare(pair)
        for node in (1, 2):
            os.truncate(pair[node].record, MIB + size_bytes // (4 * MIB) + 64 * KIB)
        pair.create()
        pair.start()
        for node in (1, 2):
            pair[node].wait_in_sync()
        yield pair


def over_tls(pair: Pair) -> None:
    """Not created yet: the link goes over loopback."""
    ports = free_ports(2)
    pair[1].dmctl("partner-keys", str(pair.folder / "keys"), "--names", "left,right")
    for node, name, other in ((1, "left", "right"), (2, "right", "left")):
        said = pair[node].options
        said[said.index("--partner") + 1] = f"tls://127.0.0.1:{ports[2 - node]}"
        said[said.index("--partner-listen") + 1] = f"tls://127.0.0.1:{ports[node - 1]}"
        said += ["--partner-certificates", str(pair.folder / "keys" / name)]
        said += ["--partner-name", other]


def echo_us(rounds: int, keys: Path | None = None) -> float:
    """There and back of as many bytes as a miss sends, another process at the other end, over a
    unix socket or, with the folders of `partner-keys`, TLS over loopback; the median."""
    if keys is None:
        here, there = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            here = socket.create_connection(listener.getsockname())
            there, _ = listener.accept()
        for sock in (here, there):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return echo_between(here, there, rounds, keys)


def echo_between(
    here: socket.socket, there: socket.socket, rounds: int, keys: Path | None = None
) -> float:
    """The same between the ends of a connection, which it closes."""
    more = [] if keys is None else [str(keys / "right")]
    command = [sys.executable, "-c", ECHO, str(there.fileno()), *more]
    took = []
    with subprocess.Popen(command, pass_fds=[there.fileno()]) as other:
        there.close()
        if keys is not None:
            context = ssl.create_default_context(cafile=str(keys / "left" / "ca-cert.pem"))
            here = context.wrap_socket(here, server_hostname="right")
        with here:
            for _ in range(rounds):
                began = time.perf_counter()
                here.sendall(bytes(ADD_BYTES))
                left = GRANT_BYTES
                while left:
                    left -= len(here.recv(left))
                took.append((time.perf_counter() - began) * 1e6)
        other.wait()
    return middle(took)


def measure_tls(turns: int, requests: int, size_bytes: int) -> Found:
    """Misses, as over a unix socket, with a link over loopback."""
    miss = Load(
        "miss", "randwrite", 4 * KIB, 1, size_bytes, align_bytes=64 * KIB, requests=requests
    )
    found: dict[str, list[float]] = {}
    options = ("--extent-size", "64KiB", "--record-limit", f"{size_bytes}B", "--predictor", "lru")
    for turn in range(turns):
        with pair_of(size_bytes, *options, prepare=over_tls) as pair:
            pair[1].ask("pause")
            new = loads.over_nbd(pair[1].uri, miss, 0, turn)
            again = loads.over_nbd(pair[1].uri, miss, 0, turn)  # the same places: hits
            echo = echo_us(min(requests, 2000), pair.folder / "keys")
            pair[1].ask("resume")
        for name, value in (
            ("pair us", new.mean_us),
            ("p99 us", new.p99_us),
            ("the same places again us", again.mean_us),
            ("bare echo us", echo),
            ("what it takes beside a hit, in echoes", (new.mean_us - again.mean_us) / echo),
        ):
            found.setdefault(name, []).append(value)
    return {name: quartiles(values) for name, values in found.items()}


def measure_reads(seconds: int) -> Found:
    """A host at node 2 reads what one at node 1 writes at 10 MB/s."""
    took: list[float] = []
    with pair_of(64 * MIB, "--extent-size", "64KiB") as pair:
        command = [
            "fio", "--name=b", "--thread=1", "--ioengine=nbd", f"--uri={pair[1].uri}",
            "--rw=randwrite", "--bs=4k", "--iodepth=1", "--norandommap=1", f"--size={4 * MIB}",
            "--time_based=1", f"--runtime={seconds}", "--rate=10m",
        ]  # fmt: skip
        writer = threading.Thread(target=loads.run, args=(command, seconds + 60))
        before = pair.partner(2)
        with pair[2].host() as host:
            writer.start()
            while not took or writer.is_alive():
                at = len(took) * 7919 % 1024 * 4 * KIB
                began = time.perf_counter()
                host.call(rawnbd.READ, at, 4 * KIB)
                took.append((time.perf_counter() - began) * 1e6)
            host.disconnect()
        after = pair.partner(2)
        writer.join()
        round_trip_us = (after["rtt_seconds"] or 0.0) * 1e6
    return {
        "median us": middle(took),
        "p99 us": part(took, 990),
        "round trip that the nodes measure us": round_trip_us,
        "messages per read": (after["messages_total"] - before["messages_total"]) / len(took),
        "reads that asked": (after["asks_total"] - before["asks_total"]) / len(took),
    }


def await_cut(pair: Pair) -> None:
    while pair[1].ask("status")["partner"]["state"] != "cut":
        time.sleep(0.001)


def measure_cut(turns: int) -> Found:
    """A node stands still: when the other notices, beyond the time-out that is set."""
    late: list[float] = []
    with pair_of(64 * MIB, "--partner-timeout", f"{TIMEOUT_S * 1000:.0f}ms") as pair:
        for _ in range(turns):
            began = time.monotonic()
            os.kill(pair[2].pid, signal.SIGSTOP)
            await_cut(pair)
            late.append(time.monotonic() - began - TIMEOUT_S)
            os.kill(pair[2].pid, signal.SIGCONT)
            pair.until(1, "paired")
            pair.until(2, "paired")
    return {"noticed after the time-out s": quartiles(late), "at the latest s": max(late)}


class _Disk:
    """A record device that takes 1 ms for whatever it is asked."""

    name = "record"
    block_size_bytes = 512
    size_bytes = GIB

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.writes = 0

    def write(self, offset: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        self.writes += 1
        self._loop.call_later(0.001, done, None)


def measure_destage() -> Found:
    """All of the record of 1 TiB, which counted in memory alone, is written at once."""

    async def run() -> Found:
        loop = asyncio.get_running_loop()
        geometry = Geometry(TIB, MIB, 4 * KIB)
        disk: Any = _Disk(loop)
        loaded = load_image(blank_image(geometry))
        store = RecordStore(geometry, loaded, disk, loop, lambda *_, **__: None)
        store.note(((0, geometry.extents),))
        done: asyncio.Future[OSError | None] = loop.create_future()
        began = time.perf_counter()
        store.destage(done.set_result)
        await done
        return {"page writes": disk.writes, "ms": (time.perf_counter() - began) * 1000}

    return asyncio.run(run())


def measure_live_exchange(runs: int, size_bytes: int) -> Found:
    """A node of a large volume comes back after a cut, while a host writes what is recorded."""
    options = (
        "--extent-size", "1MiB", "--record-limit", f"{size_bytes}B", "--initial-sync", "skip",
        "--yes", "--partner-timeout", f"{TIMEOUT_S * 1000:.0f}ms", "--predictor", "lru",
    )  # fmt: skip
    step = size_bytes // runs // MIB * MIB
    with pair_of(size_bytes, *options) as pair, pair[1].host() as host:
        pair[1].ask("pause")
        for number in range(runs):
            host.submit(rawnbd.WRITE, number * step, 4 * KIB, bytes(4 * KIB))
            while host.in_flight > 31 or (number == runs - 1 and host.in_flight):
                host.reply()
        os.kill(pair[2].pid, signal.SIGSTOP)
        await_cut(pair)
        before = pair.partner(1)["exchanges_total"]
        took: list[tuple[float, float]] = []
        ended = threading.Event()

        def hits() -> None:
            while not ended.is_set():
                at = time.monotonic()
                host.call(rawnbd.WRITE, len(took) % runs * step, 4 * KIB, bytes(4 * KIB))
                took.append((at, (time.monotonic() - at) * 1000))

        writer = threading.Thread(target=hits)
        writer.start()
        with pair[1].events() as events:
            began = time.monotonic()
            os.kill(pair[2].pid, signal.SIGCONT)
            for _ in range(before + 1):
                told = events.wait("records-exchanged")
            until = time.monotonic()
        ended.set()
        writer.join()
    meanwhile = [ms for at, ms in took if began <= at <= until]
    return {
        "own extents": told["own_extents"],
        "until paired again s": until - began,
        "hits meanwhile": len(meanwhile),
        "hits meanwhile, p99 ms": part(meanwhile, 990),
        "hits meanwhile, longest ms": max(meanwhile),
    }


def measure_flaps(seconds: int) -> Found:
    """The link ends every 100 ms while a host at each node writes."""
    with (
        tempfile.TemporaryDirectory(prefix="bp", dir="/dev/shm") as folder,
        Pair(Path(folder), 64 * MIB, "--extent-size", "64KiB") as pair,
    ):
        home = Path(folder)
        said = pair[2].options
        said[said.index("--partner") + 1] = f"unix://{home}/link"
        link = Link(home / "link", home / "p1")
        try:
            pair.create()
            pair.start()
            answered: list[list[float]] = [[], []]
            ended = threading.Event()

            def write(node: int) -> None:
                with pair[node].host() as host:
                    number = 0
                    while not ended.is_set():
                        number += 1
                        at = (number * 7919 + node) % 16384 * 4 * KIB
                        host.call(rawnbd.WRITE, at, 4 * KIB, bytes(4 * KIB))
                        answered[node - 1].append(time.monotonic())
                    host.disconnect()

            threads = [threading.Thread(target=write, args=(node,)) for node in (1, 2)]
            for thread in threads:
                thread.start()
            began, before = time.monotonic(), 0
            while (passed := time.monotonic() - began) < seconds:
                if not before and passed > seconds / 4:  # what is kept for reuse is there by now
                    before = max(machine.resident_bytes(pair[n].pid)[0] for n in (1, 2))
                ended.wait(0.1)
                link.cut()
            grown = max(machine.resident_bytes(pair[n].pid)[0] for n in (1, 2)) - before
            ended.set()
            for thread in threads:
                thread.join()
            exchanges = pair.partner(1)["exchanges_total"]
        finally:
            link.close()
    waits = [max(b - a for a, b in pairwise(times)) for times in answered if times]
    return {
        "exchanges": exchanges,
        "memory grown by": grown,
        "writes": sum(map(len, answered)),
        "longest wait of a host s": max(waits),
    }


def measure_trace(name: str, writes: int, size_bytes: int) -> Found:
    """A recorded trace at each node, in halves of the volume, and a record of 256 MiB."""
    with gzip.open(TRACES / name, "rt") as file:
        rows = [
            (int(row["offset_bytes"]), min(int(row["length_bytes"]), MIB))
            for row in islice((r for r in csv.DictReader(file) if r["op"] == "W"), writes)
        ]
    half = size_bytes // 2
    with pair_of(size_bytes, "--record-limit", "256MiB") as pair:
        before = [pair[node].status() for node in (1, 2)]

        def replay(node: int) -> None:
            with pair[node].host() as host:
                for offset, length in rows:
                    at = offset % (half - MIB) + (node - 1) * half
                    host.submit(rawnbd.WRITE, at, length, bytes(length))
                    while host.in_flight > 7:
                        host.reply()
                while host.in_flight:
                    host.reply()
                host.disconnect()

        threads = [threading.Thread(target=replay, args=(node,)) for node in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = [pair[node].status() for node in (1, 2)]

    def per_1000(key: str) -> float:
        changes = zip(before, after, strict=True)
        if key in before[0]:
            return 1000 * sum(b[key] - a[key] for a, b in changes) / made
        return 1000 * sum(b["partner"][key] - a["partner"][key] for a, b in changes) / made

    made = sum(b["writes_total"] - a["writes_total"] for a, b in zip(before, after, strict=True))
    return {
        "writes": made,
        "misses per 1,000 writes": per_1000("misses_total"),
        "messages per 1,000 writes": per_1000("messages_total"),
    }
