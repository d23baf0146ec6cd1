"""Listening sockets of ours, and of unix ones: taking them away, knowing who is at the other end.

1. A unix socket has its mode from the moment it exists: the umask sets it, no chmod afterwards.
2. A socket file that is in the way is removed only if nobody answers on it, and at the end only if
   it is still ours: a successor may have put its own into the place.

A crash leaves the file; the next process finds nobody there and replaces it.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmapd.errors import BitmapdError, BusyError, ExistsError, refused

BACKLOG = 32

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def peer_credentials(sock: socket.socket) -> tuple[int, int]:
    """Process id and user id of the other end of a unix socket."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _gid = _CREDENTIALS.unpack(data)
    return pid, uid


@dataclass(frozen=True, slots=True)
class UnixListener:
    """A listening socket that does not block, and the file that leads to it."""

    sock: socket.socket
    path: Path
    inode: tuple[int, int]

    def unlink(self) -> None:
        with suppress(OSError):  # gone already, or out of reach: then it is not ours to remove
            if _inode(self.path) == self.inode:
                self.path.unlink()


def listen_unix(path: Path, mode: int = 0o600, backlog: int = BACKLOG) -> UnixListener:
    """BusyError if another process answers there, another BitmapdError if it cannot be used."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _remove_stale(path)
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        inode = _inode(path)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise refused(error, f"cannot listen on {path}") from error
    except BitmapdError:
        sock.close()
        raise
    return UnixListener(sock, path, inode)


def listen_tcp(
    family: int, address: Any, backlog: int = BACKLOG, *, v6_only: bool = False
) -> socket.socket:
    """A listening socket that does not block, at an address of `getaddrinfo`.  With `v6_only` one
    of `::` leaves the port of IPv4 to another.  OSError if it cannot be had."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if v6_only and family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def _inode(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ExistsError(f"{path} exists and is not a socket", hint="choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody listens
    raise BusyError(f"another process answers on {path}", hint="is the volume started already?")
