"""Carries steps out, and takes them back when one of them fails (edge).

`execute` does what the plan says; `Dmsetup` is the actor that changes the kernel.  `reach` looks,
plans and executes until nothing is left to do, so that it begins from whatever state an earlier
attempt left, and ends only with the kernel's word that the goal is reached.

1. Each program is given its arguments as a list, its time is bounded, and it waits for no udev
   cookie: a udevd that stands still delays nothing for longer than `NODE_WAIT_S` a device.
2. Where building fails, the steps that were done are undone, newest first, back to the last one
   that has no inverse.  What removing has reached stays: the next attempt goes on from there.
3. What resumes a device spawns no process: the program's own file may be on the suspended volume.
4. A device is known by its node in /dev/mapper only once udev has made it; where udev does not run
   or does not answer, the node is made here.  A node made here is removed here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

from bitmapd.errors import (
    BitmapdError,
    BusyError,
    NotFoundError,
    TimeOutError,
    WrongStateError,
    class_for,
)
from dmctl.kernel import ram
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.nbd_netlink import NbdNetlink
from dmctl.kernel.observe import SYS_DEV_BLOCK, node_number, observe
from dmctl.model.names import device_path
from dmctl.model.plan import plan
from dmctl.model.stack import Goal, Observed, Wanted, with_devices
from dmctl.model.steps import (
    RAM,
    Clear,
    ConnectNbd,
    Create,
    DisconnectNbd,
    FreeRam,
    LimitDiscard,
    MakeNode,
    MakeRam,
    Reload,
    Remove,
    Resume,
    Step,
)
from dmctl.model.targets import Table, render

PROGRAM: Final = "dmsetup"
PROGRAM_TIMEOUT_S: Final = 30.0
NODE_WAIT_S: Final = 3.0
# What looks at new devices, udev among others, has them open for a moment without saying so.
BUSY_S: Final = 1.0
_POLL_S: Final = 0.02
_ROUNDS: Final = 4
_UDEV_CONTROL: Final = Path("/run/udev/control")
_BUILDING: Final = {Goal.TRACKED, Goal.ATTACHED}

Log = Callable[[str], None]


class Actor(Protocol):
    """Does single things.  Errors are OSErrors or BitmapdErrors; a failed one has no effect."""

    def make_ram(self, size_bytes: int, stamp: str) -> str:
        """Path of the new device."""

    def free_ram(self, device: str) -> None: ...

    def disconnect_nbd(self, device: str) -> None: ...

    def create(self, name: str, uuid: str, table: Table) -> None: ...

    def remove(self, name: str) -> None: ...

    def reload(self, name: str, table: Table) -> None: ...

    def clear(self, name: str) -> None: ...

    def resume(self, name: str) -> None: ...

    def make_node(self, name: str) -> None: ...

    def limit_discard(self, name: str, limit_bytes: int) -> None: ...


# -- steps ------------------------------------------------------------------------------------
def reach(
    wanted: Wanted,
    look: Callable[[], Observed],
    actor: Actor,
    *,
    log: Log = lambda _: None,
    busy_s: float = BUSY_S,
) -> Observed:
    """Bring the kernel to the goal; what it then has.  `busy_s`: how long to wait for what is in
    use."""
    until_s = time.monotonic() + busy_s
    rounds = 0
    while True:
        observed = look()
        try:
            steps = plan(observed, wanted)
        except BusyError:
            if time.monotonic() >= until_s:
                raise
            time.sleep(_POLL_S)
            continue
        if not steps:
            return observed
        if rounds == _ROUNDS:
            raise BitmapdError(
                f"volume '{wanted.volume.name}' cannot be brought to '{wanted.goal.value}': after"
                f" {rounds} rounds this is left to do: {steps[0].command}",
                hint="does another program change its devices?",
            )
        execute(steps, actor, undo=wanted.goal in _BUILDING, log=log)
        rounds += 1


def execute(steps: Iterable[Step], actor: Actor, *, undo: bool, log: Log = lambda _: None) -> None:
    """`log` is given the command of each step before it is done."""
    made: dict[str, str] = {}
    done: list[Step] = []
    for step in steps:
        try:
            _perform(step, actor, made, log)
        except (BitmapdError, OSError) as error:
            left = _undo(done, actor, made, log) if undo else []
            raise _failed(step, error, left) from error
        done.append(step)


def _undo(done: Sequence[Step], actor: Actor, made: dict[str, str], log: Log) -> list[str]:
    """What went wrong; the rest is left, because it is below what could not be undone."""
    for step in reversed(done):
        inverse = step.inverse
        if inverse is None:
            break
        try:
            _perform(inverse, actor, made, log)
        except (BitmapdError, OSError) as error:
            return [f"{_first_line(inverse)}: {error}"]
    return []


def _failed(step: Step, error: BitmapdError | OSError, left: Sequence[str]) -> BitmapdError:
    if isinstance(error, BitmapdError):
        kind, reason, hint = type(error), error.message, error.hint
    else:
        kind = class_for(error)
        reason, hint = error.strerror or str(error), None
    message = f"{reason} (at: {_first_line(step)})"
    for problem in left:
        message += f"; what was done before could not be undone: {problem}"
    if left:
        hint = "the next start or stop of the volume tidies up what is left"
    return kind(message, hint)


def _first_line(step: Step) -> str:
    line, _, more = step.command.partition("\n")
    return f"{line} …" if more else line


def _perform(step: Step, actor: Actor, made: dict[str, str], log: Log) -> None:
    log(step.command)
    match step:
        case MakeRam(size_bytes, stamp):
            made[RAM] = actor.make_ram(size_bytes, stamp)
        case FreeRam(device):
            actor.free_ram(made.get(device, device))
        case ConnectNbd():
            raise WrongStateError(
                "the kernel's NBD client is not connected to bitmapd",
                hint="start the volume with 'dmctl start'",
            )
        case DisconnectNbd(device):
            actor.disconnect_nbd(device)
        case Create(name, uuid, table):
            actor.create(name, uuid, with_devices(table, made))
        case Remove(name):
            actor.remove(name)
        case Reload(name, table):
            actor.reload(name, with_devices(table, made))
        case Clear(name):
            actor.clear(name)
        case Resume(name):
            actor.resume(name)
        case MakeNode(name):
            actor.make_node(name)
        case LimitDiscard(name, limit_bytes):
            actor.limit_discard(name, limit_bytes)


# -- the kernel -------------------------------------------------------------------------------
class Dmsetup:
    """See the module docstring; an `Actor`."""

    def __init__(self, mapper: DeviceMapper, *, timeout_s: float = PROGRAM_TIMEOUT_S) -> None:
        self._mapper = mapper
        self._timeout_s = timeout_s

    def reach(self, wanted: Wanted, *, log: Log = lambda _: None) -> Observed:
        """Bring the kernel to the goal."""
        return reach(wanted, lambda: observe(wanted.volume, self._mapper), self, log=log)

    def make_ram(self, size_bytes: int, stamp: str) -> str:
        return ram.make(size_bytes, stamp)

    def free_ram(self, device: str) -> None:
        ram.free(device)

    def disconnect_nbd(self, device: str) -> None:
        with NbdNetlink() as netlink:
            netlink.disconnect(int(device.removeprefix("/dev/nbd")))

    def create(self, name: str, uuid: str, table: Table) -> None:
        self._run("create", name, "--uuid", uuid, "--noudevsync", table=table)
        try:
            self.make_node(name)
        except BaseException:
            self.remove(name)
            raise

    def remove(self, name: str) -> None:
        self._run("remove", name, "--noudevsync")
        self._await_no_node(name)

    def reload(self, name: str, table: Table) -> None:
        self._run("load", name, table=table)
        try:
            self._run("resume", name, "--noflush", "--nolockfs", "--noudevsync")
        except BaseException:
            self.clear(name)
            raise

    def clear(self, name: str) -> None:
        self._mapper.clear(name)

    def resume(self, name: str) -> None:
        self._mapper.resume(name)

    def make_node(self, name: str) -> None:
        """udev makes a link; it is waited for, so that there is never a node in its way."""
        number = self._number(name)
        if _until(lambda: node_number(name) == number):
            return
        self._run("mknodes", name)
        if node_number(name) != number:
            raise OSError(errno.ENODEV, f"{device_path(name)} does not lead to the device {number}")

    def limit_discard(self, name: str, limit_bytes: int) -> None:
        entry = SYS_DEV_BLOCK / self._number(name) / "queue" / "discard_max_bytes"
        entry.write_text(str(limit_bytes))
        set_bytes = int(entry.read_text())
        if set_bytes > limit_bytes:
            raise OSError(
                errno.EPROTO,
                f"{device_path(name)} takes discards of {set_bytes} bytes, though it was set to"
                f" take at most {limit_bytes}",
            )

    # -- nodes --------------------------------------------------------------------------------
    def _number(self, name: str) -> str:
        device = self._mapper.device(name)
        if device is None:
            raise OSError(errno.ENXIO, f"{device_path(name)} has gone")
        return device.number

    def _await_no_node(self, name: str) -> None:
        """udev removes a link that it made, unless somebody has made such a device anew."""
        path = device_path(name)
        if os.path.islink(path) and _until(lambda: not os.path.lexists(path)):
            return
        if self._mapper.device(name) is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    # -- programs -----------------------------------------------------------------------------
    def _run(self, verb: str, name: str, *options: str, table: Table | None = None) -> None:
        """dmsetup, with a table on its standard input."""
        words = [PROGRAM, verb, name, *options]
        path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin"
        doing = f"'{' '.join(words[:3])}'"
        try:
            done = subprocess.run(
                words,
                input="" if table is None else render(table) + "\n",
                env={"PATH": path, "LC_ALL": "C"},
                cwd="/",
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self._timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise NotFoundError(
                "the program dmsetup is not installed", hint="install the package dmsetup"
            ) from None
        except subprocess.TimeoutExpired:
            raise TimeOutError(
                f"{doing} did not end within {self._timeout_s:g} s",
                hint="'dmsetup info' and the kernel's log may say what it waits for",
            ) from None
        if done.returncode:
            raise _explained(doing, done.stderr)


def _explained(doing: str, text: str) -> OSError:
    """What dmsetup said, with the errno that it names in words."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if line != "Command failed."]
    reason = "; ".join(lines) or "it failed without a word"
    named = [code for code, words in _WORDS.items() if words in reason]
    # The longest: one error's words may begin with those of another.
    number = max(named, key=lambda code: len(_WORDS[code]), default=errno.EIO)
    return OSError(number, f"{doing}: {reason}")


_WORDS: Final = {
    code: os.strerror(code)
    for code in (
        errno.EBUSY,
        errno.EEXIST,
        errno.ENODEV,
        errno.ENOENT,
        errno.ENXIO,
        errno.ENOSPC,
        errno.EACCES,
        errno.EPERM,
        errno.EINVAL,
        errno.ENOMEM,
        errno.EINTR,
        errno.ETIMEDOUT,
    )
}


def _until(happened: Callable[[], bool]) -> bool:
    """Whether it happens while udev may still be at work; libudev has no way to ask it."""
    until_s = time.monotonic() + NODE_WAIT_S
    while not happened():
        if not _UDEV_CONTROL.exists() or time.monotonic() >= until_s:
            return False
        time.sleep(_POLL_S)
    return True
