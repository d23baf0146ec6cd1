"""Hostile neighbours of the export: whoever may come in gets in and is served while they rage."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitmapd.nbd.numbers import Opt, Rep
from bitmapd.net.tls import client_context, server_context
from tests.support.floods import client_hello, flood
from tests.support.nbdcerts import make_certificates
from tests.support.nbdraw import RawClient, info_data, request, write
from tests.support.nbdserve import MIB, HeldDevice, ServerThread

PLACES = 8
# In which a host that may come in does: of a flood that asks for more than one processor can sign,
# as at 150 a second on a machine with other work, one client in n is served, one attempt in n.
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def certificates() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nbdtls") as folder:
        yield make_certificates(Path(folder), "--key-type=rsa", "--bits=4096")


class Export:
    """With TLS; `at_hello` is called where the server reads a ClientHello of a certain name."""

    def __init__(self, certificates: Path, **options: Any) -> None:
        self._context = client_context(certificates / "good", "localhost")
        self._context.check_hostname = False
        context = server_context(certificates / "good")
        self.entered, self.go_on = threading.Event(), threading.Event()

        def at_hello(_: object, name: str | None, __: object) -> None:
            if name == "stuck":
                self.entered.set()
                self.go_on.wait(60)

        context.sni_callback = at_hello
        options = {"tls": context, "max_connections": PLACES} | options
        self.thread = ServerThread(lambda loop, _: HeldDevice(loop, MIB), **options)

    def __enter__(self) -> Export:
        self.thread.__enter__()
        server = self.thread.server
        self.port = self.thread.call(lambda: server.listen_tcp("127.0.0.1", 0))[0][1]
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.thread.__exit__()

    def asked_for_tls(self, source: str = "") -> RawClient:
        client = RawClient(self.port, source=source)
        client.greet()
        assert client.ask(Opt.STARTTLS) == [(Rep.ACK, b"")]
        return client

    def verified(self, source: str = "") -> RawClient:
        return self.secured(self.asked_for_tls(source))

    def secured(self, client: RawClient) -> RawClient:
        client.sock = self._context.wrap_socket(client.sock, server_hostname="localhost")
        # An answer comes only after the server has verified the certificate.
        assert client.ask(Opt.LIST)[-1][0] == Rep.ACK
        return client

    def let_in(self, source: str = "") -> RawClient:
        return enter(self.verified(source))

    def let_in_beside_others(self) -> RawClient:
        """A newcomer that loses its place among so many others begins anew."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(OSError, EOFError):
                return self.let_in()
        return self.let_in()

    def until_accepted(self, count: int) -> None:
        self.thread.until(lambda: self.thread.server.stats.connections_total >= count)


def enter(client: RawClient) -> RawClient:
    assert client.ask(Opt.GO, info_data(""))[-1][0] == Rep.ACK
    return client


@pytest.fixture
def export(certificates: Path) -> Iterator[Export]:
    with Export(certificates) as made:
        yield made


# -- places


def test_a_verified_client_keeps_its_place(export: Export) -> None:
    """Even before it is let in, whatever comes and however far that gets."""
    waiting = export.verified()
    bare = [RawClient(export.port) for _ in range(3 * PLACES)]
    talking = [export.asked_for_tls() for _ in range(3 * PLACES)]
    for client in talking[-PLACES + 1 :]:
        client.send(client_hello())
    export.until_accepted(1 + 6 * PLACES)
    enter(waiting)
    waiting.write(0, b"v" * 512)
    assert waiting.read(0, 512) == b"v" * 512
    for client in (waiting, *bare, *talking):
        client.sock.close()


def test_bare_connections_take_no_place_from_one_that_does_more(export: Export) -> None:
    """Though they come from the same address."""
    talking = export.asked_for_tls()
    bare = [RawClient(export.port) for _ in range(3 * PLACES)]
    export.until_accepted(1 + 3 * PLACES)
    client = enter(export.secured(talking))
    assert client.read(0, 512) == bytes(512)
    for one in (client, *bare):
        one.sock.close()


