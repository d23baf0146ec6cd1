"""The tests of tests/vm/guest, in as few boots as possible: one, unless a test kills the guest.

The guest writes the name of each test to a shared file before it begins (`tests/vm/conftest.py`).
If the guest dies, or a test is stuck where no signal reaches it, that test is reported as the
culprit, and a new guest runs those that had not begun (the conftest leaves out the others).  The
suite has failed then, but the other results are there.

Left in the results folder: `guest-N.xml` (junit) and `console-N.txt` of each boot.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.vm.disks import GIB, Disk, GuestDisk
from tests.vm.kernel import CHECKOUT
from tests.vm.machine import Guest, GuestDied, Job

TESTS = "tests/vm/guest"
TEST_S = 600
"""Time limit of a test in the guest that names none."""
STUCK_S = 900.0
"""Without a new test for so long, a time limit was not obeyed: the test waits in the kernel."""
MAX_DEATHS = 3
_NO_TESTS = 5


def standard_disks() -> list[GuestDisk]:
    """What the tests find below /dev/lab."""
    return [
        *(Disk(f"disk{number}", GIB) for number in range(4)),
        *(Disk(f"disk4k{number}", GIB, sector_bytes=4096) for number in range(3)),
    ]


@dataclass
class Suite:
    results: Path
    words: list[str]
    memory_mib: int
    say: Callable[[str], None]
    boots: int = 0
    culprits: list[str] = field(default_factory=list)

    def run(self) -> int:
        """Status for the shell."""
        self.results.mkdir(parents=True, exist_ok=True)
        began_at = time.monotonic()
        status = 0
        self._progress.write_text("")
        while True:
            died, ended = self._boot()
            status = status or ended
            if not died or len(self.culprits) >= MAX_DEATHS:
                break
        for culprit in self.culprits:
            self.say(f"THE GUEST DIED in {culprit}; see results")
        self.say(f"{self.boots} boots, {time.monotonic() - began_at:.0f} s, status {status}")
        return status

    @property
    def _progress(self) -> Path:
        return self.results / "progress"

    def _begun(self) -> list[str]:
        return self._progress.read_text().splitlines()

    def _boot(self) -> tuple[bool, int]:
        """Whether the guest died, and pytest's status or 1."""
        self.boots += 1
        guest = Guest(
            standard_disks(),
            memory_mib=self.memory_mib,
            share=self.results,
            console=self.results / f"console-{self.boots}.txt",
        )
        before = len(self._begun())
        try:
            with guest:
                self.say(f"guest up after {guest.boot_s:.1f} s")
                status = self._watch(guest, self._start(guest))
                complaints = guest.complaints()
        except GuestDied as error:
            self.say(str(error))
            begun = self._begun()[before:]
            self.culprits.append(begun[-1] if begun else "no test")
            return bool(begun), 1
        for line in complaints:
            self.say(f"THE KERNEL COMPLAINED: {line}")
        if status == _NO_TESTS and (self.culprits or self.words):
            status = 0
        return False, status or int(bool(complaints))

    def _start(self, guest: Guest) -> Job:
        chosen = [] if any(not word.startswith("-") for word in self.words) else [TESTS]
        command = [
            *(str(CHECKOUT / ".venv" / "bin" / "python"), "-m", "pytest", "-vv"),
            *("-p", "no:cacheprovider", "--durations=10", f"--timeout={TEST_S}"),
            f"--junitxml={self.results}/guest-{self.boots}.xml",
            *(self.words + chosen),
        ]
        return guest.start(command, env={"LAB_PROGRESS": str(self._progress)}, sink=pass_on)

    def _watch(self, guest: Guest, job: Job) -> int:
        begun, since = 0, time.monotonic()
        while not guest.wait_for(lambda: job.status is not None, 30):
            now = len(self._begun())
            if now != begun:
                begun, since = now, time.monotonic()
            elif time.monotonic() - since > STUCK_S:
                guest.show_blocked()
                tail = guest.console_tail(200)
                raise GuestDied(f"no test ended or began for {STUCK_S:g} s\n{tail}")
        return job.wait(check=False).status


def pass_on(fd: int, data: bytes) -> None:
    """A sink: the guest's streams are this process's."""
    stream = sys.stdout if fd == 1 else sys.stderr
    stream.buffer.write(data)
    stream.buffer.flush()
