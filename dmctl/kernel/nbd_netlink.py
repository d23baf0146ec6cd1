"""The kernel's NBD client, through generic netlink (edge).

1. The volume's UUID is the *backend identifier* of its device: that is how a device is found again,
   and the kernel refuses a connection that is meant for another volume.
2. The kernel chooses the index; the block size is always given, because the default of 1024 bytes
   would stack upwards.
3. A device whose old connection is alive takes no new one, says nothing of it and answers
   success.  A socket that was taken got the device's timeout as its send timeout, which is how
   `reconnect` knows; else it waits until the kernel announces that the old connection is dead.
4. `reconnect` never changes the size: with requests waiting on a dead connection that would not
   end.
5. Requests of a dead connection are sent again, and may have been carried out already: whoever
   reconnects has made sure that the old server is dead.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from dmctl.kernel.modules import modprobe

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ERROR: Final = struct.Struct("=i")
_TYPE_ERROR: Final = 2
_REQUEST_ACK: Final = 1 | 4
_TIMEVAL: Final = struct.Struct("@ll")
_GENL_CTRL: Final = 16
_SOL_NETLINK: Final = 270
_ADD_MEMBERSHIP: Final = 1
_RECEIVE_BYTES: Final = 64 << 10
_ANSWER_TIMEOUT_S: Final = 30.0
_SYS_BLOCK: Final = Path("/sys/block")


class NbdNetlink:
    """See the module docstring.  Errors are OSErrors that name the device."""

    def __init__(self) -> None:
        """OSError if the kernel has no NBD client."""
        # ruff: noqa: PLC0415
        from dmctl.kernel import nbd_messages

        self._messages = nbd_messages
        self._sequence = 0
        self._socket = _open()
        try:
            self._family, self._group = self._find_family()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> NbdNetlink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- verbs --------------------------------------------------------------------------------
    def connect(
        self,
        fd: int,
        identifier: str,
        *,
        size_bytes: int,
        logical_block_bytes: int,
        timeout_s: int,
        dead_conn_timeout_s: int,
        flags: int,
    ) -> int:
        """Have a free device talk through a stream socket; its index."""
        answers = self._ask(
            self._messages.NbdCommand.CONNECT,
            "connect a device of the kernel's NBD client",
            NBD_ATTR_SIZE_BYTES=size_bytes,
            NBD_ATTR_BLOCK_SIZE_BYTES=logical_block_bytes,
            NBD_ATTR_TIMEOUT=timeout_s,
            NBD_ATTR_DEAD_CONN_TIMEOUT=dead_conn_timeout_s,
            NBD_ATTR_SERVER_FLAGS=flags,
            NBD_ATTR_SOCKETS=_sockets(fd),
            NBD_ATTR_BACKEND_IDENTIFIER=identifier,
        )
        for answer in answers:
            index = answer.get_attr("NBD_ATTR_INDEX")
            if index is not None:
                return int(index)
        raise OSError(errno.EPROTO, "the kernel's NBD client did not name the device it connected")

    def reconnect(
        self,
        index: int,
        fd: int,
        identifier: str,
        *,
        timeout_s: int,
        dead_conn_timeout_s: int,
        deadline_s: float,
    ) -> None:
        """Give a device whose connection is dead a new one.

        EBUSY if the old connection is still alive after `deadline_s`.
        """
        if timeout_s <= 0:
            raise ValueError(f"a timeout of {timeout_s} s leaves no mark on the socket")
        until = time.monotonic() + deadline_s
        with socket.socket(fileno=os.dup(fd)) as sock, _open() as announcements:
            _set_send_timeout(sock, 0)
            announcements.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, self._group)
            while True:
                self._ask(
                    self._messages.NbdCommand.RECONFIGURE,
                    f"reconnect /dev/nbd{index}",
                    NBD_ATTR_INDEX=index,
                    NBD_ATTR_TIMEOUT=timeout_s,
                    NBD_ATTR_DEAD_CONN_TIMEOUT=dead_conn_timeout_s,
                    NBD_ATTR_SOCKETS=_sockets(fd),
                    NBD_ATTR_BACKEND_IDENTIFIER=identifier,
                )
                if _send_timeout(sock):
                    return
                self._await_death(announcements, index, until)

    def _await_death(self, announcements: socket.socket, index: int, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            announcements.settimeout(left)
            try:
                data = announcements.recv(_RECEIVE_BYTES)
            except TimeoutError:
                break
            for kind, _, message in _split(data):
                if kind == self._family:
                    dead = self._decode(message)
                    if (
                        dead["cmd"] == self._messages.NbdCommand.LINK_DEAD
                        and dead.get_attr("NBD_ATTR_INDEX") == index
                    ):
                        return
        raise OSError(
            errno.EBUSY,
            f"cannot reconnect /dev/nbd{index}: its old connection is alive;"
            " end the process that serves it first",
        )

    def resize(self, index: int, identifier: str, size_bytes: int) -> None:
        """Its connection is alive; the kernel may wait for the requests that are under way."""
        self._ask(
            self._messages.NbdCommand.RECONFIGURE,
            f"change the size of /dev/nbd{index}",
            NBD_ATTR_INDEX=index,
            NBD_ATTR_SIZE_BYTES=size_bytes,
            NBD_ATTR_BACKEND_IDENTIFIER=identifier,
        )

    def disconnect(self, index: int) -> None:
        """Requests that wait are failed; what is not connected stays so."""
        self._ask(
            self._messages.NbdCommand.DISCONNECT,
            f"disconnect /dev/nbd{index}",
            NBD_ATTR_INDEX=index,
        )

    def configured(self) -> dict[int, bool]:
        """Of each device, whether it is in use; that says nothing of its connection."""
        found = {}
        for answer in self._ask(self._messages.NbdCommand.STATUS, "list the NBD devices"):
            devices = answer.get_attr("NBD_ATTR_DEVICE_LIST")
            for _, item in devices["attrs"] if devices else ():
                index = int(item.get_attr("NBD_DEVICE_INDEX"))
                found[index] = bool(item.get_attr("NBD_DEVICE_CONNECTED"))
        return found

    # -- messages -----------------------------------------------------------------------------
    def _find_family(self) -> tuple[int, int]:
        try:
            return self._ask_family()
        except FileNotFoundError:
            _load_module()
        try:
            return self._ask_family()
        except FileNotFoundError as error:
            raise OSError(
                errno.ENODEV,
                "the kernel has no NBD client: 'modprobe nbd' did not bring it;"
                " use --attach nbd, or a kernel that has the module",
            ) from error

    def _ask_family(self) -> tuple[int, int]:
        message = self._messages.ctrlmsg()
        message["cmd"] = 3  # CTRL_CMD_GETFAMILY
        message["version"] = 1
        message["attrs"] = [("CTRL_ATTR_FAMILY_NAME", self._messages.FAMILY)]
        for answer in self._exchange(message, _GENL_CTRL, "find the kernel's NBD client"):
            family = self._messages.ctrlmsg(answer)
            family.decode()
            for group in family.get_attr("CTRL_ATTR_MCAST_GROUPS") or ():
                if group.get_attr("CTRL_ATTR_MCAST_GRP_NAME") == self._messages.GROUP:
                    number = group.get_attr("CTRL_ATTR_MCAST_GRP_ID")
                    return int(family.get_attr("CTRL_ATTR_FAMILY_ID")), int(number)
        raise OSError(errno.EPROTO, "the kernel's NBD client announces nothing")

    def _ask(self, command: int, doing: str, **attributes: Any) -> list[Any]:
        message = self._messages.NbdMessage()
        message["cmd"] = command
        message["version"] = self._messages.FAMILY_VERSION
        message["attrs"] = list(attributes.items())
        answers = self._exchange(message, self._family, doing)
        return [self._decode(answer) for answer in answers]

    def _decode(self, data: bytes) -> Any:
        message = self._messages.NbdMessage(data)
        message.decode()
        return message

    def _exchange(self, message: Any, kind: int, doing: str) -> list[bytes]:
        """The answers to one request; the kernel carries it out while it is sent."""
        self._sequence += 1
        message["header"]["type"] = kind
        message["header"]["flags"] = _REQUEST_ACK
        message["header"]["sequence_number"] = self._sequence
        message.encode()
        answers: list[bytes] = []
        try:
            self._socket.send(message.data)
            while True:
                for found, sequence, answer in _split(self._socket.recv(_RECEIVE_BYTES)):
                    if sequence != self._sequence:
                        continue
                    if found != _TYPE_ERROR:
                        answers.append(answer)
                        continue
                    (code,) = _ERROR.unpack_from(answer, _HEADER.size)
                    if not code:
                        return answers
                    raise OSError(-code, os.strerror(-code))
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(error.errno or errno.ETIME, f"cannot {doing}: {reason}") from error


def _open() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 16)
    try:
        sock.bind((0, 0))
        sock.settimeout(_ANSWER_TIMEOUT_S)
    except BaseException:
        sock.close()
        raise
    return sock


def _split(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and whole text of each message of a datagram."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            raise OSError(errno.EPROTO, f"a netlink message of {length} bytes")
        yield kind, sequence, data[at : at + length]
        at += (length + 3) & ~3


def _sockets(fd: int) -> dict[str, Any]:
    return {"attrs": [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", fd)]})]}


def _set_send_timeout(sock: socket.socket, seconds: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(seconds, 0))


def _send_timeout(sock: socket.socket) -> bool:
    value = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.size)
    return any(_TIMEVAL.unpack(value))


def _load_module() -> None:
    """Without partitions: the kernel would read the volume through the gate to look for some."""
    try:
        modprobe("nbd", "max_part=0")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OSError(errno.ENODEV, f"cannot load the kernel's NBD client: {error}") from error


# -- sysfs ------------------------------------------------------------------------------------
def find_device(identifier: str, root: Path = _SYS_BLOCK) -> int | None:
    """Index of the device that is in use for that backend identifier."""
    for entry in sorted(root.glob("nbd*/backend")):
        try:
            backend = entry.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:  # disconnected in this moment
            continue
        if backend == identifier and (entry.parent / "pid").exists():
            return int(entry.parent.name[len("nbd") :])
    return None


def raise_request_size(index: int, wanted_kib: int, root: Path = _SYS_BLOCK) -> None:
    """Let requests be as large as those of the device beside it: limits stack by minimum."""
    queue = root / f"nbd{index}" / "queue"
    limit_kib = int((queue / "max_hw_sectors_kb").read_text())
    (queue / "max_sectors_kb").write_text(str(min(wanted_kib, limit_kib)))
