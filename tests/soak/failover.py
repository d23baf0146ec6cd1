"""A site is lost at a random moment, and the other one takes over: round after round.

    python -m tests.soak.failover --rounds 100 [--kind ext4|xfs|postgres] [--seed 1]

Two sites on one machine, all of their disks such whose power can be cut.  A file system is mounted
from the volume and in use: files come, go and change (or pgbench is at work), and a ledger grows by
one line after the other, each made durable (or committed).  In each round, while the volume is
*not* in sync, the site that serves dies by kill -9 or a power cut, and the receiver before it, with
it or not at all.  The receiver is promoted.

1. The file system is whole: mounted, so that it replays its journal, then e2fsck or xfs_repair
   finds nothing; PostgreSQL recovers, and pg_amcheck finds nothing.
2. No line is missing that was durable before the cut of the promoted point, and none is torn.

The hosts go on there, the old site comes back as the receiver, and the next round is about the way
back.  In the end both sides are equal byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tests.soak.test_filesystems import STRESSORS
from tests.soak.test_postgresql import MONEY, DataBase, commit, program
from tests.support.filesystems import MAKE, check, need_filesystem
from tests.support.nbdfiles import NbdFile
from tests.support.needs import need
from tests.support.powercuts import PowerCutDisk, power_cut_disk
from tests.support.volumes import MIB, Volume, run, wait_gone

SIZE_BYTES = 384 * MIB
JOURNAL_BYTES = 160 * MIB
RECORD_BYTES = 8 * MIB
KINDS = ("ext4", "xfs", "postgres")
STRIKES = (
    "kill",
    "power cut",
    "kill of both",
    "power cut of both",
    "kill, the receiver stands still",
    "power cut, the receiver was restarted",
)
LINE_BYTES = 16
# All nine keep two slow processors busy for 50 s a round; which three changes from round to round.
STRESSORS_AT_ONCE = 3


class Site:
    """One of two, with a volume or a receiver on disks of its own."""

    def __init__(self, folder: Path, disks: ExitStack, rng: random.Random, link: str) -> None:
        folder.mkdir()
        self.folder = folder

        def disk(name: str, size_bytes: int) -> PowerCutDisk:
            return disks.enter_context(power_cut_disk(folder / name, size_bytes, rng))

        self.image = disk("image", SIZE_BYTES)
        self.record = disk("record", RECORD_BYTES)
        self.journal = disk("journal", JOURNAL_BYTES)
        self.volume = Volume(
            folder,
            SIZE_BYTES,
            media={"primary": self.image.device, "record": self.record.device},
            secondary_target=link,
            options=["--point-interval", "200ms"],
        )
        self.volume.secondary = folder / "unused"
        self.fresh = True  # never was a receiver: its journal has to be named

    def power_cut(self) -> None:
        """What ran here has ended."""
        for disk in (self.image, self.record, self.journal):
            disk.cut()

    def stand_still(self) -> None:
        os.kill(self.volume.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.volume.pid, signal.SIGCONT)

    def point(self, newer_than: int) -> None:
        words = ("wait", "vol0", "--for", "point", "--newer-than", str(newer_than))
        self.volume.dmctl(*words, "--timeout", "100s")

    @property
    def points(self) -> int:
        """The newest that is committed."""
        return int(self.volume.status()["points"]["number"])


class Ledger(Protocol):
    """Lines that are durable one after the other."""

    def line(self, number: int) -> None:
        """Returns when it is durable; ends with an error when the disk is lost."""


class Writer(threading.Thread):
    """Adds lines until its disk is lost; `durable_s`: Unix time at which each was durable."""

    def __init__(self, ledger: Ledger, first: int) -> None:
        super().__init__(name="ledger", daemon=True)
        self._ledger = ledger
        self.next = first
        self.durable_s: dict[int, float] = {}
        self._grown = threading.Condition()
        self.ended = False

    def run(self) -> None:
        try:
            while True:
                self._ledger.line(self.next)
                with self._grown:
                    self.durable_s[self.next] = time.time()
                    self.next += 1
                    self._grown.notify()
        except (OSError, AssertionError):  # the disk, or the data base on it, is gone
            with self._grown:
                self.ended = True
                self._grown.notify()

    def until(self, count: int) -> None:
        """So many lines are durable."""
        with self._grown:
            self._grown.wait_for(lambda: len(self.durable_s) >= count or self.ended, 60)
            assert len(self.durable_s) >= count, f"{len(self.durable_s)} of {count} lines"

    def newest_before(self, unix_s: float) -> int:
        """The last line that was durable before that time; 0: none."""
        return max((line for line, at in self.durable_s.items() if at < unix_s), default=0)


class Files:
    """Some of stress-ng's stressors of directories, names, attributes and allocation, others in
    each round, beside a ledger."""

    def __init__(self, kind: str, chance: random.Random) -> None:
        need("stress-ng")
        self.file_system = kind
        self._chance = chance
        # XFS sets an attribute in several transactions, and hides one that a crash has cut short.
        # Debian 12's xfs_repair calls that a damage ("is INCOMPLETE"), also on a bare disk.
        self._stressors = [name for name in STRESSORS if (kind, name) != ("xfs", "xattr")]
        self._stress: subprocess.Popen[bytes] | None = None

    def first(self, folder: Path) -> None:
        (folder / "ledger").touch()

    def begin(self, folder: Path) -> Ledger:
        work = folder / "stress"
        work.mkdir(exist_ok=True)
        command = ["stress-ng", "--temp-path", str(work), "--timeout", "600s", "--quiet"]
        command += ["--hdd-bytes", "8m", "--fallocate-bytes", "8m", "--oom-avoid"]
        for name in self._chance.sample(self._stressors, STRESSORS_AT_ONCE):
            command += [f"--{name}", "1"]
        self._stress = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        return FileLedger(folder / "ledger")

    def lose(self) -> None:
        """Everything that uses it dies."""
        process, self._stress = self._stress, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()  # until each of them has closed its output

    def found(self, folder: Path) -> int:
        """The last line that is there."""
        content = (folder / "ledger").read_bytes()
        count = len(content) // LINE_BYTES
        assert content[: count * LINE_BYTES] == b"".join(map(_line, range(1, count + 1)))
        return count


class FileLedger:
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def line(self, number: int) -> None:
        try:
            os.pwrite(self._fd, _line(number), (number - 1) * LINE_BYTES)
            os.fdatasync(self._fd)
        except OSError:
            os.close(self._fd)
            raise


def _line(number: int) -> bytes:
    return b"%015d\n" % number


class Postgres:
    """pgbench beside a table of numbers."""

    file_system = "ext4"

    def __init__(self, sockets: Path) -> None:
        need("setpriv")
        sockets.mkdir()
        sockets.chmod(0o777)
        self._sockets = sockets
        self._clients = ExitStack()
        self._first_process = 0

    def _base(self, folder: Path) -> DataBase:
        return DataBase(folder / "data", self._sockets)

    def first(self, folder: Path) -> None:
        base = self._base(folder)
        base.create()
        base.start()
        base.ask("CREATE TABLE ledger (id int PRIMARY KEY); CREATE EXTENSION amcheck")
        run(base.client("pgbench", "-i", "-s", "1", "-q", "postgres"))
        base.stop()

    def begin(self, folder: Path) -> Ledger:
        base = self._base(folder)
        self._first_process = base.start()
        self._clients.enter_context(
            program(base.client("pgbench", "-n", "-c", "4", "-T", "600", "postgres"))
        )
        client = self._clients.enter_context(program(base.client("psql", "-qAt", "postgres")))
        return TableLedger(client)

    def lose(self) -> None:
        first, self._first_process = self._first_process, 0
        if first:
            children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
            for pid in (first, *map(int, children)):
                with suppress(ProcessLookupError):  # some end with the first one
                    os.kill(pid, signal.SIGKILL)
            for pid in (first, *map(int, children)):
                wait_gone(pid)
        self._clients.close()

    def found(self, folder: Path) -> int:
        base = self._base(folder)
        base.start()
        try:
            count, last = base.ask("SELECT count(*), coalesce(max(id), 0) FROM ledger").split("|")
            assert count == last, f"{count} lines up to number {last}"
            assert base.ask(MONEY) == "t"
            run(base.client("pg_amcheck", "--heapallindexed", "postgres"))
            return int(count)
        finally:
            base.stop()


class TableLedger:
    def __init__(self, client: subprocess.Popen[str]) -> None:
        self._client = client

    def line(self, number: int) -> None:
        try:
            commit(self._client, number)
        except ValueError as error:  # its pipes were closed meanwhile
            raise OSError(str(error)) from error


class Mount:
    """The file system on a volume, mounted, until `leave`: also when its disk is gone, and all that
    used it."""

    def __init__(self, volume: Volume, folder: Path, kind: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._file = shown(volume)
        try:
            self._device = run(["losetup", "--find", "--show", str(self._file.path)]).strip()
            try:
                run(["mount", "-t", kind, self._device, str(folder)])
            except BaseException:
                run(["losetup", "--detach", self._device])
                raise
        except BaseException:
            self._file.end()
            raise

    def leave(self) -> None:
        _unmount(self.folder)
        run(["losetup", "--detach", self._device])
        self._file.end()


def shown(volume: Volume) -> NbdFile:
    return NbdFile(volume.folder / "shown", volume.uri)


def _unmount(folder: Path) -> None:
    """A process that was killed lets go of its folder a moment after it has closed its files."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        done = subprocess.run(["umount", str(folder)], capture_output=True, text=True, check=False)
        if not done.returncode:
            return
        time.sleep(0.02)
    raise AssertionError(done.stderr)


