"""Device-mapper through its control device (edge).

`DeviceMapper` does what `dmsetup` does, without a process for each step and without udev's cookies:
what it changes is announced by uevents only.  Errors are OSErrors whose text names the step.

1. A request that was interrupted is repeated, except those that may wait for I/O (`holding`,
   `going_on`): they end with EINTR, and the device goes on as it was.
2. A suspended dm-era device is never asked for its status: the question would sleep until the
   device is resumed, and nothing could end it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
from collections.abc import Sequence

from dmctl.kernel import dm_wire
from dmctl.kernel.dm_wire import NO_FLAGS, Command, Device, Flag, Target
from dmctl.kernel.modules import modprobe

CONTROL = "/dev/mapper/control"
_ROOM_BYTES = 16 << 10
_MAX_ROOM_BYTES = 64 << 20
# Neither writes back a file system above (it must not be frozen while its writes wait for the gate)
# nor hands back what is in flight.
_QUICKLY = Flag.NOFLUSH | Flag.SKIP_LOCKFS


class Prepared:
    """A request whose memory exists, for the moments in which none may be asked for."""

    __slots__ = ("_fd", "_message", "_number", "_template")

    def __init__(self, fd: int, command: Command, message: bytearray) -> None:
        self._fd = fd
        self._number = command.request
        self._template = bytes(message)
        self._message = message

    def __call__(self) -> None:
        """Do it; OSError, without a text of its own."""
        self._message[:] = self._template
        fcntl.ioctl(self._fd, self._number, self._message)

    @property
    def resumed(self) -> bool:
        """Whether the latest call found the device suspended, or suspended it, and resumed it."""
        return Flag.UEVENT_GENERATED in dm_wire.flags(self._message)


class DeviceMapper:
    """See the module docstring.  A name is one of a mapped device, without any folder."""

    def __init__(self, path: str = CONTROL) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot open {path}: {error.strerror}; is the module dm_mod loaded,"
                " and are you root?",
            ) from error

    def close(self) -> None:
        os.close(self._fd)

    # -- devices ------------------------------------------------------------------------------
    def version(self) -> tuple[int, int, int]:
        return dm_wire.version(self._ask(Command.VERSION, "", "ask for the version"))

    def names(self) -> list[tuple[str, str]]:
        """Names of all mapped devices, with their numbers "major:minor"."""
        answer = self._ask(Command.LIST_DEVICES, "", "list", room_bytes=_ROOM_BYTES)
        return dm_wire.names(answer)

    def create(self, name: str, uuid: str) -> Device:
        return dm_wire.device(self._ask(Command.DEV_CREATE, name, "create", uuid=uuid))

    def remove(self, name: str) -> None:
        """EBUSY while something has it open."""
        self._ask(Command.DEV_REMOVE, name, "remove")

    def device(self, name: str) -> Device | None:
        """None if there is none of that name."""
        try:
            return dm_wire.device(self._ask(Command.DEV_STATUS, name, "find"))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise

    # -- tables -------------------------------------------------------------------------------
    def load(self, name: str, table: Sequence[Target]) -> None:
        """Make it the inactive table, in place of one that may be there."""
        data = dm_wire.targets_data(table)
        self._ask(Command.TABLE_LOAD, name, "load a table into", targets=len(table), data=data)

    def clear(self, name: str) -> None:
        """Forget the inactive table, if there is one."""
        self._ask(Command.TABLE_CLEAR, name, "clear the inactive table of")

    def table(self, name: str) -> list[Target]:
        """The one in force."""
        return self._lines(name, "read the table of", Flag.STATUS_TABLE)

    def status(self, name: str) -> list[Target]:
        """Of each target; see rule 2 of the module for dm-era."""
        return self._lines(name, "read the status of", NO_FLAGS)

    def _lines(self, name: str, doing: str, flags: Flag) -> list[Target]:
        answer = self._ask(Command.TABLE_STATUS, name, doing, flags=flags, room_bytes=_ROOM_BYTES)
        return dm_wire.targets(answer)

    def deps(self, name: str) -> list[str]:
        """Numbers "major:minor" of the devices below."""
        answer = self._ask(
            Command.TABLE_DEPS, name, "read the dependencies of", room_bytes=_ROOM_BYTES
        )
        return dm_wire.deps(answer)

    def message(self, name: str, text: str) -> None:
        """To the target at the start of the device."""
        data = dm_wire.message_data(0, text)
        self._ask(Command.TARGET_MSG, name, f"send '{text}' to", data=data)

    # -- suspending ---------------------------------------------------------------------------
    def holding(self, name: str) -> Prepared:
        """Hold new I/O and wait until none is in flight: the device is suspended.

        It ends with EINTR when a signal comes while it waits, and the device goes on.
        """
        message = dm_wire.request(name=name, flags=Flag.SUSPEND | _QUICKLY)
        return Prepared(self._fd, Command.DEV_SUSPEND, message)

    def going_on(self, name: str) -> Prepared:
        """Put the inactive table in force, if there is one, and resume.

        A device that is not suspended is held first as by `holding`, if there is a table, and EINTR
        leaves it at work under the old one; the inactive table may still be there.  A table that is
        refused in the end leaves the device suspended.
        """
        message = dm_wire.request(name=name, flags=_QUICKLY)
        return Prepared(self._fd, Command.DEV_SUSPEND, message)

    def resume(self, name: str) -> None:
        """The same, done at once."""
        try:
            self.going_on(name)()
        except OSError as error:
            raise _told(error, name, "resume") from error

    # -- requests -----------------------------------------------------------------------------
    def _ask(
        self,
        command: Command,
        name: str,
        doing: str,
        *,
        uuid: str = "",
        flags: Flag = NO_FLAGS,
        targets: int = 0,
        data: bytes = b"",
        room_bytes: int = 0,
    ) -> bytearray:
        while True:
            message = dm_wire.request(
                name=name,
                uuid=uuid,
                flags=flags,
                targets=targets,
                data=data,
                room_bytes=room_bytes,
            )
            try:
                fcntl.ioctl(self._fd, command.request, message)
            except InterruptedError:
                continue
            except OSError as error:
                raise _told(error, name, doing) from error
            if not dm_wire.is_full(message):
                return message
            room_bytes = max(2 * room_bytes, _ROOM_BYTES)
            if room_bytes > _MAX_ROOM_BYTES:
                raise OSError(errno.EMSGSIZE, f"cannot {doing} '{name}': the answer has no end")


def load_module(name: str, path: str = CONTROL) -> None:
    """Ask for the kernel's module unless what it brings is there; who needs it sees if it came."""
    if os.path.exists(path):
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        modprobe(name)


def _told(error: OSError, name: str, doing: str) -> OSError:
    return OSError(error.errno, f"cannot {doing} '{name}': {error.strerror}")
