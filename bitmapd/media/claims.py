"""Who may open a primary or a secondary: claims on files and block devices (edge).

Two volumes on one medium would write over one another, and so would two processes that both believe
to be node 1.  But the two nodes of a pair share their media, also on one machine.  So a claim says
who has it: it is a set of locks on bytes far behind any data, of which nothing is ever read or
written.

    NODES             node 1, node 2
    NODES + 2 + ...   a slot of two bytes for each pair, found from its UUID: its node 1, its node 2

1. A volume without a partner write-locks the whole region: it is alone.
2. A node write-locks its byte, and its byte in its pair's slot, and read-locks what is behind that
   slot.  So there is one process for each node; and of two pairs the one with the slot in front
   read-locks what the other write-locks, whoever comes first.  Two pairs that fall on one slot
   (2^-56) are still kept from being the same node.
3. Node 2 has no UUID of a pair until it joins: it locks its byte, and more when it has joined.
   What is locked already does not conflict with that.
4. A block device is opened with O_EXCL, too, which keeps mounts and device-mapper away.  The kernel
   admits one such opener: that is a node's second descriptor, and the node that comes second does
   without if its partner's byte is locked.  It keeps doing without when the partner has gone.

The locks are those of an open file description (F_OFD_SETLK).  They end with its last descriptor,
also at kill -9: the kernel waits for asynchronous I/O (exit_aio) before it closes files.  On a
block device they belong to the inode of its node in /dev: to who uses another node for it (mknod,
the /dev of a container) only O_EXCL counts, and the partner's node is not admitted.  On a network
file system they reach as far as it has locks; where there are none, nothing is claimed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from bitmapd.errors import BusyError, refused

NODES: Final = 1 << 62
_SLOTS: Final = NODES + 2
_SLOT_BITS: Final = 60  # so that the last slot ends before 2^63
_TO_THE_END: Final = 0
_FLOCK: Final = struct.Struct("@hhqqi")  # struct flock with 64-bit offsets
_HELD: Final = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

Lock = tuple[int, int, int]  # F_WRLCK or F_RDLCK, first byte, bytes (0: all that follow)


@dataclass(frozen=True, slots=True)
class Claim:
    """Of a volume without a partner, or of one node; `pair` is None before node 2 has joined."""

    node: int | None = None
    pair: UUID | None = None

    def locks(self) -> list[Lock]:
        if self.node is None:
            return [(fcntl.F_WRLCK, NODES, _TO_THE_END)]
        locks = [(fcntl.F_WRLCK, NODES + self.node - 1, 1)]
        if self.pair is not None:
            slot = _SLOTS + 2 * (self.pair.int >> (128 - _SLOT_BITS))
            locks.append((fcntl.F_WRLCK, slot + self.node - 1, 1))
            locks.append((fcntl.F_RDLCK, slot + 2, _TO_THE_END))
        return locks

    def take(self, fd: int, name: str) -> None:
        """Lock; BusyError says who else has the medium.  What was locked before that stays locked
        until the descriptor is closed."""
        for kind, first, count in self.locks():
            try:
                set_lock(fd, kind, first, count)
            except OSError as error:
                if error.errno in _HELD:
                    raise busy(name, holder(fd)) from error
                if error.errno not in _NO_LOCKS:
                    raise refused(error, f"cannot lock {name}") from error
                return

    def hold(self, fd: int, name: str) -> int | None:
        """Of a node, after `take`: keep mounts off a block device with another descriptor.  None
        if the partner does so; BusyError if somebody else has it."""
        try:
            return os.open(name, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise refused(error, f"cannot open {name}") from error
            if self.admits(holder(fd)):
                return None
            raise busy(name, None) from error

    def admits(self, other: Holder | None) -> bool:
        """Whether all that has the medium is this node's partner."""
        return self.node is not None and other is not None and other.nodes == (3 - self.node,)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has locked a medium; `nodes` is empty for anybody who is no node of a pair."""

    nodes: tuple[int, ...]
    who: str  # "a volume"


def set_lock(fd: int, kind: int, first: int, count: int) -> None:
    """Lock bytes for this open file description; OSError (EAGAIN, EACCES) if another has them."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, first, count, 0))


def holder(fd: int) -> Holder | None:
    """Who, beside this open file description, has claimed the medium."""
    nodes = []
    for node in (1, 2):
        query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, NODES + node - 1, 1, 0)
        try:
            found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return None
        kind, _, first, count, pid = _FLOCK.unpack(found)
        if kind == fcntl.F_UNLCK:
            continue
        if count != 1:
            # The process that made an open file description has no lasting number (-1).
            process = f"process {pid}" if pid > 0 else "another program"
            return Holder((), "a volume" if first == NODES else f"{process}, which has locked it")
        nodes.append(node)
    if not nodes:
        return None
    numbers = " and ".join(map(str, nodes))
    return Holder(tuple(nodes), f"node{'s' * (len(nodes) > 1)} {numbers} of a pair")


def holder_of(path: str | Path) -> Holder | None:
    """As `holder`, of a medium that is not open here."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise refused(error, f"cannot open {path}") from error
    try:
        return holder(fd)
    finally:
        os.close(fd)


def busy(name: str, by: Holder | None) -> BusyError:
    """The error to show a user for a medium that somebody else has claimed."""
    if by is None:
        return BusyError(f"{name} is in use by something else", "see lsblk and fuser -vm")
    return BusyError(
        f"{name} is in use by {by.who}",
        f"'fuser -v {name}' names the process; stop its volume, or use another medium",
    )
