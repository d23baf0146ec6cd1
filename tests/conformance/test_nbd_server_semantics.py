"""The server over real sockets: what reaches the device, in which order, who is let in.

The device is one in memory whose completions the test holds back; the client says exactly what the
test wants.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Any

import pytest

from bitmapd.nbd.numbers import Cmd, CmdFlag, Errno, ExportFlag, Opt
from bitmapd.nbd.server.hub import ConnectionLimits
from tests.support.nbdraw import info_data, option, request, write
from tests.support.nbdserve import MIB

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
