"""Metrics in the Prometheus text format, on a unix socket or a loopback address.

Off unless `metrics_listen` is set, and needs the optional package prometheus-client.  The figures
are those of `dmctl status --json`: names with the prefix `bitmapd_`, base units, `_total` for
counters, the volume as the only label besides the state's name.  What is not known is left out.

1. The server answers `GET /metrics` and nothing else, one request a connection, at most
   `CONNECTION_LIMIT` at a time, each within `TIMEOUT_S`, from at most `REQUEST_BYTES`.
2. It never listens on an address that other hosts reach: there is no authentication.
3. A unix socket has mode 0600; give a proxy access by running it as the same user.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitmapd.config.kinds import parse_metrics_listen
from bitmapd.control.states import STATES
from bitmapd.errors import UsageError, refused
from bitmapd.net.sockets import UnixListener, listen_unix

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

CONNECTION_LIMIT = 16
REQUEST_BYTES = 8 << 10
TIMEOUT_S = 5.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Status = Mapping[str, Any]

# Key of the status -> what it is.
GAUGES = {
    "size_bytes": "Size of the volume.",
    "dirty_bytes": "Written and not yet durable on the secondary.",
    "lag_seconds": "How long ago everything written was durable on the secondary.",
    "content_age_seconds": "Age of the oldest content that the secondary lacks.",
    "record_bytes": "What the record names, and a crash would make us copy.",
    "record_extents": "Extents in the record.",
    "record_limit_bytes": "How much the record may name.",
    "record_wait_seconds": "Age of the oldest write to the stored record that is not answered yet.",
    "era": "Number of the era.",
    "direct_extents": "Extents that hosts write in the kernel, without the gate.",
    "suspended_seconds_max": "Longest time that a barrier or a new table made writes wait.",
}
COUNTERS = {
    "writes_total": "Writes of hosts.",
    "hits_total": "Writes whose extents were all in the record.",
    "misses_total": "Writes that put extents into the record.",
    "record_updates_total": "Durable writes to the stored record that a host's write waited for.",
    "record_clears_total": "Lazy writes to the stored record that took extents out.",
    "copied_bytes_total": "Bytes written to the secondary.",
    "record_errors_total": "Writes to the stored record that failed.",
    "primary_errors_total": "Requests of hosts that failed at the primary.",
    "read_errors_total": "Reads of the primary for copying that failed.",
    "gate_writes_total": "Writes that came through the gate (device-mapper).",
    "barriers_total": "Ends of eras in the kernel.",
    "barrier_errors_total": "Barriers that failed and were tried again.",
    "barriers_put_off_total": "Barriers that waited for dm-era to digest earlier eras.",
    "suspended_seconds_total": "Time in which barriers and new tables made writes wait.",
    "table_loads_total": "Changes of the kernel's table, at barriers and between them.",
    "table_moves_total": "Extents that were moved between the gate and the direct path.",
}
# Of a pair: key of `partner` -> what it is.
PARTNER_GAUGES = {
    "own_extents": "Extents that this node may write without asking.",
    "partner_extents": "Extents that the partner may write, as far as this node knows.",
    "owed_extents": "Extents that were given to the partner, which has not confirmed that yet.",
    "serving": "1 while this node lets hosts in.",
    "record_fallback": "1 while the partner's copy counts in the place of this node's record.",
    "waiting_requests": "Requests of hosts that wait for the partner.",
    "oldest_wait_seconds": "How long requests of hosts have waited for the partner.",
    "rtt_seconds": "Last time that a message took there and back.",
    "term": "Grows each time that a node goes on alone.",
}
PARTNER_COUNTERS = {
    "messages_total": "Requests that this node sent to the partner.",
    "asks_total": "Of these, what this node had to ask before a host could read.",
    "handovers_total": "Extents given to the partner because it asked.",
    "exchanges_total": "How often both nodes have exchanged their records.",
}
# Of a volume with a receiver: key of `points` -> name without its prefix, and what it is.
POINT_GAUGES = {
    "age_seconds": ("point_age_seconds", "Age of the newest point that the receiver has."),
    "interval_seconds": ("point_interval_seconds", "How often the volume is cut."),
    "number": ("point_number", "Number of the newest point that the receiver has."),
    "spool_bytes": ("spool_bytes", "Read for a point and not sent."),
    "spool_limit_bytes": ("spool_limit_bytes", "How much of that there may be."),
    "spool_file_bytes": ("spool_file_bytes", "What of it is in the spool's file."),
    "spool_file_limit_bytes": (
        "spool_file_limit_bytes",
        "How much of that there may be; 0 after an error of the file.",
    ),
}
POINT_COUNTERS = {
    "committed_total": ("points_committed", "Points that the receiver has committed."),
    "wire_bytes_total": ("point_wire_bytes", "Bytes that went to the receiver."),
    "changed_bytes_total": (
        "point_changed_bytes",
        "What changed from one committed point to the next, in pieces of 4 KiB.",
    ),
    "cbw_total": ("cbw", "Blocks that were read because a host was about to write them."),
    "cbw_wait_seconds_total": ("cbw_wait_seconds", "Time that hosts waited for these reads."),
}
# Of a receiver: key of `receiver` -> what it is.
RECEIVER_GAUGES = {
    "committed": "Number of the newest point that is durable at the receiver.",
    "applied": "Number of the newest point that is in its image.",
    "queued_bytes": "Committed and not in the image yet.",
    "journal_bytes": "Part of the receiver's journal that is in use.",
    "journal_limit_bytes": "How much of it can be used.",
    "in_place": "1 while what is sent goes into the image at once, which then is no point.",
    "committed_timestamp_seconds": "At the receiver: Unix time of that point's cut, at the volume.",
    "in_place_until": "At the receiver: the point with which that ends; 0 while it is not so.",
}
RESYNC_GAUGES = {
    "total_bytes": "What this resync set out to copy.",
    "remaining_bytes": "What is left of it.",
}


def families(status: Status) -> Iterator[Metric]:
    """The metrics that the status of a volume, keeper or receiver gives."""
    from prometheus_client.core import (  # noqa: PLC0415  (optional package)
        CounterMetricFamily,
        GaugeMetricFamily,
    )

    volume = [str(status["name"])]
    for key, text in GAUGES.items():
        if status.get(key) is not None:
            gauge = GaugeMetricFamily(f"bitmapd_{key}", text, labels=["volume"])
            gauge.add_metric(volume, float(status[key]))
            yield gauge
    for key, text in COUNTERS.items():
        if status.get(key) is not None:
            name = f"bitmapd_{key.removesuffix('_total')}"
            counter = CounterMetricFamily(name, text, labels=["volume"])
            counter.add_metric(volume, float(status[key]))
            yield counter
    partner = status.get("partner")
    if partner is not None:
        yield from _partner_families(volume, partner)
    yield from _point_families(volume, status)
    for key, text in RESYNC_GAUGES.items():
        resync = status.get("resync")
        gauge = GaugeMetricFamily(f"bitmapd_resync_{key}", text, labels=["volume"])
        gauge.add_metric(volume, float(resync[key]) if resync else 0.0)
        yield gauge
    state = GaugeMetricFamily(
        "bitmapd_state", "1 for the state that the volume is in.", labels=["volume", "state"]
    )
    for name in STATES:
        state.add_metric([*volume, name], float(status["state"] == name))
    yield state


def _partner_families(volume: list[str], partner: Status) -> Iterator[Metric]:
    from prometheus_client.core import (  # noqa: PLC0415  (optional package)
        CounterMetricFamily,
        GaugeMetricFamily,
    )

    up = GaugeMetricFamily(
        "bitmapd_partner_up", "1 while both nodes of a pair are there.", labels=["volume"]
    )
    up.add_metric(volume, float(partner["state"] == "paired"))
    yield up
    # What counts extents of either side has the word in its name already.
    for key, text in PARTNER_GAUGES.items():
        if partner[key] is not None:
            name = f"bitmapd_partner_{key.removeprefix('partner_')}"
            gauge = GaugeMetricFamily(name, text, labels=["volume"])
            gauge.add_metric(volume, float(partner[key]))
            yield gauge
    for key, text in PARTNER_COUNTERS.items():
        name = f"bitmapd_partner_{key.removesuffix('_total')}"
        counter = CounterMetricFamily(name, text, labels=["volume"])
        counter.add_metric(volume, float(partner[key]))
        yield counter


def _point_families(volume: list[str], status: Status) -> Iterator[Metric]:
    from prometheus_client.core import (  # noqa: PLC0415  (optional package)
        CounterMetricFamily,
        GaugeMetricFamily,
    )

    points, receiver = status.get("points"), status.get("receiver") or {}
    if points is not None:
        for key, (name, text) in POINT_GAUGES.items():
            if points[key] is not None:
                gauge = GaugeMetricFamily(f"bitmapd_{name}", text, labels=["volume"])
                gauge.add_metric(volume, float(points[key]))
                yield gauge
        for key, (name, text) in POINT_COUNTERS.items():
            counter = CounterMetricFamily(f"bitmapd_{name}", text, labels=["volume"])
            counter.add_metric(volume, float(points[key]))
            yield counter
        voids = CounterMetricFamily(
            "bitmapd_point_void", "Points that were given up.", labels=["volume", "reason"]
        )
        for reason, count in points["void_total"].items():
            voids.add_metric([*volume, reason], float(count))
        yield voids
    if "connected" in receiver:
        up = GaugeMetricFamily(
            "bitmapd_receiver_up", "1 while volume and receiver are connected.", labels=["volume"]
        )
        up.add_metric(volume, float(receiver["connected"]))
        yield up
    known = {key: value for key, value in receiver.items() if value is not None}
    if "in_place_until" in receiver:
        known.setdefault("in_place_until", 0)  # null there says that it is not so
    for key, text in RECEIVER_GAUGES.items():
        if key in known:
            gauge = GaugeMetricFamily(f"bitmapd_receiver_{key}", text, labels=["volume"])
            gauge.add_metric(volume, float(known[key]))
            yield gauge


class _Snapshot:
    """What prometheus-client calls a collector: gives the metrics of this moment."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        return families(self._status)


