"""The server over real sockets: memory and fairness, deadlines, stopping, listening."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from bitmapd.errors import BitmapdError, BusyError, ExistsError, UsageError
from bitmapd.nbd.numbers import Cmd, Opt
from bitmapd.nbd.server.hub import ConnectionLimits
from tests.support.nbdraw import RawClient, info_data, option, request, write
from tests.support.nbdserve import MIB

# -- memory and fairness -----------------------------------------------------------------------


def test_memory_is_bounded_by_the_pool(make: Any) -> None:
    served = make(pool_bytes=4 * MIB, size_bytes=64 * MIB)
    client = served.client()
    served.hold()
    client.send(b"".join(request(Cmd.READ, i, 0, MIB) for i in range(20)))
    served.wait_for(4)
    assert served.thread.pool.out_bytes == 4 * MIB
    other = served.client()
    other.send(request(Cmd.READ, 99, 0, MIB))
    served.release()
    assert [client.answer(MIB).handle for _ in range(20)] == list(range(20))
    assert other.answer(MIB).handle == 99


def test_the_largest_request_gets_its_turn_among_small_ones(make: Any) -> None:
    """Small requests that never stop must not keep a large one waiting for ever."""
    served = make(pool_bytes=64 * MIB, size_bytes=64 * MIB)
    small, large = served.client(), served.client()
    served.hold()
    small.send(b"".join(request(Cmd.READ, i, 0, 8 * MIB) for i in range(24)))
    served.wait_for(8)
    large.send(write(77, 0, bytes(512)))
    large.send(request(Cmd.READ, 78, 0, 32 * MIB))
    served.release()
    small.sock.settimeout(60)
    large.sock.settimeout(60)
    handles = []
    for _ in range(24):
        handles.append(small.answer(8 * MIB).handle)
        if len(handles) == 12:
            assert large.answer().handle == 77
            assert large.answer(32 * MIB).handle == 78
    assert handles == list(range(24))


def test_a_client_that_takes_no_answers_is_not_read(make: Any) -> None:
    served = make(size_bytes=64 * MIB, pool_bytes=16 * MIB)
    client, other = served.client(), served.client()
    client.sock.settimeout(0.5)
    sent = 0
    block = b"".join(request(Cmd.READ, i, 0, MIB) for i in range(64))
    try:
        while sent < 100_000:
            client.send(block)
            sent += 64
    except TimeoutError:
        pass
    assert sent < 100_000
    assert served.thread.pool.out_bytes <= 16 * MIB
    client.sock.settimeout(20)
    assert client.answer(MIB).handle == 0
    # Its neighbour waits for memory, which by and by it gets.
    other.send(request(Cmd.READ, 5, 0, 512))
    for i in range(1, 40):
        assert client.answer(MIB).handle == i
    assert other.answer(512).handle == 5


def test_requests_under_way_are_limited(make: Any) -> None:
    served = make(limits=ConnectionLimits(in_flight=8))
    client = served.client()
    served.hold()
    client.send(b"".join(request(Cmd.FLUSH, i) for i in range(50)))
    served.wait_for(8)
    served.release(4)
    served.wait_for(8)
    served.release()
    assert [client.answer().handle for _ in range(50)] == list(range(50))


def test_a_stopped_reader_is_dropped_when_somebody_waits(make: Any) -> None:
    limits = ConnectionLimits(message_timeout_s=0.5)
    served = make(size_bytes=64 * MIB, pool_bytes=512 << 10, limits=limits)
    hog, other = served.client(), served.client()
    hog.send(b"".join(request(Cmd.READ, i, 0, 256 << 10) for i in range(8)))
    served.thread.until(lambda: served.thread.pool.out_bytes == 512 << 10)
    other.send(request(Cmd.READ, 5, 0, 4096))
    assert other.answer(4096).handle == 5
    assert served.connections() == 1
    assert "answers were not taken" in served.events("client-dropped")[-1]["reason"]


# -- deadlines and numbers ---------------------------------------------------------------------


def test_a_handshake_has_a_deadline(make: Any) -> None:
    served = make(limits=ConnectionLimits(handshake_timeout_s=0.5))
    busy = served.client()
    idle = served.client(enter=False)
    slow = served.client(enter=False)
    slow.greet()
    slow.send(option(Opt.LIST)[:7])
    assert idle.receive(18)
    assert idle.dropped()
    assert slow.dropped()
    assert busy.read(0, 512) == bytes(512)


def test_half_a_request_has_a_deadline_over_tcp_only(make: Any) -> None:
    served = make(limits=ConnectionLimits(message_timeout_s=0.5))
    port = served.thread.call(lambda: served.thread.server.listen_tcp("127.0.0.1", 0))[0][1]
    local = served.client()
    local.send(request(Cmd.FLUSH, 1)[:20])
    with RawClient(port) as slow, RawClient(port) as idle, RawClient(port) as payload:
        slow.enter().send(request(Cmd.READ, 1, 0, 512)[:20])
        payload.enter().send(request(Cmd.WRITE, 1, 0, 64 << 10) + bytes(100))
        idle.enter()
        assert slow.dropped()
        assert payload.dropped()
        assert idle.read(0, 512) == bytes(512)
    local.send(request(Cmd.FLUSH, 1)[20:])
    assert local.answer().handle == 1
    reasons = [event["reason"] for event in served.events("client-dropped")]
    assert any("did not arrive in full" in reason for reason in reasons)


def test_clients_that_were_let_in_keep_their_place(make: Any) -> None:
    served = make(max_connections=4)
    inside = [served.client() for _ in range(3)]
    first = served.client(enter=False)
    first.greet()
    second = served.client(enter=False)  # takes the place of the first
    assert first.dropped()
    inside.append(second.enter())
    with RawClient(served.path) as late:
        assert late.dropped()
    for client in inside:
        assert client.read(0, 512) == bytes(512)
    assert served.thread.server.stats.refused_total == 2


def test_a_client_at_the_door_makes_room_too(make: Any) -> None:
    """A disk that hangs must not let the places fill up with clients that have long given up."""
    served = make(max_connections=2)
    dying = served.client()
    served.hold()
    dying.send(write(1, 0, bytes(512)) + request(Cmd.READ, magic=1))
    served.wait_for(1)
    assert dying.dropped()
    waiting = []
    for _ in range(3):
        client = served.client(enter=False)
        client.greet()
        client.send(option(Opt.GO, info_data("")))
        waiting.append(client)
    assert waiting[0].dropped()
    served.release()
    for client in waiting[1:]:
        client.receive(20 + 12 + 20 + 14 + 20)
        assert client.read(0, 512) == bytes(512)


def test_a_client_cannot_fill_the_log(make: Any) -> None:
    served = make()
    for _ in range(50):
        with served.client(enter=False) as client:
            client.greet(flags=0xFF)
            assert client.dropped()
    assert served.thread.server.stats.refused_total == 50
    assert len(served.events("client-dropped")) == 1


# -- stopping ----------------------------------------------------------------------------------


def test_drain_finishes_what_was_received(make: Any) -> None:
    served = make()
    client, handshaking = served.client(), served.client(enter=False)
    handshaking.greet()
    served.hold()
    client.send(write(1, 0, b"w" * 512) + request(Cmd.FLUSH, 2) + request(Cmd.READ, 3)[:9])
    served.wait_for(2)
    served.thread.loop.call_soon_threadsafe(served.thread.loop.call_later, 0.2, served.release_all)
    assert served.thread.drain(10.0)
    assert [client.answer().handle for _ in range(2)] == [1, 2]
    assert client.dropped()
    assert handshaking.dropped()
    with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
        RawClient(served.path)


def test_drain_carries_out_requests_that_a_limit_held_up(make: Any) -> None:
    served = make(limits=ConnectionLimits(in_flight=2))
    client = served.client()
    served.hold()
    client.send(b"".join(request(Cmd.FLUSH, i) for i in range(6)))
    served.wait_for(2)
    served.thread.loop.call_soon_threadsafe(served.thread.loop.call_later, 0.2, served.release_all)
    assert served.thread.drain(10.0)
    assert [client.answer().handle for _ in range(6)] == list(range(6))
    assert client.dropped()


def test_drain_does_not_wait_for_ever(make: Any) -> None:
    served = make()
    stuck, lazy = served.client(), served.client()
    served.hold()
    stuck.send(request(Cmd.FLUSH, 1))
    lazy.send(b"".join(request(Cmd.READ, i, 0, MIB) for i in range(8)))
    served.wait_for(9)
    assert not served.thread.drain(0.3)
    assert stuck.dropped()
    assert served.connections() == 0


def test_drain_of_a_server_without_clients(make: Any) -> None:
    assert make().thread.drain(5.0)


def test_whoever_is_adopted_after_a_drain_is_missed_when_gone(make: Any) -> None:
    """As the kernel's connection is, which is made anew when a volume has grown."""
    thread = make().thread
    missed: list[str] = []

    def adopted(name: str) -> socket.socket:
        ours, theirs = socket.socketpair()
        thread.call(lambda: thread.server.adopt(ours, name, lambda: missed.append(name)))
        return theirs

    drained = adopted("drained")
    assert thread.drain(5.0)
    assert drained.recv(1 << 10)  # the greeting
    assert drained.recv(1) == b""
    gone = adopted("gone")
    assert gone.recv(1 << 10)
    gone.close()
    thread.until(lambda: missed)
    assert missed == ["gone"]