def test_an_address_that_floods_takes_no_place_from_another(export: Export) -> None:
    """Though it gets further: the victim has not said a word yet."""
    victim = RawClient(export.port, source="127.0.0.2")
    flooding = [export.asked_for_tls() for _ in range(3 * PLACES)]
    export.until_accepted(1 + 3 * PLACES)
    victim.greet()
    victim.ask(Opt.STARTTLS)
    assert enter(export.secured(victim)).read(0, 512) == bytes(512)
    late = export.let_in("127.0.0.3")
    assert late.read(0, 512) == bytes(512)
    for client in (victim, late, *flooding):
        client.sock.close()


def test_verified_clients_fill_all_places_and_no_more(export: Export) -> None:
    inside = [export.let_in() for _ in range(PLACES - 1)]
    inside.append(export.verified())
    with RawClient(export.port) as late:
        assert late.dropped()
    enter(inside[-1])
    for client in inside:
        assert client.read(0, 512) == bytes(512)
        client.sock.close()


def test_one_that_has_hung_up_at_the_door_makes_room(export: Export) -> None:
    """The disk hangs, so nobody is let in; a client that gives up and tries again finds places."""
    dying = export.let_in()
    device = export.thread.device
    export.thread.call(lambda: setattr(device, "held", True))
    dying.send(write(1, 0, bytes(512)) + request(0, magic=1))
    export.thread.until(lambda: device.waiting and not export.thread.server.stats.connections)
    for _ in range(3 * PLACES):
        client = export.verified()
        client.send_option(Opt.GO, info_data(""))
        export.thread.until(lambda: export.thread.server._at_the_door)
        client.sock.close()
    last = export.verified()
    export.thread.call(lambda: setattr(device, "held", False))
    export.thread.call(device.release)
    assert enter(last).read(0, 512) == bytes(512)
    for client in (dying, last):
        client.sock.close()


# -- handshakes of TLS


def test_requests_do_not_wait_for_the_arithmetic_of_tls(export: Export) -> None:
    """Nor does letting in those who are through with it; others wait for their turn."""
    inside, verified = export.let_in(), export.verified()
    hello = client_hello("stuck")
    stuck = [export.asked_for_tls() for _ in range(2)]
    for client in stuck:
        client.send(hello)
    assert export.entered.wait(20)
    inside.write(0, b"s" * 512)
    assert inside.read(0, 512) == b"s" * 512
    assert enter(verified).read(0, 512) == b"s" * 512
    export.go_on.set()
    assert export.let_in().read(0, 512) == b"s" * 512
    for client in (inside, verified, *stuck):
        client.sock.close()


def test_a_connection_is_dropped_during_a_step_and_its_number_kept(certificates: Path) -> None:
    with Export(certificates) as export:
        server = export.thread.server
        before = len(os.listdir("/proc/self/fd"))
        stuck = export.asked_for_tls()
        stuck.send(client_hello("stuck"))
        assert export.entered.wait(20)
        export.thread.call(lambda: next(iter(server._connections)).refuse("too slow"))
        assert stuck.dropped()
        assert server.stats.connections == 0
        stuck.sock.close()
        # The step still uses the socket, so no other file may get its number.
        assert len(os.listdir("/proc/self/fd")) == before + 1
        export.go_on.set()
        export.thread.until(lambda: len(os.listdir("/proc/self/fd")) == before)
        assert export.let_in().read(0, 512) == bytes(512)


# -- floods


@pytest.mark.timeout(400)
@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
@pytest.mark.parametrize(("kind", "rate"), [("connect", 300), ("hello", 37), ("hello", 150)])
def test_floods(certificates: Path, kind: str, rate: float, source: str) -> None:
    with Export(certificates, max_connections=64) as export:
        inside = export.let_in()
        with flood(kind, export.port, rate=rate, source=source):
            for number in range(5):
                inside.write(512 * number, bytes([number]) * 512)
                client = export.let_in_beside_others()
                assert client.read(512 * number, 512) == bytes([number]) * 512
                client.sock.close()
        inside.sock.close()
        refused = [fields for event, fields in export.thread.events if event == "client-dropped"]
        # The log hears of an address once a minute.
        assert len(refused) <= 2
