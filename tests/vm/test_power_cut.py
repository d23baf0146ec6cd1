"""Power cuts: a guest that is killed in mid-step, over disks that lose what was not flushed.

A round: start the volume, which recovers, then write, then cut; `Round` says where.  After each cut
the three media are as a power cut left them, and it must hold that

(a) every write that was acknowledged and flushed is on the primary (`powercut.lost`),
(b) every extent in which both sides differ is in the stored record (`powercut.unrecorded`),

and after the next start and its recovery that

(c) the recovery began with what the record named, the primary is as the cut left it, and both media
    are equal, byte by byte.

POWER_CUTS=N makes N rounds instead of a few, POWER_SEED=K other ones.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vm import powercut
from tests.vm.kernel import CHECKOUT
from tests.vm.lab import MIB, Disk, Guest, Job, LossyDisk, Mode
from tests.vm.lossy_server import Store

SIZE = 64 * MIB
PAGES = SIZE // powercut.PAGE_BYTES
EXTENT = 128 << 10
ETC, NAME = "/mnt/etc", "vol0"
SECONDS = 300.0  # for what must happen; the machine may be busy
CUTS = int(os.environ.get("POWER_CUTS", "5"))
SEED = int(os.environ.get("POWER_SEED", "1"))

pytestmark = [
    pytest.mark.usefixtures("vm"),
    pytest.mark.timeout(600 + 120 * CUTS),
]


class Where:
    """Kinds of moments for a cut."""

    LOAD = "under load, after some time"
    CHANGE = "under load, when a disk has taken a number of changes"
    UNFLUSHED = "under load without flushes; the primary loses all that it can, the others nothing"
    RECOVERY = "in the start or the recovery, when a disk has taken a number of changes"
    STOP = "while the volume is being stopped, or after it"


@dataclass(frozen=True, slots=True)
class Round:
    number: int
    where: str
    disk: str
    changes: int
    seconds: float

    @classmethod
    def drawn(cls, number: int) -> Round:
        chance = random.Random(f"{SEED} {number}")
        kinds = (Where.LOAD, Where.RECOVERY, Where.UNFLUSHED, Where.STOP, Where.CHANGE)
        where = kinds[number] if number < len(kinds) else chance.choice(kinds)
        most = {Where.RECOVERY: 60, Where.CHANGE: 1200}.get(where, 1)
        changes = int(most ** chance.random())
        disk = chance.choice(("primary", "secondary", "secondary", "record", "record"))
        return cls(number, where, disk, changes, chance.uniform(0.2, 5.0))


class Log:
    """What the guest's program says, line by line; filled by the guest's reader."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors = ""
        self._rest = ""

    def took(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self.errors += data.decode(errors="replace")
            return
        *lines, self._rest = (self._rest + data.decode()).split("\n")
        self.lines += lines

    def find(self, word: str) -> str | None:
        for line in tuple(self.lines):
            if line.startswith(word):
                return line.removeprefix(word).strip()
        return None


class Lying:
    """A disk's store that says it flushed, and did not."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.read = store.read

    def write(self, offset: int, data: bytes, fua: bool = False) -> None:
        self._store.write(offset, data)

    def zero(self, offset: int, length: int, fua: bool = False) -> None:
        self._store.zero(offset, length)

    def flush(self) -> None:
        """Nothing."""


class Machine:
    """A guest with one volume on lossy disks, and what its media held at the latest cut."""

    def __init__(self, seed: int) -> None:
        self.primary = LossyDisk("primary", SIZE, seed=seed)
        self.secondary = LossyDisk("secondary", SIZE, seed=seed)
        self.record = LossyDisk("record", 4 * MIB, seed=seed)
        self.disks = {disk.name: disk for disk in (self.primary, self.secondary, self.record)}
        self.guest = Guest([*self.disks.values(), Disk("etc", 32 * MIB)], memory_mib=1024)
        self.before = bytes(SIZE)
        self.runs: list[tuple[int, int]] = []
        self.recovered = 0

    def prepare(self) -> None:
        options = f"--attach dm --initial-sync skip --extent-size {EXTENT} --record-limit 8MiB"
        self.guest.sh(
            f"mkfs.ext4 -q /dev/lab/etc; mkdir {ETC}; mount /dev/lab/etc {ETC};"
            f" .venv/bin/dmctl --config-dir {ETC} create {NAME} --primary /dev/lab/primary"
            f" --secondary /dev/lab/secondary --record /dev/lab/record {options}"
            f" --block-size 64KiB --era-interval 300ms; sync"
        )

    def start(self, number: int, *, flushing: bool, log: Log) -> Job:
        if number:
            self.guest.boot()
            self.guest.sh(f"mkdir {ETC}; mount /dev/lab/etc {ETC}")
        words = [f"{CHECKOUT}/.venv/bin/python", "-m", "tests.vm.powercut_guest", NAME]
        words += [str(number), str(SIZE), str(int(flushing))]
        env = {"DMCTL_CONFIG_DIR": ETC, "DMCTL_RUN_DIR": "/run/dmctl", "NO_COLOR": "1"}
        return self.guest.start(words, env=env, sink=log.took)

    def cut(self) -> str:
        """Cuts the power; what it did."""
        losses = self.guest.power_cut()
        assert self.guest.complaints() == []
        return "; ".join(
            f"{name}: {loss.mode.name}, kept {loss.kept_bytes}, lost {loss.lost_bytes}"
            for name, loss in losses.items()
        )

    def judge(self, ledger: powercut.Ledger) -> list[str]:
        """Claims (a) and (b), of the media as a cut left them."""
        primary, secondary = (disk.path.read_bytes() for disk in (self.primary, self.secondary))
        self.runs = dumped(self.record.path)
        differ = powercut.differing(primary, secondary, EXTENT)
        problems = [
            *powercut.lost(self.before, primary, ledger),
            *powercut.unrecorded(differ, self.runs),
        ]
        self.before = primary
        return problems

    def check_recovery(self, status: dict[str, Any]) -> None:
        """Claim (c).  In sync means durable on both sides, so their media say so at once."""
        recorded = sum(count for _, count in self.runs)
        recovery = status["last_recovery"]
        assert recovery["extents"] == recorded
        assert recovery["reason"] == ("crash" if recorded else "clean")
        assert status["state"] == "in-sync"
        assert self.primary.path.read_bytes() == self.before, "recovery has changed the primary"
        assert self.secondary.path.read_bytes() == self.before, "the sides differ after recovery"
        self.recovered += bool(recorded)


def dumped(record: Path) -> list[tuple[int, int]]:
    """The extents of a record, as an administrator sees them."""
    words = [sys.executable, "-m", "dmctl", "--json", "record", "dump", str(record)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return [(first, count) for first, count in json.loads(done.stdout)["extents"]["runs"]]


def until(happened: Callable[[], bool], job: Job, log: Log) -> None:
    """Waits for what a disk or the guest's program brings about."""
    end_s = time.monotonic() + SECONDS
    while not happened():
        assert log.find("error") is None, log.find("error")
        assert job.status is None or happened(), f"{job.status}: {log.errors}"
        assert time.monotonic() < end_s, f"{job.command}: {log.lines[-3:]} {log.errors}"
        pause.wait(0.02)


pause = threading.Event()  # never set: a cut at a random moment has no event to wait for


def go_through(
    machine: Machine, round_: Round, modes: dict[str, Mode] | None = None
) -> tuple[powercut.Ledger, str]:
    """One round up to and with its cut; `modes`: what it keeps of which disk, if not by chance."""
    flushing = round_.where != Where.UNFLUSHED
    if not flushing:
        modes = dict.fromkeys(machine.disks, Mode.EVERYTHING) | {"primary": Mode.NOTHING}
    for name, disk in machine.disks.items():
        disk.mode = modes.get(name) if modes else None
    log = Log()
    ledger = powercut.Ledger(round_.number, PAGES, flushing)
    server = machine.disks[round_.disk].server
    job = machine.start(round_.number, flushing=flushing, log=log)
    if round_.where == Where.RECOVERY:
        server.freeze_after(round_.changes)
    until(lambda: server.frozen.is_set() or log.find("recovered") is not None, job, log)
    if not server.frozen.is_set():
        server.thaw()
        machine.check_recovery(json.loads(log.find("recovered") or ""))
        if round_.where == Where.CHANGE:
            server.freeze_after(round_.changes)
        job.signal(signal.SIGUSR1)
        if round_.where == Where.CHANGE:
            until(server.frozen.is_set, job, log)
        elif round_.where == Where.STOP:
            until(lambda: log.find("all") is not None, job, log)
            job.signal(signal.SIGUSR2)
            until(lambda: pause.wait(round_.seconds) or True, job, log)
        else:
            pause.wait(round_.seconds)
    assert log.find("error") is None, log.find("error")
    losses = machine.cut()
    for line in log.lines:
        if line.startswith(("all", "one")):
            ledger.note(line)
    return ledger, losses


def test_case_01_and_37_power_cuts(record_property: Callable[[str, object], None]) -> None:
    machine = Machine(SEED)
    told = 0
    with machine.guest:
        machine.prepare()
        for number in range(CUTS):
            round_ = Round.drawn(number)
            began_s = time.monotonic()
            ledger, losses = go_through(machine, round_)
            told += ledger.told
            problems = machine.judge(ledger)
            said = (
                f"POWER_SEED={SEED}: {round_}: {ledger.told} promises, {losses},"
                f" {sum(count for _, count in machine.runs)} extents recorded,"
                f" {time.monotonic() - began_s:.0f} s"
            )
            print(said, flush=True)
            assert problems == [], said
        log = Log()
        job = machine.start(CUTS, flushing=True, log=log)
        until(lambda: log.find("recovered") is not None, job, log)
        machine.check_recovery(json.loads(log.find("recovered") or ""))
    record_property("cuts", CUTS)
    # Otherwise nothing was tested.
    assert told > CUTS
    assert machine.recovered


def test_disks_that_lie_are_found_out() -> None:
    """What the test above is made of can fail: a primary and a record that do not flush."""
    machine = Machine(SEED)
    with machine.guest:
        machine.prepare()
        for disk in (machine.primary, machine.record):
            disk.server.store = Lying(disk.server.store)
        modes = {"primary": Mode.NOTHING, "secondary": Mode.EVERYTHING, "record": Mode.NOTHING}
        ledger, losses = go_through(machine, Round(0, Where.LOAD, "record", 1, 2.0), modes)
        problems = machine.judge(ledger)
    assert [text for text in problems if "is to be there" in text], (problems, losses)
    assert [text for text in problems if "is not in the record" in text], (problems, losses)