class Rounds:
    """See the module docstring.  `kind`: what is on the volume."""

    def __init__(self, folder: Path, kind: str, seed: int) -> None:
        self._chance = random.Random(f"{kind} {seed}")
        self._folder = folder
        self._host: Files | Postgres
        if kind == "postgres":
            self._host = Postgres(folder / "sockets")
        else:
            self._host = Files(kind, self._chance)
        need_filesystem(self._host.file_system)
        self.count: Counter[str] = Counter()
        self._disks = ExitStack()
        self._mount: Mount | None = None
        self._lines = 0
        link = f"receiver+unix:///vol0?socket={folder}/link"
        self.serving, self.other = (
            Site(folder / name, self._disks, self._chance, link) for name in ("near", "far")
        )
        self._link = link

    # -- the whole ----------------------------------------------------------------------------
    def begin(self) -> None:
        near, far = self.serving.volume, self.other.volume
        far.dmctl(
            "receive", "vol0", "--image", str(self.other.image.device),
            "--journal", str(self.other.journal.device), "--listen", self._link,
        )  # fmt: skip
        self.other.fresh = False
        near.create()
        near.start()
        file = shown(near)
        run([*MAKE[self._host.file_system], str(file.path)])
        file.end()
        mount = Mount(near, self._folder / "mnt", self._host.file_system)
        self._host.first(mount.folder)
        mount.leave()
        far.start()  # it comes after that, which is more than its journal would hold
        self.serving.point(0)

    def end(self) -> None:
        """All is quiet, and both sides are equal."""
        self.serving.volume.wait_in_sync()
        self.serving.volume.stop()
        self.other.volume.stop()
        run(["cmp", str(self.serving.image.content), str(self.other.image.content)])

    def close(self) -> None:
        """Whatever happened: nothing is left."""
        self._host.lose()
        for site in (self.serving, self.other):
            with suppress(OSError, ValueError):
                site.go_on()
            site.volume.destroy()
        if self._mount is not None:
            self._mount.leave()
        self._disks.close()

    # -- a round ------------------------------------------------------------------------------
    def round(self) -> bool:
        """Whether it counts: the volume was not in sync."""
        strike = self._chance.choice(STRIKES)
        self._mount = Mount(self.serving.volume, self._folder / "mnt", self._host.file_system)
        writer = Writer(self._host.begin(self._mount.folder), self._lines + 1)
        writer.start()
        number = self.serving.points
        writer.until(self._chance.randrange(1, 20))
        self.serving.point(number + 1)  # cut after the first lines, at the earliest
        if strike.endswith("restarted"):
            self._restart(writer)
        elif strike.endswith("still"):
            self.other.stand_still()
        writer.until(len(writer.durable_s) + self._chance.randrange(2, 40))
        self._lose(strike)
        writer.join(60)
        counts = not self._is_equal()
        self._promote(writer)
        self._come_back()
        self.count[strike if counts else "in sync, not counted"] += 1
        return counts

    def _restart(self, writer: Writer) -> None:
        """The receiver dies in mid-stream, and comes back."""
        self.other.volume.kill()
        self.other.power_cut()
        writer.until(len(writer.durable_s) + self._chance.randrange(1, 20))
        self.other.volume.start()
        writer.until(len(writer.durable_s) + self._chance.randrange(1, 20))

    def _lose(self, strike: str) -> None:
        """The serving site is lost, with all hosts; the receiver, too, in some order."""
        both = strike.endswith("both")
        first = both and self._chance.random() < 0.5
        if first:
            self.other.volume.kill()
        self.serving.volume.kill()
        if strike.endswith("still"):
            self.other.go_on()
        if both and not first:
            self.other.volume.kill()
        mount, self._mount = self._mount, None
        if mount is not None:
            self._host.lose()
            mount.leave()
        if strike.startswith("power"):
            self.serving.power_cut()
            if both:
                self.other.power_cut()

    def _is_equal(self) -> bool:
        """Else it was not in sync."""
        done = subprocess.run(
            ["cmp", "-s", str(self.serving.image.content), str(self.other.image.content)],
            check=False,
        )
        return not done.returncode

    def _promote(self, writer: Writer) -> None:
        answer = promoted(self.other.volume)
        assert answer["consistent"]
        self.serving, self.other = self.other, self.serving
        volume, kind = self.serving.volume, self._host.file_system
        mount = Mount(volume, self._folder / "mnt", kind)  # it replays its journal
        mount.leave()
        file = shown(volume)
        try:
            check(kind, file.path)
        finally:
            file.end()
        mount = Mount(volume, self._folder / "mnt", kind)
        try:
            found = self._host.found(mount.folder)
        finally:
            mount.leave()
        cut_s = datetime.fromisoformat(answer["at"]).timestamp()
        least = max(self._lines, writer.newest_before(cut_s))
        assert least <= found <= writer.next, f"{found} lines, and {least} were durable at the cut"
        self.count["lines lost"] += writer.next - 1 - min(found, writer.next - 1)
        self.count["lines"] += len(writer.durable_s)
        self._lines = found

    def _come_back(self) -> None:
        """The old site becomes the receiver."""
        journal = ["--journal", str(self.other.journal.device)] if self.other.fresh else []
        self.other.fresh = False
        number = self.serving.points
        self.serving.volume.dmctl("set", "vol0", "point-interval=200ms")
        self.other.volume.dmctl("failback", "vol0", *journal, "--yes")
        self.serving.point(number)


def promoted(volume: Volume) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(volume.dmctl("--json", "promote", "vol0", "--force"))
    return answer


@contextmanager
def rounds(folder: Path, kind: str, seed: int) -> Iterator[Rounds]:
    made = Rounds(folder, kind, seed)
    try:
        made.begin()
        yield made
    finally:
        made.close()


def run_rounds(folder: Path, kind: str, count: int, seed: int) -> Counter[str]:
    """So many, all of them not in sync; AssertionError if one is wrong."""
    with rounds(folder, kind, seed) as made:
        counted = 0
        for _ in range(2 * count):
            counted += made.round()
            if counted == count:
                break
        made.end()
        assert counted == count, f"the volume was in sync too often: {made.count}"
        return made.count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    kinds = KINDS if arguments.kind is None else (arguments.kind,)
    for place, kind in enumerate(kinds):
        count = arguments.rounds // len(kinds) + (place < arguments.rounds % len(kinds))
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fo") as folder:
            Path(folder).chmod(0o755)
            done = run_rounds(Path(folder), kind, count, arguments.seed)
        print(f"{kind}: {count} rounds in {time.monotonic() - began_s:.0f} s: {dict(done)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
