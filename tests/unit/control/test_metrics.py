"""Metrics: what a real HTTP client reads, what is refused."""

from __future__ import annotations

import asyncio
import http.client
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the optional prometheus-client is not installed")
from prometheus_client.parser import text_string_to_metric_families

from bitmapd.control.metrics import CONNECTION_LIMIT, MetricsServer, render
from bitmapd.errors import UsageError

STATUS: dict[str, Any] = {
    "name": "vol0",
    "state": "resyncing",
    "size_bytes": 1 << 40,
    "dirty_bytes": 65536,
    "lag_seconds": 0.5,
    "record_bytes": 3 << 20,
    "record_extents": 3,
    "record_limit_bytes": None,
    "writes_total": 10,
    "hits_total": 7,
    "misses_total": 3,
    "record_updates_total": 2,
    "record_clears_total": 1,
    "copied_bytes_total": 1 << 20,
    "record_wait_seconds": 6.5,
    "primary_errors_total": 4,
    "era": 9,
    "resync": {"total_bytes": 100, "remaining_bytes": 40},
}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="met") as name:
        yield Path(name)


def samples(text: str) -> dict[str, float]:
    return {
        sample.name + (f"/{sample.labels['state']}" if "state" in sample.labels else ""): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels["volume"] == "vol0"
    }


def test_the_status_as_metrics() -> None:
    got = samples(render(STATUS).decode())
    assert got["bitmapd_size_bytes"] == 1 << 40
    assert got["bitmapd_lag_seconds"] == 0.5
    assert got["bitmapd_writes_total"] == 10
    assert got["bitmapd_copied_bytes_total"] == 1 << 20
    assert got["bitmapd_record_wait_seconds"] == 6.5
    assert got["bitmapd_primary_errors_total"] == 4
    assert got["bitmapd_resync_remaining_bytes"] == 40
    assert got["bitmapd_state/resyncing"] == 1
    assert got["bitmapd_state/in-sync"] == 0
    assert "bitmapd_record_limit_bytes" not in got
    assert samples(render(STATUS | {"resync": None}).decode())["bitmapd_resync_total_bytes"] == 0


def test_a_pair_adds_its_own() -> None:
    partner = {
        "state": "paired", "serving": True, "own_extents": 5, "partner_extents": 6,
        "owed_extents": 1, "record_fallback": True, "waiting_requests": 2,
        "oldest_wait_seconds": 0.25, "rtt_seconds": None, "term": 3,
        "messages_total": 40, "asks_total": 10, "handovers_total": 7, "exchanges_total": 2,
    }  # fmt: skip
    got = samples(render(STATUS | {"partner": partner}).decode())
    assert {name: value for name, value in got.items() if "_partner_" in name} == {
        "bitmapd_partner_up": 1,
        "bitmapd_partner_own_extents": 5,
        "bitmapd_partner_extents": 6,
        "bitmapd_partner_owed_extents": 1,
        "bitmapd_partner_serving": 1,
        "bitmapd_partner_record_fallback": 1,
        "bitmapd_partner_waiting_requests": 2,
        "bitmapd_partner_oldest_wait_seconds": 0.25,
        "bitmapd_partner_term": 3,
        "bitmapd_partner_messages_total": 40,
        "bitmapd_partner_asks_total": 10,
        "bitmapd_partner_handovers_total": 7,
        "bitmapd_partner_exchanges_total": 2,
    }
    cut = samples(render(STATUS | {"partner": partner | {"state": "cut"}}).decode())
    assert cut["bitmapd_partner_up"] == 0
    single = samples(render(STATUS | {"partner": None}).decode())
    assert not [name for name in single if "_partner_" in name]


def test_points_have_metrics_where_there_are_some() -> None:
    points = {
        "age_seconds": 31.5, "interval_seconds": 30.0, "number": 4, "spool_bytes": 9,
        "spool_limit_bytes": 99, "spool_file_bytes": None, "spool_file_limit_bytes": 0,
        "committed_total": 3, "wire_bytes_total": 1000,
        "changed_bytes_total": 4096, "cbw_total": 2,
        "cbw_wait_seconds_total": 0.25, "void_total": {"slow": 1, "spool": 0},
    }  # fmt: skip
    receiver = {
        "connected": True,
        "committed": 4,
        "applied": 3,
        "queued_bytes": 8,
        "in_place": True,
    }
    status = STATUS | {"points": points, "receiver": receiver}
    text = render(status).decode()
    got = {name: value for name, value in samples(text).items() if "point" in name}
    assert got == {
        "bitmapd_point_age_seconds": 31.5,
        "bitmapd_point_interval_seconds": 30.0,
        "bitmapd_point_number": 4,
        "bitmapd_points_committed_total": 3,
        "bitmapd_point_wire_bytes_total": 1000,
        "bitmapd_point_changed_bytes_total": 4096,
        "bitmapd_point_void_total": 0,  # of the last reason
    }
    assert 'bitmapd_point_void_total{reason="slow",volume="vol0"} 1.0' in text
    rest = samples(text)
    assert (rest["bitmapd_receiver_up"], rest["bitmapd_receiver_applied"]) == (1, 3)
    assert rest["bitmapd_receiver_in_place"] == 1
    assert "bitmapd_receiver_in_place_until" not in rest, "the receiver says that"
    assert (rest["bitmapd_cbw_total"], rest["bitmapd_spool_bytes"]) == (2, 9)
    assert rest["bitmapd_spool_file_limit_bytes"] == 0
    assert "bitmapd_spool_file_bytes" not in rest, "there is no file"
    unknown = samples(render(status | {"points": points | {"age_seconds": None}}).decode())
    assert "bitmapd_point_age_seconds" not in unknown
    plain = samples(render(STATUS | {"points": None, "receiver": None}).decode())
    assert not [name for name in plain if "point" in name or "_receiver_" in name]