# -- listening ---------------------------------------------------------------------------------


def test_the_socket_is_private_and_goes_away(make: Any) -> None:
    served = make()
    assert stat.S_IMODE(os.stat(served.path).st_mode) == 0o600
    server = served.thread.server
    served.thread.call(lambda: server.listen_unix(served.path + "g", 0o660))
    assert stat.S_IMODE(os.stat(served.path + "g").st_mode) == 0o660
    served.thread.call(server.close_listeners)
    assert not os.path.exists(served.path)
    assert not os.path.exists(served.path + "g")


def test_a_socket_that_somebody_replaced_is_left_alone(make: Any) -> None:
    served = make()
    os.unlink(served.path)
    Path(served.path).write_text("other")
    served.thread.call(served.thread.server.close_listeners)
    assert Path(served.path).read_text() == "other"


def test_a_stale_socket_is_replaced_a_live_one_is_not(make: Any, sock_dir: Path) -> None:
    served = make()
    stale = str(sock_dir / "stale")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(stale)
    listen = served.thread.server.listen_unix
    served.thread.call(lambda: listen(stale))
    with RawClient(stale) as client:
        assert client.enter().read(0, 512) == bytes(512)
    with pytest.raises(BusyError, match="another process answers"):
        served.thread.call(lambda: listen(served.path))
    plain = sock_dir / "file"
    plain.write_text("precious")
    with pytest.raises(ExistsError, match="not a socket"):
        served.thread.call(lambda: listen(plain))
    assert plain.read_text() == "precious"


