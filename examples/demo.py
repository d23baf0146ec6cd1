#!/usr/bin/env python3
"""A mirrored volume, end to end, with a real file system and a real crash.  Run: make demo

The host's side is foreign code throughout: nbdfuse shows the volume's NBD export as a file, the
kernel mounts an ext4 on it.  Where that cannot be (no root, no /dev/fuse, no loop device), file
system images made by mke2fs are written through nbdcopy instead, and the demo says so.

Everything lives in ./demo-run, which is removed at the end (KEEP=1 keeps it).  What a killed run
left behind is cleaned up by the next one.  DEMO_DIR names another folder, DEMO_MOUNT=no forbids
mounting.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from demo_common import (
    DMCTL,
    MIB,
    DemoFailed,
    can_mount,
    clean_mounts,
    kill,
    mib,
    run,
    say,
    step,
    wait_until,
)

SIZE_BYTES = 4096 * MIB
RECORD_BYTES = 4 * MIB
SAMPLE_BYTES = 120 * MIB
IMAGE_BYTES = 512 * MIB
ROOT = Path(__file__).resolve().parent.parent
RUN = Path(os.environ.get("DEMO_DIR", ROOT / "demo-run"))
SOURCES = (Path("/usr/include"), Path("/usr/share/doc"), Path("/usr/share/perl"))
NAME = "demo"


def show(*command: str | Path) -> str:
    """Run one of the product's commands and let the reader see it."""
    say("   $ dmctl " + " ".join(str(word).replace(f"{RUN}/", "") for word in command))
    return dmctl(*command)


def dmctl(*command: str | Path) -> str:
    return run(DMCTL, "--config-dir", RUN / "etc", "--run-dir", RUN / "run", *command)


def status() -> dict[str, Any]:
    (volume,) = json.loads(dmctl("--json", "status", NAME))["volumes"]
    return dict(volume)


def kill_daemon() -> None:
    kill(RUN / "run" / f"{NAME}.pid", NAME)


# -- the host's side -----------------------------------------------------------------------------


def sample_files() -> list[Path]:
    """About SAMPLE_BYTES of this machine's own files: many small ones, all kinds of names."""
    found: list[Path] = []
    total = 0
    for source in SOURCES:
        for folder, folders, names in os.walk(source):
            folders.sort()
            for name in sorted(names):
                path = Path(folder) / name
                if path.is_symlink() or not path.is_file():
                    continue
                total += path.stat().st_size
                if total > SAMPLE_BYTES:
                    return found
                found.append(path)
    if total < MIB:
        raise DemoFailed(f"found no files to copy in {', '.join(map(str, SOURCES))}")
    return found


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def copy_into(folder: Path, files: list[Path]) -> None:
    for path in files:
        target = folder / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def edit_in(folder: Path, files: list[Path]) -> None:
    """Work as people do: rewrite some files where they are, append to some, remove some."""
    for number, path in enumerate(files):
        target = folder / path.relative_to("/")
        if number % 5 == 0:
            target.write_bytes(path.read_bytes()[::-1])
        elif number % 5 == 1:
            with target.open("ab") as file:
                file.write(b"appended by the demo\n" * 40)
        elif number % 31 == 2:
            target.unlink()


class Host(Protocol):
    """What writes to the volume, and what it does in each part of the demo."""

    def attach(self) -> None: ...

    def fill(self) -> None: ...

    def edit(self) -> None: ...

    def write_until_killed(self, kill: Callable[[], None]) -> str:
        """Start to write, call `kill` in the middle; answers with what the host was doing."""

    def restart(self) -> str:
        """The daemon runs again: go on, check, and say what was found."""

    def detach(self) -> None: ...


