"""A virtual machine with Debian's kernel over this machine's own root file system.

    with Guest([Disk("data"), LossyDisk("record", 8 * MIB, seed=1)]) as guest:
        guest.sh("mkfs.ext4 -q /dev/lab/data")
        job = guest.start(["fio", ...])
        guest.power_cut()      # SIGKILL of qemu; lossy disks lose what was not flushed
        guest.boot()           # again, over the same disks

1. The root is what this machine has, read-only, below an overlay: the checkout and its `.venv` are
   at their own paths.  /tmp, /run and everything written are private to one boot and gone with it;
   /tmp is ext4 and so has O_DIRECT.  `share` is a folder that both sides may write, at the same
   path in both.  Only disks outlive a boot.
2. There is no udev and no systemd; /dev comes from the kernel.  `modprobe` works.
3. A guest that panics, locks up (soft lock-up: panic) or stays silent for `SILENCE_S` ends every
   wait with `GuestDied`, which carries the end of its console; a silent one is made to show its
   stacks first.
4. qemu dies with the thread that called `boot`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.vm.disks import GuestDisk
from tests.vm.kernel import CHECKOUT, Kernel, ready
from tests.vm.lossy import Loss
from tests.vm.qemu import Hardware, Monitor, check_machine, listen, prepare

BOOT_S = 300.0
SILENCE_S = 240.0
_AFTER_NMI_S = 20.0
_PANIC = "Kernel panic - not syncing"
_COMPLAINT = re.compile(r"\b(BUG|WARNING|Oops|KASAN|UBSAN|general protection fault)\b")

Sink = Callable[[int, bytes], None]


class GuestDied(Exception):
    """The guest ended without being asked to; the text ends with the tail of its console."""


class CommandFailed(Exception):
    """A program in the guest ended with a status that was not expected."""


@dataclass(frozen=True, slots=True)
class Result:
    status: int
    out: str
    err: str


class Job:
    """A program that runs in the guest."""

    def __init__(self, guest: Guest, number: int, words: Sequence[str], sink: Sink | None) -> None:
        self._guest = guest
        self._number = number
        self._words = words
        self._sink = sink
        self._output = {1: bytearray(), 2: bytearray()}
        self.status: int | None = None

    def signal(self, number: int) -> None:
        """To the whole process group."""
        self._guest.send({"id": self._number, "signal": number})

    def wait(self, timeout_s: float = 120, check: bool = True) -> Result:
        if not self._guest.wait_for(lambda: self.status is not None, timeout_s):
            self._guest.show_blocked()
            raise TimeoutError(
                f"{self.command} did not end within {timeout_s:g} s\n{self._said()}\n"
                f"{self._guest.console_tail()}"
            )
        status = self.status if self.status is not None else 0
        result = Result(status, self.out, self._output[2].decode(errors="replace"))
        if check and status != 0:
            raise CommandFailed(f"{self.command} ended with {status}\n{self._said()}")
        return result

    @property
    def command(self) -> str:
        return shlex.join(self._words)

    @property
    def out(self) -> str:
        """What it has written so far."""
        return self._output[1].decode(errors="replace")

    def _said(self) -> str:
        return "\n".join(text.decode(errors="replace") for text in self._output.values())

    def took(self, message: dict[str, Any]) -> None:
        if "status" in message:
            self.status = message["status"]
            return
        data = base64.b64decode(message["data"])
        self._output[message["fd"]] += data
        if self._sink is not None:
            self._sink(message["fd"], data)


class Guest:
    """See the module.  Threads: one reads what the agent says; the caller's waits."""

    def __init__(
        self,
        disks: Iterable[GuestDisk] = (),
        *,
        memory_mib: int = 2048,
        cpus: int = 2,
        share: Path | None = None,
        console: Path | None = None,
        kernel_arguments: Sequence[str] = (),
        silence_s: float = SILENCE_S,
        with_network: bool = False,
    ) -> None:
        """`with_network`: a card that leads to this machine, for whoever sets it up."""
        self.disks = list(disks)
        self.boots = 0
        self.boot_s = 0.0
        self._hardware = Hardware(memory_mib, cpus, kernel_arguments, share, with_network)
        self._keep_console = console
        self._silence_s = silence_s
        self._kernel: Kernel | None = None
        self._folder = Path()
        self._qemu: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._monitor: Monitor | None = None
        self._reader: threading.Thread | None = None
        self._changed = threading.Condition()
        self._jobs: dict[int, Job] = {}
        self._hello: dict[str, Any] | None = None
        self._gone = True
        self._heard_at = 0.0

    def __enter__(self) -> Self:
        check_machine()
        self._kernel = ready()
        self._folder = Path(tempfile.mkdtemp(prefix="lab"))
        try:
            for disk in self.disks:
                disk.start(self._folder)
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def boot(self, timeout_s: float = BOOT_S) -> None:
        """From power on until programs can be run."""
        if self._qemu is not None or self._kernel is None:
            raise RuntimeError("the guest runs already, or this is outside of `with`")
        began = time.monotonic()
        self._hello = None
        self._jobs.clear()
        self._gone = False
        self._heard_at = began
        with listen(self._folder / "port") as port, listen(self._folder / "qmp") as monitor:
            command = prepare(self._kernel, self._hardware, self.disks, self._folder)
            with self._said.open("wb") as output:
                self._qemu = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
            try:
                self._port = port.accept()[0]
                self._monitor = Monitor(monitor.accept()[0])
            except TimeoutError:
                self._kill()
                said = self._said.read_text(errors="replace")
                raise GuestDied(f"qemu did not start: {said}") from None
        self._reader = threading.Thread(target=self._read, args=(self._port,), daemon=True)
        self._reader.start()
        if not self.wait_for(lambda: self._hello is not None, timeout_s):
            tail = self.console_tail()
            self._kill()
            raise GuestDied(f"the guest did not boot within {timeout_s:g} s\n{tail}")
        self.boots += 1
        self.boot_s = time.monotonic() - began

    def close(self) -> None:
        self._kill()
        for disk in self.disks:
            disk.stop()
        if self._folder != Path():
            if self._keep_console is not None and self._console.exists():
                shutil.copyfile(self._console, self._keep_console)
            shutil.rmtree(self._folder)
            self._folder = Path()

    def power_cut(self) -> dict[str, Loss]:
        """Ends the guest in mid-step; what the lossy disks lost."""
        self._kill()
        losses = {disk.name: disk.cut() for disk in self.disks}
        return {name: loss for name, loss in losses.items() if loss is not None}

    def shutdown(self, timeout_s: float = 60) -> None:
        """Flushes file systems and disks, then powers off; nothing is unmounted."""
        self.run(["sync"], timeout_s=timeout_s)
        self.start(["sh", "-c", "echo o >/proc/sysrq-trigger; sleep 100"])
        qemu = self._qemu
        if qemu is not None:
            qemu.wait(timeout_s)
        self._kill()

    def start(
        self,
        words: Sequence[str],
        *,
        cwd: Path = CHECKOUT,
        env: dict[str, str] | None = None,
        data: bytes | None = None,
        sink: Sink | None = None,
    ) -> Job:
        """`data` is the program's standard input; `sink` gets its output as it comes."""
        with self._changed:
            number = len(self._jobs) + 1
            job = self._jobs[number] = Job(self, number, words, sink)
        request: dict[str, Any] = {"id": number, "run": list(words), "cwd": str(cwd)}
        request["env"] = env or {}
        if data is not None:
            request["input"] = base64.b64encode(data).decode()
        self.send(request)
        return job

    def run(
        self,
        words: Sequence[str],
        *,
        timeout_s: float = 120,
        check: bool = True,
        cwd: Path = CHECKOUT,
        env: dict[str, str] | None = None,
        data: bytes | None = None,
        sink: Sink | None = None,
    ) -> Result:
        return self.start(words, cwd=cwd, env=env, data=data, sink=sink).wait(timeout_s, check)

    def sh(self, script: str, *, timeout_s: float = 120) -> str:
        """Runs a script of bash that stops at its first failure; what it wrote."""
        words = ["bash", "-euo", "pipefail", "-c", script]
        return self.run(words, timeout_s=timeout_s).out

    def qmp(self, command: str, **arguments: Any) -> Any:
        """A command of qemu's monitor, for example `block_resize`, `stop`, `cont`."""
        if self._monitor is None:
            raise GuestDied("the guest is not running")
        return self._monitor.ask(command, arguments)

    def console(self) -> str:
        """What the kernel said in this boot."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def console_tail(self, lines: int = 60) -> str:
        tail = "\n".join(self.console().splitlines()[-lines:])
        return f"--- console of the guest\n{tail}\n--- {self._said.read_text(errors='replace')}"

    def complaints(self) -> list[str]:
        """Lines of the kernel that mean a bug of the kernel."""
        return [line for line in self.console().splitlines() if _COMPLAINT.search(line)]

    def show_blocked(self) -> None:
        """Has the kernel write to its console what the tasks that wait for a device wait for."""
        job = self.start(["sh", "-c", "echo 8 >/proc/sysrq-trigger; echo w >/proc/sysrq-trigger"])
        self.wait_for(lambda: job.status is not None, 10)

    def send(self, message: dict[str, Any]) -> None:
        if self._port is None:
            raise GuestDied("the guest is not running")
        try:
            self._port.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise GuestDied(f"the guest is gone ({error})\n{self.console_tail()}") from None

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether the condition came true; it is looked at whenever the agent said something."""
        ends_at = time.monotonic() + timeout_s
        with self._changed:
            while not condition():
                if self._gone:
                    raise GuestDied(f"the guest is gone\n{self.console_tail()}")
                now = time.monotonic()
                if now >= ends_at:
                    return False
                if self._hello is not None and now - self._heard_at > self._silence_s:
                    break
                news = self._changed.wait(min(ends_at - now, 5))
                # After a panic qemu ends by itself, but not while a disk owes it an answer.
                if not news and _PANIC in self.console():
                    break
            else:
                return True
        raise self._end_of_silence()

    @property
    def _console(self) -> Path:
        return self._folder / "console"

    @property
    def _said(self) -> Path:
        """What qemu itself has to say."""
        return self._folder / "qemu"

    def _end_of_silence(self) -> GuestDied:
        """Ends the guest.  A panic by NMI prints the stack of every processor."""
        why = "panicked"
        if _PANIC not in self.console() and self._monitor is not None and self._qemu is not None:
            why = f"was silent for {self._silence_s:g} s"
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._monitor.ask("inject-nmi", {})
                self._qemu.wait(_AFTER_NMI_S)
        tail = self.console_tail(120)
        self._kill()
        return GuestDied(f"the guest {why}\n{tail}")

    def _read(self, port: socket.socket) -> None:
        rest = b""
        while True:
            try:
                got = port.recv(1 << 20)
            except OSError:
                got = b""
            if not got:
                break
            *lines, rest = (rest + got).split(b"\n")
            with self._changed:
                self._heard_at = time.monotonic()
                for line in lines:
                    self._message(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _message(self, message: dict[str, Any]) -> None:
        if "hello" in message:
            self._hello = message
        elif "id" in message:
            self._jobs[message["id"]].took(message)

    def _kill(self) -> None:
        if self._qemu is None:
            return
        self._qemu.kill()
        self._qemu.wait()
        if self._reader is not None:
            self._reader.join()
        if self._port is not None:
            self._port.close()
        if self._monitor is not None:
            self._monitor.close()
        self._qemu = self._port = self._monitor = self._reader = None