def test_a_receiver_says_more_of_itself_than_its_sender_does() -> None:
    own = {
        "connected": False, "committed": 4, "applied": 3, "queued_bytes": 8, "journal_bytes": 9,
        "journal_limit_bytes": 99, "in_place_until": None, "committed_timestamp_seconds": 7.5,
    }  # fmt: skip
    status = {"name": "vol0", "state": "receiving", "points": None, "receiver": own}
    got = samples(render(status).decode())
    assert {name: value for name, value in got.items() if "_receiver_" in name} == {
        "bitmapd_receiver_up": 0,
        "bitmapd_receiver_committed": 4,
        "bitmapd_receiver_applied": 3,
        "bitmapd_receiver_queued_bytes": 8,
        "bitmapd_receiver_journal_bytes": 9,
        "bitmapd_receiver_journal_limit_bytes": 99,
        "bitmapd_receiver_committed_timestamp_seconds": 7.5,
        "bitmapd_receiver_in_place_until": 0,  # known: it is not so
    }
    assert got["bitmapd_state/receiving"] == 1
    meanwhile = status | {"receiver": own | {"in_place_until": 5}}
    assert samples(render(meanwhile).decode())["bitmapd_receiver_in_place_until"] == 5


def fetch(connection: http.client.HTTPConnection, method: str, target: str) -> tuple[int, str]:
    connection.request(method, target)
    response = connection.getresponse()
    return response.status, response.read().decode()


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=5)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(5)
        self.sock.connect(str(self.path))


def test_over_a_unix_socket(folder: Path) -> None:
    path = folder / "m"

    async def main() -> None:
        server = MetricsServer(f"unix:{path}", lambda: STATUS)
        await server.start()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        status, text = await asyncio.to_thread(fetch, UnixConnection(path), "GET", "/metrics?x=1")
        assert status == 200
        assert samples(text)["bitmapd_era"] == 9
        assert (await asyncio.to_thread(fetch, UnixConnection(path), "GET", "/"))[0] == 404
        assert (await asyncio.to_thread(fetch, UnixConnection(path), "POST", "/metrics"))[0] == 405
        await server.close()
        assert not path.exists()

    asyncio.run(main())


def test_over_loopback() -> None:
    async def main() -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = MetricsServer(f"127.0.0.1:{port}", lambda: STATUS)
        await server.start()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        status, text = await asyncio.to_thread(fetch, connection, "GET", "/metrics")
        assert status == 200
        assert samples(text)["bitmapd_hits_total"] == 7
        await server.close()

    asyncio.run(main())


@pytest.mark.parametrize("data", [b"GET /metrics HTTP/1.1\r\n", b"x" * 20_000, b""])
def test_what_is_no_request_is_dropped(
    folder: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitmapd.control.metrics.TIMEOUT_S", 0.05)
    path = folder / "m"

    def client_side() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(path))
            try:
                sock.sendall(data)
                return sock.recv(100)
            except ConnectionError:
                return b""

    async def main() -> bytes:
        server = MetricsServer(f"unix:{path}", lambda: STATUS)
        await server.start()
        got = await asyncio.to_thread(client_side)
        await server.close()
        return got

    assert asyncio.run(main()) == b""


def test_connections_are_limited_and_end_with_the_server(folder: Path) -> None:
    path = folder / "m"

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(str(path))
        return sock

    async def main() -> None:
        server = MetricsServer(f"unix:{path}", lambda: STATUS)
        await server.start()
        idle = [connect() for _ in range(CONNECTION_LIMIT)]
        await asyncio.sleep(0)
        with connect() as one_too_many:
            assert await asyncio.to_thread(one_too_many.recv, 1) == b""
        await server.close()
        for sock in idle:
            assert await asyncio.to_thread(sock.recv, 1) == b""
            sock.close()

    asyncio.run(main())


def test_a_server_that_never_started_closes() -> None:
    asyncio.run(MetricsServer("127.0.0.1:9", lambda: STATUS).close())


def test_an_address_that_others_reach_is_refused() -> None:
    with pytest.raises(UsageError, match="loopback"):
        MetricsServer("0.0.0.0:9500", lambda: STATUS)


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UsageError) as caught:
        MetricsServer("127.0.0.1:9", lambda: STATUS)
    assert "pip install" in str(caught.value.hint)
