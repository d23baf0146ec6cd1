"""The server over real sockets: what reaches the device, ordering, limits, stopping, listening.

The device is one in memory whose completions the test holds back; the client says exactly what the
test wants.  The same thread as the test never touches the server: everything goes through `call`.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitmapd.errors import BitmapdError, BusyError, ExistsError, UsageError
from bitmapd.nbd.hub import ConnectionLimits
from bitmapd.nbd.numbers import Cmd, CmdFlag, Errno, ExportFlag, Opt
from tests.support.nbdraw import RawClient, info_data, option, request, write
from tests.support.nbdserve import MIB, HeldDevice, ServerThread


@pytest.fixture
def sock_dir() -> Iterator[Path]:
    """Short, since the path of a socket is limited."""
    with tempfile.TemporaryDirectory(prefix="nbd") as folder:
        yield Path(folder)


class Served:
    def __init__(self, thread: ServerThread, path: str) -> None:
        self.thread = thread
        self.path = path
        self.device: HeldDevice = thread.device
        self.clients: list[RawClient] = []

    def client(self, *, enter: bool = True, **options: bool) -> RawClient:
        client = RawClient(self.path)
        self.clients.append(client)
        return client.enter(**options) if enter else client

    def hold(self) -> None:
        self.thread.call(lambda: setattr(self.device, "held", True))

    def release(self, count: int | None = None) -> None:
        """Let operations that are held complete; with no count, later ones too."""

        def work() -> None:
            self.device.held = count is not None
            self.device.release(count)

        self.thread.call(work)

    def release_all(self) -> None:
        """On the loop's thread."""
        self.device.held = False
        self.device.release()

    def wait_for(self, count: int) -> None:
        self.thread.until(lambda: len(self.device.waiting) == count)

    def waiting(self) -> list[str]:
        return self.thread.call(lambda: [what for what, _ in self.device.waiting])

    def connections(self) -> int:
        return self.thread.call(lambda: self.thread.server.stats.connections)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in list(self.thread.events) if event == name]


@pytest.fixture
def make(sock_dir: Path) -> Iterator[Any]:
    opened: list[Any] = []

    def start(size_bytes: int = 4 * MIB, block: int = 512, **options: Any) -> Served:
        thread = ServerThread(lambda loop, _: HeldDevice(loop, size_bytes, block), **options)
        thread.__enter__()
        path = str(sock_dir / f"s{len(opened)}")
        served = Served(thread, path)
        opened.append(served)
        thread.call(lambda: thread.server.listen_unix(path))
        return served

    yield start
    for served in opened:
        for client in served.clients:
            client.sock.close()
        served.thread.call(served.release_all)
        served.thread.__exit__()
        # Whatever happened, no buffer is lost.
        assert served.thread.pool.out_bytes == 0


# -- what reaches the device ------------------------------------------------------------------


def test_flags_reach_the_device(make: Any) -> None:
    served = make()
    client = served.client()
    fua = CmdFlag.FUA
    for data in (
        write(1, 0, bytes(512)),
        write(1, 512, bytes(512), fua),
        request(Cmd.FLUSH),
        request(Cmd.FLUSH, flags=fua),
        request(Cmd.TRIM, 1, 0, 3 * MIB, fua),
        request(Cmd.WRITE_ZEROES, 1, 0, 512),
        request(Cmd.WRITE_ZEROES, 1, 0, 512, CmdFlag.NO_HOLE | fua),
        request(Cmd.WRITE_ZEROES, 1, 0, 512, CmdFlag.FAST_ZERO),
        request(Cmd.CACHE, 1, 0, 4 * MIB),
    ):
        assert client.call(data).error == 0
    assert served.device.log == [
        ("write", 0, 512, False),
        ("write", 512, 512, True),
        ("flush",),
        ("flush",),
        ("trim", 0, 3 * MIB, True),
        ("zero", 0, 512, False, True, False),
        ("zero", 0, 512, True, False, False),
        ("zero", 0, 512, False, True, True),
    ]