@dataclass
class MountedHost:
    """ext4, mounted from a loop device over nbdfuse's file."""

    uri: str
    files: list[Path]
    folder: Path = RUN / "mnt"
    shown: Path = RUN / "volume"
    digests: dict[Path, str] = field(default_factory=dict)
    fuse: subprocess.Popen[bytes] | None = None

    def attach(self) -> None:
        self.shown.touch()
        self.folder.mkdir(exist_ok=True)
        self._show()
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", self.shown)
        run("mount", "-o", "loop", self.shown, self.folder)
        say("   mkfs.ext4, mount: an ordinary file system, through nbdfuse and a loop device")

    def fill(self) -> None:
        copy_into(self.folder, self.files)
        run("sync", "-f", self.folder)

    def edit(self) -> None:
        edit_in(self.folder, self.files)
        run("sync", "-f", self.folder)
        for path in self.files:
            target = self.folder / path.relative_to("/")
            if target.exists():
                self.digests[target] = digest(target)

    def write_until_killed(self, kill: Callable[[], None]) -> str:
        """A third pass into a folder of its own; the daemon dies while it runs."""
        command = ["cp", "-r", *map(str, SOURCES[:2]), str(self.folder / "late")]
        (self.folder / "late").mkdir()
        copying = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        syncing = subprocess.Popen(
            ["sh", "-c", "while sync -f .; do :; done"],
            cwd=self.folder,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for_writes(8 * MIB)
            kill()
        finally:
            for process in (syncing, copying):
                process.kill()
                process.wait()
        return "cp was busy copying; to the host this is a disk that vanished"

    def restart(self) -> str:
        """Mount again: ext4 replays its journal, as after a power cut."""
        self._hide()
        self._show()
        run("mount", "-o", "loop", self.shown, self.folder)
        for target, wanted in self.digests.items():
            if digest(target) != wanted:
                raise DemoFailed(f"{target} was synced before the crash and is different now")
        return f"mounted again; {len(self.digests):,} files synced before the crash are all intact"

    def detach(self) -> None:
        self._hide()

    def _show(self) -> None:
        # When its server is killed nbdfuse has a lot to say; it is kept beside the files.
        with (RUN / "nbdfuse.log").open("ab") as log:
            self.fuse = subprocess.Popen(["nbdfuse", self.shown, self.uri], stderr=log)
        wait_until(lambda: self.shown.stat().st_size == SIZE_BYTES, "nbdfuse to show the volume")

    def _hide(self) -> None:
        clean_mounts(RUN)
        if self.fuse is not None:
            self.fuse.wait(20)
            self.fuse = None


@dataclass
class CopyingHost:
    """File system images written through nbdcopy: needs no privilege.

    The images are smaller than the volume, since nbdcopy writes the empty parts as well.
    """

    uri: str
    files: list[Path]
    image: Path = RUN / "image"
    tree: Path = RUN / "tree"

    def attach(self) -> None:
        copy_into(self.tree, self.files)

    def fill(self) -> None:
        self._write()

    def edit(self) -> None:
        edit_in(self.tree, self.files)
        self._write()

    def write_until_killed(self, kill: Callable[[], None]) -> str:
        copy_into(self.tree / "late", self.files)
        self._make()
        writing = subprocess.Popen(["nbdcopy", self.image, self.uri], stderr=subprocess.DEVNULL)
        try:
            wait_for_writes(8 * MIB)
            kill()
        finally:
            writing.kill()
            writing.wait()
        return "nbdcopy was busy writing a third image"

    def restart(self) -> str:
        run("nbdcopy", "--flush", self.image, self.uri)
        return "the interrupted image was written again, whole"

    def detach(self) -> None:
        self.image.unlink()

    def _make(self) -> None:
        self.image.unlink(missing_ok=True)
        run("truncate", "-s", str(IMAGE_BYTES), self.image)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", self.tree, self.image)

    def _write(self) -> None:
        self._make()
        run("nbdcopy", "--flush", self.image, self.uri)


def wait_for_writes(amount_bytes: int) -> None:
    """Until the host has written that much more, so that the kill comes in mid-write."""
    begin = status()["writes_total"]
    requests = amount_bytes // (64 << 10)
    wait_until(
        lambda: status()["writes_total"] > begin + requests,
        "the third pass to get going",
        timeout_s=180,  # without mounting a file system is made first, of thousands of files
    )


# -- cleaning up ---------------------------------------------------------------------------------


def release() -> None:
    """Unmount and end the daemon, whatever state a run was left in."""
    clean_mounts(RUN)
    kill_daemon()


@contextmanager
def workplace() -> Iterator[None]:
    if RUN.exists():
        release()
        shutil.rmtree(RUN)
    RUN.mkdir()
    try:
        yield
    finally:
        release()
        if os.environ.get("KEEP") == "1":
            say(f"\nkept: {RUN} (the next run removes it)")
        else:
            shutil.rmtree(RUN)


# -- the demo ------------------------------------------------------------------------------------


@dataclass
class Totals:
    """Counters over both lives of the daemon."""

    written_bytes: int = 0
    writes: int = 0
    hits: int = 0
    misses: int = 0
    updates: int = 0
    clears: int = 0

    def add(self, volume: dict[str, Any]) -> None:
        self.written_bytes += volume.get("written_bytes_total") or 0
        self.writes += volume["writes_total"]
        self.hits += volume["hits_total"]
        self.misses += volume["misses_total"]
        self.updates += volume["record_updates_total"]
        self.clears += volume["record_clears_total"]


def line(volume: dict[str, Any]) -> str:
    figures = [
        f"writes {volume['writes_total']:>7,}",
        f"hits {volume['hits_total']:>7,}",
        f"misses {volume['misses_total']:>4,}",
        f"record {mib(volume['record_bytes']):>10}",
        f"dirty {mib(volume['dirty_bytes']):>10}",
        f"lag {volume['lag_seconds'] or 0:.1f} s",
    ]
    return f"   {volume['state']:<10} {'   '.join(figures)}"


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def compare() -> None:
    primary, secondary = RUN / "primary.img", RUN / "secondary.img"
    run("cmp", primary, secondary)
    say("   cmp: secondary and primary are the same, byte by byte")
    for path in (primary, secondary):
        run("e2fsck", "-fn", path)
    say("   e2fsck -fn: both file systems are clean")


def demo() -> Totals:
    began = time.monotonic()
    totals = Totals()
    step(1, "Three files: primary, secondary, and a small one for the record")
    for name, size in (
        ("primary", SIZE_BYTES),
        ("secondary", SIZE_BYTES),
        ("record", RECORD_BYTES),
    ):
        run("truncate", "-s", str(size), RUN / f"{name}.img")
        say(f"   {name:<10} {mib(size):>12}")

    step(2, "Create the volume, start it")
    media: list[str | Path] = []
    for name in ("primary", "secondary", "record"):
        media += [f"--{name}", RUN / f"{name}.img"]
    show("create", NAME, *media, "--attach", "nbd")
    show("start", NAME)
    show("wait", NAME, "--for", "in-sync", "--timeout", "2min")
    say(line(status()))

    step(3, "A real file system on it, with this machine's own files")
    uri = str(status()["device"])
    host: Host
    if can_mount():
        host = MountedHost(uri, sample_files())
    else:
        say("   NOTE: mounting needs root, /dev/fuse and loop devices. Here file system images")
        say("   made by mke2fs are written through nbdcopy instead; nothing is mounted.")
        host = CopyingHost(uri, sample_files())
    host.attach()
    host.fill()
    say(f"   pass 1: {len(host.files):,} files copied in")
    say(line(status()))
    host.edit()
    say("   pass 2: a fifth of them rewritten, a fifth appended to, some removed")
    say(line(status()))

    step(4, "Pass 3, and in the middle of it: kill -9 bitmapd")
    before: dict[str, Any] = {}

    def kill() -> None:
        before.update(status())
        kill_daemon()

    what = host.write_until_killed(kill)
    say(line(before))
    say(f"   killed; {what}")
    totals.add(before)
    left = status()
    named = left["record_bytes"] or 0
    say(f"   {left['state']:<10} the stored record names {mib(named)} of {mib(SIZE_BYTES)}")

    step(5, "Start again: only what the record names is copied")
    show("start", NAME)
    show("wait", NAME, "--for", "in-sync", "--timeout", "2min")
    recovery = status()["last_recovery"]
    if recovery is None or recovery["reason"] != "crash":
        raise DemoFailed(f"a recovery from a crash was expected, status says {recovery}")
    if recovery["bytes_total"] > SIZE_BYTES // 2:
        raise DemoFailed(f"recovery had to look at {mib(recovery['bytes_total'])}")
    say(
        f"   recovery after a {recovery['reason']}: {recovery['extents']} extents,"
        f" {mib(recovery['bytes_copied'])} in {recovery['seconds']:.1f} s"
    )
    say(f"   {host.restart()}")
    host.detach()

    step(6, "Stop cleanly and compare")
    show("wait", NAME, "--for", "in-sync", "--timeout", "2min")
    totals.add(status())
    show("stop", NAME)
    compare()

    table(totals, recovery, time.monotonic() - began)
    return totals


def table(totals: Totals, recovery: dict[str, Any], seconds: float) -> None:
    rows = [
        ("device size", mib(SIZE_BYTES)),
        ("on the primary in the end", mib(allocated(RUN / "primary.img"))),
        ("host writes", f"{totals.writes:,}"),
        ("  hits (no record I/O)", f"{totals.hits:,}"),
        ("  misses", f"{totals.misses:,}"),
        ("record updates hosts waited for", f"{totals.updates:,}"),
        ("  per 1,000 writes", f"{1000 * totals.updates / max(1, totals.writes):.1f}"),
        ("lazy clears of the record", f"{totals.clears:,}"),
        ("recopied after the crash", mib(recovery["bytes_copied"])),
        ("  of the device", f"{100 * recovery['bytes_copied'] / SIZE_BYTES:.2f} %"),
        ("recovery took", f"{recovery['seconds']:.1f} s"),
        ("the whole demo took", f"{seconds:.0f} s"),
    ]
    if totals.written_bytes:
        rows.insert(2, ("written by the host", mib(totals.written_bytes)))
    say()
    for name, value in rows:
        say(f"   {name:<34}{value:>16}")


def main() -> int:
    if not DMCTL.exists():
        say(f"demo: {DMCTL.name} is not installed beside this Python; run it as: make demo")
        return 1
    try:
        with workplace():
            demo()
    except DemoFailed as error:
        say(f"\ndemo: FAILED: {error}")
        return 1
    say("\nNothing was lost, and nothing but the record was copied.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
