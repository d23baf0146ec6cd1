"""Steps between two states of a volume's stack: what each does, its inverse, its command (pure).

A step is data; `dmctl.kernel.execute` carries it out.  `command` is the same thing for a shell:
word for word what is executed, where there is a program for it.

1. `inverse` brings back the state before the step, provided that it is asked for in the reverse
   order of what was done.  None: there is no way back and none is needed, because the state after
   the step is sound by itself.
2. A device that an earlier step of the same plan makes is named by a placeholder, a shell variable
   that the command of that step sets.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Final

from dmctl.model.stack import RAM_PAGE_BYTES
from dmctl.model.targets import Table, render

RAM: Final = "$RAM"
NBD: Final = "$NBD"
ZRAM: Final = "/dev/zram"

_UNSYNCED: Final = "--noudevsync"


@dataclass(frozen=True, slots=True)
class MakeRam:
    """A new RAM device of that size, all zeros but for the stamp in its last page."""

    size_bytes: int
    stamp: str

    @property
    def inverse(self) -> Step | None:
        return FreeRam(RAM)

    @property
    def command(self) -> str:
        page = self.size_bytes // RAM_PAGE_BYTES - 1
        return "\n".join(
            (
                "modprobe zram num_devices=0",
                f"RAM={ZRAM}$(cat /sys/class/zram-control/hot_add)",
                f'echo {self.size_bytes} > "/sys/block/${{RAM#/dev/}}/disksize"',
                f"printf '%-{RAM_PAGE_BYTES}s' {self.stamp} |"
                f' dd of="$RAM" bs={RAM_PAGE_BYTES} seek={page} oflag=direct status=none',
            )
        )


@dataclass(frozen=True, slots=True)
class FreeRam:
    device: str

    @property
    def inverse(self) -> Step | None:
        return None

    @property
    def command(self) -> str:
        index = f"${{RAM#{ZRAM}}}" if self.device == RAM else self.device.removeprefix(ZRAM)
        return f"echo {index} > /sys/class/zram-control/hot_remove"


@dataclass(frozen=True, slots=True)
class ConnectNbd:
    """Only bitmapd can: it holds the other end of the socket."""

    uuid: str

    @property
    def inverse(self) -> Step | None:
        return None

    @property
    def command(self) -> str:
        return (
            "# bitmapd hands one end of a socket pair to the kernel's NBD client (NBD_CMD_CONNECT,"
            f" backend identifier {self.uuid}):\nNBD=/dev/nbdN"
        )


@dataclass(frozen=True, slots=True)
class DisconnectNbd:
    device: str

    @property
    def inverse(self) -> Step | None:
        return None

    @property
    def command(self) -> str:
        return f"nbd-client -d {self.device}"


@dataclass(frozen=True, slots=True)
class Create:
    name: str
    uuid: str
    table: Table

    @property
    def inverse(self) -> Step | None:
        return Remove(self.name, self.uuid, self.table)

    @property
    def command(self) -> str:
        return _with_table(f"dmsetup create {self.name} --uuid {self.uuid} {_UNSYNCED}", self.table)


@dataclass(frozen=True, slots=True)
class Remove:
    """`table`: the one that goes with it; None if it has none that could be made again."""

    name: str
    uuid: str
    table: Table | None

    @property
    def inverse(self) -> Step | None:
        return Create(self.name, self.uuid, self.table) if self.table else None

    @property
    def command(self) -> str:
        return f"dmsetup remove {self.name} {_UNSYNCED}"


@dataclass(frozen=True, slots=True)
class Reload:
    """Put another table in force.  What is in flight ends first; nothing is handed back."""

    name: str
    table: Table
    before: Table | None

    @property
    def inverse(self) -> Step | None:
        return Reload(self.name, self.before, self.table) if self.before else None

    @property
    def command(self) -> str:
        return (
            f"{_with_table(f'dmsetup load {self.name}', self.table)}\n{resume_command(self.name)}"
        )


@dataclass(frozen=True, slots=True)
class Clear:
    """Forget a table that was loaded and never came in force."""

    name: str

    @property
    def inverse(self) -> Step | None:
        return None

    @property
    def command(self) -> str:
        return f"dmsetup clear {self.name}"


@dataclass(frozen=True, slots=True)
class Resume:
    name: str

    @property
    def inverse(self) -> Step | None:
        return None

    @property
    def command(self) -> str:
        return resume_command(self.name)


@dataclass(frozen=True, slots=True)
class MakeNode:
    """Have its path in /dev/mapper lead to the device."""

    name: str

    @property
    def inverse(self) -> Step | None:
        return None

    @property
    def command(self) -> str:
        return f"dmsetup mknodes {self.name}"


@dataclass(frozen=True, slots=True)
class LimitDiscard:
    """Have the kernel cut discards into pieces of at most that many bytes; 0: offer none."""

    name: str
    limit_bytes: int
    before_bytes: int

    @property
    def inverse(self) -> Step | None:
        return LimitDiscard(self.name, self.before_bytes, self.limit_bytes)

    @property
    def command(self) -> str:
        number = f"dmsetup info -c --noheadings --separator : -o major,minor {self.name}"
        return f'echo {self.limit_bytes} > "/sys/dev/block/$({number})/queue/discard_max_bytes"'


Step = (
    MakeRam
    | FreeRam
    | ConnectNbd
    | DisconnectNbd
    | Create
    | Remove
    | Reload
    | Clear
    | Resume
    | MakeNode
    | LimitDiscard
)


def resume_command(name: str) -> str:
    return f"dmsetup resume {name} --noflush --nolockfs {_UNSYNCED}"


def _with_table(command: str, table: Table) -> str:
    text = render(table)
    if len(table) > 1:
        return f"{command} <<END\n{text}\nEND"
    quoted = shlex.quote(text)
    for variable in (RAM, NBD):
        quoted = quoted.replace(variable, f"'\"{variable}\"'")
    return f"{command} --table {quoted}"