@pytest.mark.parametrize("structured", [False, True])
def test_data_come_back(make: Any, structured: bool) -> None:
    served = make()
    client = served.client(structured=structured)
    payload = os.urandom(3 * MIB)
    client.write(512, payload)
    assert client.read(512, len(payload)) == payload
    assert served.device.content[512 : 512 + len(payload)] == payload
    stats = served.thread.server.stats
    assert (stats.written_bytes, stats.read_bytes) == (len(payload), len(payload))
    assert stats.by_command()["write"] == stats.by_command()["read"] == 1


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(
    ("command", "flags", "number", "wire"),
    [
        (Cmd.READ, 0, errno.EIO, Errno.EIO),
        (Cmd.WRITE, 0, errno.ENOSPC, Errno.ENOSPC),
        (Cmd.WRITE, 0, errno.EROFS, Errno.EPERM),
        (Cmd.FLUSH, 0, errno.EREMOTEIO, Errno.EIO),
        (Cmd.TRIM, 0, errno.ENOMEM, Errno.ENOMEM),
        (Cmd.WRITE_ZEROES, CmdFlag.FAST_ZERO, errno.EOPNOTSUPP, Errno.ENOTSUP),
        (Cmd.WRITE_ZEROES, 0, errno.EOPNOTSUPP, Errno.EINVAL),
    ],
)
def test_errors_of_the_device(
    make: Any, structured: bool, command: Cmd, flags: int, number: int, wire: Errno
) -> None:
    served = make()
    client = served.client(structured=structured)
    served.device.fail_with = OSError(number, os.strerror(number))
    length = 0 if command is Cmd.FLUSH else 512
    payload = bytes(512) if command is Cmd.WRITE else b""
    answer = client.call(request(command, 5, 0, length, flags, payload))
    assert (answer.handle, answer.error) == (5, wire)
    assert (os.strerror(number) in answer.message) is structured
    served.device.fail_with = None
    assert client.call(request(Cmd.FLUSH, 6)).error == 0


def test_block_status(make: Any) -> None:
    served = make()
    client = served.client(block_status=True)
    served.device.pieces = [(512, 3), (512, 3), (1024, 0)]
    answer = client.call(request(Cmd.BLOCK_STATUS, 1, 0, 1536))
    assert struct.unpack(">5I", answer.data) == (1, 1024, 3, 512, 0)
    answer = client.call(request(Cmd.BLOCK_STATUS, 1, 0, 1536, CmdFlag.REQ_ONE))
    assert struct.unpack(">3I", answer.data) == (1, 1024, 3)
    served.device.fail_with = OSError(errno.EIO, "broken")
    assert client.call(request(Cmd.BLOCK_STATUS, 1, 0, 1536)).error == Errno.EIO


def test_answers_come_in_the_order_of_completion(make: Any) -> None:
    served = make()
    client = served.client()
    served.hold()
    client.send(request(Cmd.READ, 1, 0, 512) + request(Cmd.FLUSH, 2) + write(3, 0, b"x" * 512))
    served.wait_for(3)
    served.thread.call(served.device.waiting.reverse)
    served.release()
    assert [client.answer().handle for _ in range(2)] == [3, 2]
    assert client.answer(512).handle == 1


def test_connections_do_not_wait_for_one_another(make: Any) -> None:
    served = make()
    first, second = served.client(), served.client()
    served.hold()
    first.send(request(Cmd.FLUSH, 1))
    served.wait_for(1)
    second.send(request(Cmd.READ, 2, 0, 512))
    served.wait_for(2)
    assert served.waiting() == ["flush", "read"]


def test_read_only_export(make: Any) -> None:
    served = make(read_only=True)
    client = served.client()
    assert client.flags & ExportFlag.READ_ONLY
    assert not client.flags & (ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES)
    assert client.call(write(1, 0, bytes(512))).error == Errno.EPERM
    assert client.call(request(Cmd.TRIM, 1, 0, 512)).error == Errno.EPERM
    assert client.read(0, 512) == bytes(512)
    assert served.device.log == [("read", 0, 512)]


