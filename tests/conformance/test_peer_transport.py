"""Two nodes over real sockets: who comes in, what is refused, what a cut leaves."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from bitmapd.errors import BusyError, NotFoundError, UsageError
from bitmapd.net.tls import fingerprint, node_context
from bitmapd.net.uri import PartnerUri
from bitmapd.peer import frames
from bitmapd.peer.connection import Connection
from bitmapd.peer.frames import ErrorCode, Kind, Part, PeerError, Reader
from bitmapd.peer.link import MAX_OUTPUT_BYTES
from bitmapd.peer.transport import MOST_ARRIVING, PeerTransport, Settings
from dmctl.cli.partnerkeys import make_partner_keys
from tests.support.needs import lacks, need
from tests.support.peers import HELLO, Node, free_port, unix_pair

LIMIT_S = 60  # nothing here takes a tenth of it


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """In a loop of its own, to which no callback's exception may come."""

    async def whole() -> None:
        faults: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: faults.append(context))
        async with asyncio.timeout(LIMIT_S):
            await scenario()
        assert not faults

    asyncio.run(whole())


@contextmanager
def nodes(*settings: Settings, greet: bool = True) -> Iterator[list[Node]]:
    made = [Node(one, greet) for one in settings]
    try:
        for node in made:
            node.transport.start()
        yield made
    finally:
        for node in made:
            node.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pair` with a and b, `other` with the same names and another authority."""
    need("openssl")
    folder = tmp_path_factory.mktemp("keys")
    make_partner_keys(folder / "pair", ["node-a", "node-b"])
    make_partner_keys(folder / "other", ["node-a", "node-b"])
    return folder


def tls_pair(keys: Path) -> tuple[Settings, Settings]:
    uri = PartnerUri("127.0.0.1", free_port())
    return (
        Settings(None, uri, "node-b", keys / "pair" / "node-a"),
        Settings(uri, None, "node-a", keys / "pair" / "node-b"),
    )


@pytest.fixture(params=["unix", "tls"])
def pair(request: pytest.FixtureRequest, short_path: Path) -> tuple[Settings, Settings]:
    if request.param == "unix":
        return unix_pair(short_path)
    return tls_pair(request.getfixturevalue("keys"))


def data(number: int, length: int = 100) -> Part:
    return Part(Kind.ADD, 0, number, bytes([number & 255]) * length)


def test_two_nodes_find_and_hear_one_another(pair: tuple[Settings, Settings]) -> None:
    async def scenario() -> None:
        with nodes(*pair) as (one, other):
            here, there = await one.greeted(), await other.greeted()
            assert here.send([data(n) for n in range(300)]) == 301
            there.send([data(n) for n in range(200)])
            await one.until(lambda: len(one.got) == 201)
            await other.until(lambda: len(other.got) == 301)
            assert [frame.request for frame in other.got] == [0, *range(300)]
            assert one.failures == other.failures == []

    run(scenario)


def test_much_output_waits_in_order_and_its_owner_hears_when_there_is_room(
    pair: tuple[Settings, Settings],
) -> None:
    async def scenario() -> None:
        with nodes(*pair) as (one, other):
            here = await one.greeted()
            await other.greeted()
            for number in range(12):
                here.send([data(number, 1 << 20)])
            assert here.link.queued_bytes > MAX_OUTPUT_BYTES
            assert not here.link.has_room
            await one.until(lambda: one.drains)
            assert here.link.has_room
            await other.until(lambda: len(other.got) == 13)
            assert [frame.request for frame in other.got[1:]] == list(range(12))
            assert one.drains == 1

    run(scenario)


def test_a_peer_that_goes_while_output_waits_is_lost_once(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the moment in which the transport has room again: what is written there ends it, and
    asyncio ends it once more (CPython issue 156512)."""

    async def scenario() -> None:
        listens, _ = unix_pair(short_path)
        with nodes(listens) as (one,), Raw(listens) as client:
            resumes = Connection.resume_writing

            def goes(connection: Connection) -> None:
                client.sock.close()
                resumes(connection)

            monkeypatch.setattr(Connection, "resume_writing", goes)
            await client.greet()
            here = await one.greeted()
            here.send([data(number, 1 << 20) for number in range(8)])
            while client.sock.fileno() >= 0:
                with suppress(BlockingIOError):
                    client.sock.recv(1 << 20)
                await asyncio.sleep(0)
            await one.until(lambda: one.losses)
            await asyncio.sleep(0.01)  # the second end would come in the next turn
            assert len(one.losses) == 1

    run(scenario)


def test_what_was_sent_before_a_close_arrives(pair: tuple[Settings, Settings]) -> None:
    async def scenario() -> None:
        with nodes(*pair) as (one, other):
            here = await one.greeted()
            await other.greeted()
            here.send([data(number, 1 << 20) for number in range(4)])
            here.send([Part(Kind.BYE, 0, 0, b"\1")])
            one.close()
            await other.until(lambda: Kind.BYE in other.kinds)
            await other.until(lambda: other.losses)
            assert len(other.got) == 6
            assert one.losses == []  # who closes hears nothing

    run(scenario)


def test_after_a_loss_it_is_dialled_again(pair: tuple[Settings, Settings]) -> None:
    async def scenario() -> None:
        with nodes(*pair) as (one, other):
            for losses in range(3):
                connection = await one.greeted()
                await other.until(lambda losses=losses: len(other.losses) == losses)
                await other.greeted()
                connection.close()
                one.connections.remove(connection)
            await one.greeted()

    run(scenario)


def test_dialling_can_be_stopped_and_begun_again(short_path: Path) -> None:
    async def scenario() -> None:
        listens, dials = unix_pair(short_path)
        with nodes(dials) as (other,):
            await other.until(lambda: other.failures)
            other.transport.dial(False)
            with nodes(listens) as (one,):
                turn = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_later(0.5, turn.set_result, None)
                await turn
                assert not one.connections
                other.transport.dial(True)
                await one.greeted()
        assert "cannot reach unix://" in other.failures[0]

    run(scenario)


def test_small_frames_of_one_turn_are_one_send(short_path: Path) -> None:
    async def scenario() -> None:
        listens, _ = unix_pair(short_path)
        with nodes(listens) as (one,), Raw(listens) as raw:
            await raw.greet()
            connection = await one.greeted()
            await raw.read(frames.HEADER_BYTES + len(HELLO.payload))
            for number in range(20):
                connection.send([data(number)])
            assert len(await raw.read(1 << 16)) == 20 * (frames.HEADER_BYTES + 100)

    run(scenario)


class Raw:
    """A client without our code on its side; `piece_bytes` at a time."""

    def __init__(self, settings: Settings) -> None:
        assert settings.listen is not None
        path = settings.listen.socket_path
        if path is not None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(path)
        else:
            self.sock = socket.create_connection((settings.listen.host, settings.listen.port))
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    async def send(self, raw: bytes) -> None:
        await self._loop.sock_sendall(self.sock, raw)

    async def greet(self) -> None:
        await self.send(frames.encode(HELLO, 1))

    async def read(self, most: int) -> bytes:
        return await self._loop.sock_recv(self.sock, most)

    async def ended(self) -> bytes:
        """Everything until the other side has closed."""
        got = b""
        try:
            while more := await self.read(1 << 16):
                got += more
        except ConnectionResetError:
            pass
        return got


def test_a_cut_at_any_byte_is_a_loss_and_no_frame(short_path: Path) -> None:
    stream = frames.encode(HELLO, 1) + frames.encode(data(7), 2)
    ends = (len(frames.encode(HELLO, 1)), len(stream))

    async def scenario() -> None:
        listens, _ = unix_pair(short_path)
        with nodes(listens) as (one,):
            for length in range(len(stream) + 1):
                before, losses, failures = len(one.got), len(one.losses), len(one.failures)
                with Raw(listens) as raw:
                    await raw.send(stream[:length])
                whole = sum(end <= length for end in ends)
                if whole:
                    await one.until(lambda losses=losses: len(one.losses) > losses)
                else:
                    await one.until(lambda failures=failures: len(one.failures) > failures)
                assert len(one.got) - before == whole
            assert not one.connections

    run(scenario)


def test_bytes_may_drip(short_path: Path) -> None:
    async def scenario() -> None:
        listens, _ = unix_pair(short_path)
        with nodes(listens) as (one,), Raw(listens) as raw:
            for byte in frames.encode(HELLO, 1) + frames.encode(data(7), 2):
                await raw.send(bytes([byte]))
            await one.until(lambda: len(one.got) == 2)
            assert one.got[1].payload == data(7).payload

    run(scenario)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n", ErrorCode.HEADER),
        (frames.encode(Part(Kind.HELLO, 0, 0, bytes(4097)), 1), ErrorCode.TOO_LONG),
        (frames.encode(HELLO, 2), ErrorCode.BROKEN),
    ],
)
def test_a_wrong_first_frame_gets_an_error_and_no_owner(
    short_path: Path, raw: bytes, code: ErrorCode
) -> None:
    async def scenario() -> None:
        listens, _ = unix_pair(short_path)
        with nodes(listens) as (one,), Raw(listens) as client:
            await client.send(raw)
            reader = Reader()
            reader.feed(await client.ended())
            frame = reader.take()
            assert frame is not None
            assert frame.kind == Kind.ERROR
            assert frame.payload[0] == code
            assert not one.connections
            assert not one.losses
            assert len(one.failures) == 1

    run(scenario)


def test_a_wrong_later_frame_ends_a_connection_and_says_why(short_path: Path) -> None:
    async def scenario() -> None:
        listens, _ = unix_pair(short_path)
        with nodes(listens) as (one,), Raw(listens) as client:
            await client.greet()
            connection = await one.greeted()
            await client.send(frames.encode(data(1), 2) + frames.encode(data(2), 4))
            await one.until(lambda: one.losses)
            assert one.losses == ["frame 4 came after frame 2 of the connection"]
            assert connection.error is not None
            assert connection.error.code is ErrorCode.BROKEN
            assert len(one.got) == 2
            assert b"frame 4 came after frame 2" in await client.ended()

    run(scenario)


def test_five_errors_in_a_minute_slow_the_dialling_down(short_path: Path) -> None:
    class Refuses(Node):
        def connected(self, connection):  # type: ignore[no-untyped-def]
            connection.close(PeerError(ErrorCode.OTHER, "another volume"))
            self.failed("again")

    async def scenario() -> None:
        listens, dials = unix_pair(short_path)
        one, other = Refuses(listens), Node(dials)
        one.transport.start()
        other.transport.start()
        await one.until(lambda: len(one.failures) >= 5)
        await other.until(lambda: len(other.losses) == 5)
        backoff = other.transport._backoff
        assert backoff.next_s(asyncio.get_running_loop().time()) == 30.0
        one.close()
        other.close()

    run(scenario)


def test_a_node_that_says_nothing_more_is_lost(short_path: Path) -> None:
    async def scenario() -> None:
        listens, _ = unix_pair(short_path, timeout_s=0.2)
        with nodes(listens) as (one,), Raw(listens) as client:
            await client.greet()
            await one.until(lambda: one.losses)
            assert one.losses == ["nothing came from the other node for 0.2 s"]
            assert one.pings  # before it gave up
            await client.ended()

    run(scenario)


def test_a_node_that_reads_nothing_is_lost(short_path: Path) -> None:
    async def scenario() -> None:
        listens, _ = unix_pair(short_path, timeout_s=0.5)
        with nodes(listens) as (one,), Raw(listens) as client:
            await client.greet()
            connection = await one.greeted()
            connection.send([data(number, 1 << 20) for number in range(8)])
            number = 1
            while not one.losses:
                number += 1
                try:
                    await client.send(frames.encode(Part(Kind.PING, 0, 0, b""), number))
                except OSError:
                    break
                await asyncio.sleep(0.05)
            await one.until(lambda: one.losses)
            assert one.losses == ["the other node has read nothing for 0.5 s"]

    run(scenario)


def test_pings_keep_an_idle_connection(pair: tuple[Settings, Settings]) -> None:
    async def scenario() -> None:
        quick = [replace(one, timeout_s=0.4) for one in pair]
        with nodes(*quick) as (one, other):
            await one.greeted()
            await other.greeted()
            await one.until(lambda: one.kinds.count(Kind.PING) > 12)
            assert one.losses == other.losses == []

    run(scenario)


def test_a_second_connection_goes_to_the_owner_too(short_path: Path) -> None:
    async def scenario() -> None:
        listens, dials = unix_pair(short_path)
        with nodes(listens, dials) as (one, other):
            await one.greeted()
            await other.greeted()
            with Raw(listens) as second:
                await second.greet()
                await one.until(lambda: len(one.connections) == 2)
                one.connections.pop(0).close()  # as if lost
                await other.until(lambda: other.losses)
            assert other.losses == ["the other node ended the connection"]

    run(scenario)


def test_those_that_say_nothing_do_not_keep_the_partner_out(
    pair: tuple[Settings, Settings],
) -> None:
    async def scenario() -> None:
        listens, dials = pair
        with nodes(listens) as (one,):
            flood = [Raw(listens) for _ in range(20)]
            await one.until(lambda: len(one.failures) == len(flood) - MOST_ARRIVING)
            with nodes(dials) as (other,):
                await one.greeted()
                await other.greeted()
            assert all("it said nothing" in failure for failure in one.failures)
            for raw in flood[:-MOST_ARRIVING]:
                assert await raw.ended() == b""
            for raw in flood:
                raw.sock.close()

    run(scenario)


def test_who_says_nothing_has_to_go(
    pair: tuple[Settings, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitmapd.peer.transport.ARRIVAL_S", 0.2)

    async def scenario() -> None:
        with nodes(pair[0]) as (one,), Raw(pair[0]) as raw:
            assert await raw.ended() == b""
            await one.until(lambda: one.failures)
            assert "it said nothing for 0.2 s" in one.failures[0]
            assert not one.transport._arriving

    run(scenario)


def test_a_node_that_stops_lets_nobody_wait(pair: tuple[Settings, Settings]) -> None:
    async def scenario() -> None:
        with nodes(pair[0]) as (one,):
            raw = Raw(pair[0])
            await one.until(lambda: True)
            while not one.transport._arriving:
                await asyncio.sleep(0)
            one.close()
            assert await raw.ended() == b""
            raw.sock.close()
            assert pair[0].listen is not None
            path = pair[0].listen.socket_path
            assert path is None or not os.path.exists(path)

    run(scenario)


# -- who may come in ----------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["listens", "dials"])
@pytest.mark.parametrize("what", ["authority", "name", "pin"])
def test_a_stranger_stays_outside(keys: Path, side: str, what: str) -> None:
    """`side` is the one that does not trust the other."""

    async def scenario() -> None:
        listens, dials = tls_pair(keys)
        judge, stranger = (listens, dials) if side == "listens" else (dials, listens)
        if what == "authority":
            own_name = "node-b" if side == "listens" else "node-a"
            wrong = replace(stranger, certificates=keys / "other" / own_name)
            wrong_ca = keys / "pair" / own_name / "ca-cert.pem"
            trusts = keys / f"trusting-{side}"
            trusts.mkdir(exist_ok=True)
            for name in ("node-cert.pem", "node-key.pem"):
                (trusts / name).write_bytes((wrong.certificates / name).read_bytes())
            (trusts / "ca-cert.pem").write_bytes(wrong_ca.read_bytes())
            stranger = replace(stranger, certificates=trusts)
        elif what == "name":
            judge = replace(judge, name="node-c")
        else:
            judge = replace(judge, fingerprint="00" * 32)
        with nodes(judge, stranger) as (one, other):
            await one.until(lambda: len(one.failures) >= 2)
            assert not one.connections
            assert not any(connection.link.is_greeted for connection in other.connections)
            expected = {"authority": "certificate", "name": "node-c", "pin": "fingerprint"}[what]
            assert expected in one.failures[0]

    run(scenario)


def test_a_pinned_certificate_comes_in(keys: Path) -> None:
    def pin(name: str) -> str:
        text = (keys / "pair" / name / "node-cert.pem").read_text()
        digits = fingerprint(ssl.PEM_cert_to_DER_cert(text)).upper()
        return ":".join(digits[i : i + 2] for i in range(0, 64, 2))

    async def scenario() -> None:
        listens, dials = tls_pair(keys)
        pinned = (
            replace(listens, fingerprint=pin("node-b")),
            replace(dials, fingerprint=pin("node-a")),
        )
        with nodes(*pinned) as (one, other):
            await one.greeted()
            await other.greeted()

    run(scenario)


def test_an_address_in_the_certificate_is_a_name(tmp_path: Path) -> None:
    need("openssl")
    make_partner_keys(tmp_path / "k", ["127.0.0.1", "::1"])

    async def scenario() -> None:
        uri = PartnerUri("127.0.0.1", free_port())
        listens = Settings(None, uri, "0:0:0:0:0:0:0:1", tmp_path / "k" / "127.0.0.1")
        dials = Settings(uri, None, "127.0.0.1", tmp_path / "k" / "::1")
        with nodes(listens, dials) as (one, other):
            await one.greeted()
            await other.greeted()

    run(scenario)


def test_without_a_certificate_or_with_an_old_protocol_nobody_comes_in(keys: Path) -> None:
    async def scenario() -> None:
        listens, _ = tls_pair(keys)
        assert listens.listen is not None
        address = (listens.listen.host, listens.listen.port)
        bare = ssl.create_default_context(cafile=str(keys / "pair" / "node-a" / "ca-cert.pem"))
        bare.check_hostname = False
        old = node_context(keys / "pair" / "node-b", accepts=False)
        old.minimum_version = ssl.TLSVersion.TLSv1_2
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with nodes(listens) as (one,):
            for number, context in enumerate((bare, old), 1):
                await asyncio.to_thread(handshake_fails, address, context)
                await one.until(lambda number=number: len(one.failures) == number)
            assert not one.connections

    run(scenario)


def handshake_fails(address: tuple[str | None, int], context: ssl.SSLContext) -> None:
    """With TLS 1.3 a client learns that it was refused when it reads."""
    with socket.create_connection(address) as sock, suppress(OSError):
        tls = context.wrap_socket(sock, server_hostname="node-a")
        tls.send(frames.encode(HELLO, 1))
        assert tls.recv(1000) == b""


def test_another_user_stays_outside(short_path: Path) -> None:
    if os.geteuid() != 0:
        lacks("root, to become another user")

    async def scenario() -> None:
        listens, _ = unix_pair(short_path)
        assert listens.listen is not None
        assert listens.listen.socket_path is not None
        with nodes(listens) as (one,):
            short_path.chmod(0o755)
            os.chmod(listens.listen.socket_path, 0o777)  # noqa: S103
            code = (
                "import os, socket, sys\n"
                "os.setuid(65534)\n"
                "s = socket.socket(socket.AF_UNIX)\n"
                "s.connect(sys.argv[1])\n"
                "sys.exit(len(s.recv(1)))\n"
            )
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, listens.listen.socket_path
            )
            assert await process.wait() == 0
            assert "is of user 65534" in one.failures[0]
            assert not one.connections

    run(scenario)


def test_a_node_does_not_dial_another_users_socket(short_path: Path) -> None:
    if os.geteuid() != 0:
        lacks("root, to become another user")
    code = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.bind(sys.argv[1])\n"
        "os.setuid(65534)\n"
        "s.listen(1)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    _, dials = unix_pair(short_path)
    assert dials.dial is not None
    with subprocess.Popen(
        [sys.executable, "-c", code, str(dials.dial.socket_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()

        async def scenario() -> None:
            with nodes(dials) as (other,):
                await other.until(lambda: other.failures)
                assert "is of user 65534" in other.failures[0]
                assert not other.connections

        run(scenario)
        server.communicate()


# -- what cannot be started ---------------------------------------------------------------------
def test_an_address_in_use_is_named(pair: tuple[Settings, Settings]) -> None:
    async def scenario() -> None:
        with nodes(pair[0]):
            second = Node(pair[0])
            with pytest.raises(BusyError) as caught:
                second.transport.start()
            place = pair[0].listen
            assert place is not None
            assert (place.socket_path or str(place)) in caught.value.message
            assert caught.value.hint
            second.close()

    run(scenario)


def test_tls_needs_certificates_and_a_name(keys: Path) -> None:
    async def scenario() -> None:
        listens, dials = tls_pair(keys)
        for broken, error in (
            (replace(listens, name=None), UsageError),
            (replace(dials, certificates=None), UsageError),
            (replace(dials, certificates=keys), NotFoundError),
        ):
            node = Node(broken)
            with pytest.raises(error):
                node.transport.start()
            node.close()

    run(scenario)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70])
def test_a_host_that_cannot_be_found_is_a_failure(keys: Path, host: str) -> None:
    async def scenario() -> None:
        _, dials = tls_pair(keys)
        with nodes(replace(dials, dial=PartnerUri(host, 1))) as (other,):
            await other.until(lambda: other.failures)
            assert f"cannot reach tls://{host}:1" in other.failures[0]

    run(scenario)


def test_a_listener_without_descriptors_looks_away_for_a_while(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitmapd.peer.transport._ACCEPT_PAUSE_S", 0.05)

    class Exhausted:
        """Accepts nothing the first time."""

        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock
            self.asked = 0

        def accept(self) -> tuple[socket.socket, object]:
            self.asked += 1
            if self.asked == 1:
                raise OSError(24, "Too many open files")
            return self.sock.accept()

        def __getattr__(self, name: str) -> object:
            return getattr(self.sock, name)

    async def scenario() -> None:
        listens, dials = unix_pair(short_path)
        one = Node(listens)
        begin = PeerTransport._listen

        def listen(transport: PeerTransport, uri: PartnerUri) -> None:
            begin(transport, uri)
            assert transport._listener is not None
            loop = asyncio.get_running_loop()
            loop.remove_reader(transport._listener.fileno())
            transport._listener = Exhausted(transport._listener)  # type: ignore[assignment]
            loop.add_reader(transport._listener.fileno(), transport._accept, transport._listener)

        monkeypatch.setattr(PeerTransport, "_listen", listen)
        one.transport.start()
        with nodes(dials):
            await one.greeted()
            assert one.failures == ["cannot accept a connection: Too many open files"]
        one.close()

    run(scenario)


def test_who_seeks_dials_until_it_has_met_somebody(short_path: Path) -> None:
    """Two that both only listen would never meet; one that nobody misses is sought quietly."""
    there = PartnerUri(socket_path=str(short_path / "peer"))

    async def scenario() -> None:
        with nodes(Settings(None, None, seek=there, seek_s=0.01)) as (seeks,):
            with nodes(Settings(None, there)) as (listens,):
                await seeks.greeted()
                await listens.greeted()
            await seeks.until(lambda: not seeks.connections)
            assert not seeks.failures
            task = seeks.transport._dialling
            assert task is not None
            await task  # nobody is dialled any more

    run(scenario)


def test_who_was_met_and_lost_before_it_was_sought_is_not_dialled(short_path: Path) -> None:
    here, there = (PartnerUri(socket_path=str(short_path / name)) for name in ("here", "there"))

    async def scenario() -> None:
        with nodes(Settings(None, here, seek=there, seek_s=0.5)) as (seeks,):
            with nodes(Settings(here, None)) as (comes,):
                await seeks.greeted()
                await comes.greeted()
            await seeks.until(lambda: not seeks.connections)
            with nodes(Settings(None, there)) as (listens,):
                task = seeks.transport._dialling
                assert task is not None
                await task
                await asyncio.sleep(0)
                assert not seeks.connections
                assert not listens.connections

    run(scenario)