def render(status: Status) -> bytes:
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(status))
    return generate_latest(registry)


class MetricsServer:
    """Serves `render(status())` at the address of `metrics_listen`; see the module docstring."""

    def __init__(self, listen: str, status: Callable[[], Status]) -> None:
        try:
            import prometheus_client  # noqa: F401, PLC0415
        except ImportError:
            raise UsageError(
                "metrics_listen is set, but the package prometheus-client is not installed",
                hint="install it (pip install 'dmctl[metrics]') or unset metrics_listen",
            ) from None
        self._address = parse_metrics_listen(listen)
        self._status = status
        self._server: asyncio.Server | None = None
        self._unix: UnixListener | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        if isinstance(self._address, Path):
            self._unix = listen_unix(self._address)
            self._server = await asyncio.start_unix_server(
                self._connected, sock=self._unix.sock, limit=REQUEST_BYTES
            )
        else:
            host, port = self._address
            try:
                self._server = await asyncio.start_server(
                    self._connected, host, port, limit=REQUEST_BYTES, reuse_address=True
                )
            except OSError as error:
                plain = OSError(error.errno, os.strerror(error.errno or errno.EIO))
                raise refused(plain, f"cannot serve metrics on {host}:{port}") from error

    async def close(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._unix is not None:
            self._unix.unlink()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is served outside of a task")
        self._tasks.add(task)
        try:
            if len(self._tasks) <= CONNECTION_LIMIT:
                async with asyncio.timeout(TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._answer(head))
                    await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            # Not a request; there is nobody to whom it would be worth explaining.
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        target = rest.partition(b" ")[0].partition(b"?")[0]
        if target != b"/metrics":
            return _response("404 Not Found", b"metrics are at /metrics\n")
        if method != b"GET":
            return _response("405 Method Not Allowed", b"use GET\n")
        return _response("200 OK", render(self._status()))


def _response(status: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