def test_blocks_of_4096(make: Any) -> None:
    served = make(block=4096, size_bytes=MIB + 512)
    client = served.client()
    assert client.size == MIB
    assert client.call(request(Cmd.READ, 1, 512, 4096)).error == Errno.EINVAL
    assert client.call(request(Cmd.READ, 1, MIB - 4096, 4096), 4096).error == 0


def test_refused_writes_leave_the_stream_in_step(make: Any) -> None:
    served = make()
    client = served.client(structured=True)
    client.send(write(1, 8 * MIB, bytes(700_000)) + write(2, 1, bytes(512)) + request(Cmd.FLUSH, 3))
    answers = [client.answer() for _ in range(3)]
    assert [(answer.handle, answer.error) for answer in answers] == [
        (1, Errno.EINVAL),
        (2, Errno.EINVAL),
        (3, 0),
    ]
    assert "aligned" in answers[0].message
    assert served.device.log == [("flush",)]


def test_disc_finishes_what_was_sent_before(make: Any) -> None:
    served = make()
    client = served.client()
    served.hold()
    client.send(write(1, 0, b"d" * 512) + request(Cmd.DISC) + request(Cmd.FLUSH, 9))
    served.wait_for(1)
    served.release()
    assert client.answer().handle == 1
    assert client.dropped()
    assert served.device.log == [("write", 0, 512, False)]


def test_half_closed_client_gets_its_answers(make: Any) -> None:
    served = make()
    client = served.client()
    client.send(write(1, 0, b"h" * 512) + request(Cmd.WRITE, 2, 0, 512, payload=b"half"))
    client.sock.shutdown(socket.SHUT_WR)
    assert client.answer().handle == 1
    assert client.dropped()
    assert served.device.log == [("write", 0, 512, False)]


# -- a client that dies and comes back (faults.md, case 28) ------------------------------------


@pytest.mark.parametrize("death", ["hung up", "dropped"])
def test_case_28_old_writes_are_done_before_the_client_is_let_in_again(
    make: Any, death: str
) -> None:
    served = make()
    old = served.client()
    served.hold()
    old.send(write(1, 0, b"o" * 512))
    served.wait_for(1)
    if death == "hung up":
        old.send(request(Cmd.WRITE, 2, 512, 512, payload=b"half"))
        old.sock.close()
    else:
        old.send(request(Cmd.WRITE, 2, 512, 512, magic=1, payload=b"x" * 512))
        assert old.dropped()
    new = served.client(enter=False)
    new.greet()
    new.send(option(Opt.GO, info_data("")))
    new.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        new.receive(1)
    served.release()
    new.sock.settimeout(20)
    new.receive(20 + 12 + 20 + 14 + 20)
    new.write(0, b"n" * 512)
    assert new.read(0, 1024) == b"n" * 512 + bytes(512)
    assert [entry[0] for entry in served.device.log] == ["write", "write", "read"]


def test_case_28_requests_that_were_sent_before_the_hang_up_come_first(make: Any) -> None:
    """They are still in the socket, behind a limit, when the client comes back."""
    served = make(limits=ConnectionLimits(in_flight=2))
    old = served.client()
    served.hold()
    old.send(b"".join(write(i, 0, bytes([i]) * 512) for i in range(1, 9)))
    served.wait_for(2)
    old.sock.close()
    new = served.client(enter=False)
    new.greet()
    new.send(option(Opt.GO, info_data("")) + write(1, 0, b"n" * 512))
    new.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        new.receive(1)
    served.release()
    new.sock.settimeout(20)
    new.receive(20 + 12 + 20 + 14 + 20)
    assert new.answer().error == 0
    assert new.read(0, 512) == b"n" * 512


def test_other_connections_are_not_disturbed_by_orphans(make: Any) -> None:
    served = make()
    healthy, dying = served.client(), served.client()
    served.hold()
    dying.send(write(1, 0, bytes(512)))
    served.wait_for(1)
    dying.send(request(0, magic=1))
    assert dying.dropped()
    assert served.connections() == 1
    healthy.send(request(Cmd.READ, 2, 0, 512))
    served.wait_for(2)
    served.thread.call(served.device.waiting.reverse)
    served.release(1)
    assert healthy.answer(512).handle == 2


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