def test_sockets_that_cannot_be(make: Any, sock_dir: Path) -> None:
    listen = make().thread
    server = listen.server
    with pytest.raises(UsageError, match="longer than 107"):
        listen.call(lambda: server.listen_unix("/tmp/" + "x" * 110))
    with pytest.raises(BitmapdError, match="cannot listen"):
        listen.call(lambda: server.listen_unix(sock_dir / "no" / "s"))
    with pytest.raises(UsageError, match="without certificates"):
        listen.call(lambda: server.listen_unix(sock_dir / "t", tls=True))


def test_tcp_without_tls_only_on_loopback(make: Any) -> None:
    thread = make().thread
    server = thread.server
    for host in ("0.0.0.0", "::", ""):  # noqa: S104
        with pytest.raises(UsageError, match="without TLS"):
            thread.call(lambda host=host: server.listen_tcp(host, 0))
    port = thread.call(lambda: server.listen_tcp("127.0.0.1", 0))[0][1]
    with RawClient(port) as client:
        assert client.enter().read(0, 512) == bytes(512)
    with pytest.raises(BusyError):
        thread.call(lambda: server.listen_tcp("127.0.0.1", port))
    with pytest.raises(UsageError, match="cannot listen on"):
        thread.call(lambda: server.listen_tcp("no.such.host.invalid", 0))
