#!/usr/bin/env python3
"""Two sites: the first is lost in mid-write, the second takes over.  Run: make demo-failover

A volume with an ext4 on it is sent to a receiver, one consistent point after another.  It is killed
with kill -9 in mid-write, the receiver is promoted, and e2fsck looks at what is there.  Then the
first site comes back: it is refused as the old one, becomes the receiver of the second, and only
what differs is copied.  In the end both sides are compared.

The host's side is foreign code: nbdfuse, a loop device and the kernel's ext4.  Where that cannot be
(no root, no /dev/fuse, no loop device), one made by mke2fs is put into the volume by nbdcopy, a
writer of numbered blocks works behind it, and the demo says so.

Everything lives in ./demo-failover-run, which is removed at the end (KEEP=1 keeps it).  DEMO_DIR
names another folder, DEMO_MOUNT=no forbids mounting.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
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

SIZE_BYTES = 1024 * MIB
FS_BYTES = 64 * MIB  # of the one that is copied
ROOT = Path(__file__).resolve().parent.parent
RUN = Path(os.environ.get("DEMO_DIR", ROOT)) / "demo-failover-run"
NAME = "demo"
SOURCES = ("/usr/include", "/usr/share/doc")

# Writes numbered blocks behind the file system, one after another, until it is killed; slower than
# the receiver's disk, which a machine that does both sides' work shares.
WRITER = """
import sys, time
import nbd
disk = nbd.NBD()
disk.connect_uri(sys.argv[1])
start, count, number = int(sys.argv[2]), int(sys.argv[3]), 0
while True:
    number += 1
    disk.pwrite(number.to_bytes(8, "big") * 8192, start + number % count * 65536)
    time.sleep(0.005)
"""


class Site:
    """One of the two, with a configuration and a run directory of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = RUN / name
        self.disk = self.folder / "disk.img"
        self.journal = self.folder / "journal.img"
        self.record = self.folder / "record.img"
        self.socket = self.folder / "run" / f"{NAME}.nbd"

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{NAME}?socket={self.socket}"

    def make(self) -> None:
        self.folder.mkdir()
        for path, size in (
            (self.disk, SIZE_BYTES),
            (self.journal, 256 * MIB),
            (self.record, 4 * MIB),
        ):
            run("truncate", "-s", str(size), path)

    def dmctl(self, *words: str | Path, check: bool = True) -> str:
        folders = ("--config-dir", self.folder / "etc", "--run-dir", self.folder / "run")
        return run(DMCTL, *folders, *words, check=check)

    def show(self, *words: str | Path) -> str:
        """Run a command and let the reader see it."""
        text = " ".join(str(word).replace(f"{RUN}/", "") for word in words)
        say(f"   {self.name:>4} $ dmctl {text}")
        return self.dmctl(*words)

    def refused(self, *words: str) -> str:
        folders = ("--config-dir", str(self.folder / "etc"), "--run-dir", str(self.folder / "run"))
        say(f"   {self.name:>4} $ dmctl {' '.join(words)}")
        done = subprocess.run(
            [str(DMCTL), *folders, *words], capture_output=True, text=True, check=False
        )
        if not done.returncode:
            raise DemoFailed(f"dmctl {' '.join(words)} was not refused")
        return done.stderr.strip()

    def status(self) -> dict[str, Any]:
        (volume,) = json.loads(self.dmctl("--json", "status", NAME))["volumes"]
        return dict(volume)

    def kill(self) -> None:
        kill(self.folder / "run" / f"{NAME}.pid", NAME)


class Host(Protocol):
    """What uses the volume."""

    def begin(self, site: Site) -> None:
        """Make a file system, and write until `lose` is called."""

    def lose(self) -> None:
        """The disk is gone."""

    def go_on(self, site: Site) -> str:
        """Use what is there, write a little, and let go; says what was found."""


class MountedHost:
    """ext4, mounted from a loop device over nbdfuse's file; cp and sync are the load."""

    def __init__(self) -> None:
        self.shown, self.folder = RUN / "volume", RUN / "mnt"
        self.fuse: subprocess.Popen[bytes] | None = None
        self.load: list[subprocess.Popen[bytes]] = []

    def begin(self, site: Site) -> None:
        self.shown.touch()
        self.folder.mkdir()
        self._show(site)
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", self.shown)
        run("mount", "-o", "loop", self.shown, self.folder)
        script = (
            'n=0; while mkdir "$0/$n" && cp -r "$@" "$0/$n"; do rm -r "$0/$n"; n=$((n+1)); done'
        )
        for words in (
            ["sh", "-c", script, str(self.folder), *SOURCES],
            ["sh", "-c", 'while sync -f "$0"; do :; done', str(self.folder)],
        ):
            self.load.append(
                subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
            )

    def lose(self) -> None:
        while self.load:
            process = self.load.pop()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._hide()

    def go_on(self, site: Site) -> str:
        self._show(site)
        run("mount", "-o", "loop", self.shown, self.folder)  # ext4 replays its journal
        run("umount", self.folder)
        run("e2fsck", "-f", "-n", self.shown)
        run("mount", "-o", "loop", self.shown, self.folder)
        files = sum(len(names) for _, _, names in os.walk(self.folder))
        (self.folder / "after").write_text("written at the second site\n" * 100_000)
        run("sync", "-f", self.folder)
        self._hide()
        return f"e2fsck finds nothing wrong; mounted, {files:,} files are there"

    def _show(self, site: Site) -> None:
        # When its server is killed nbdfuse has a lot to say; it is kept beside the files.
        with (RUN / "nbdfuse.log").open("ab") as log:
            self.fuse = subprocess.Popen(["nbdfuse", self.shown, site.uri], stderr=log)
        wait_until(lambda: self.shown.stat().st_size == SIZE_BYTES, "nbdfuse to show the volume")

    def _hide(self) -> None:
        clean_mounts(RUN)
        if self.fuse is not None:
            self.fuse.wait(20)
            self.fuse = None


class CopyingHost:
    """A file system of mke2fs, written once; numbered blocks behind it are the load.  Needs no
    privilege."""

    def __init__(self) -> None:
        self.image = RUN / "fs.img"
        self.writer: subprocess.Popen[bytes] | None = None

    def begin(self, site: Site) -> None:
        run("truncate", "-s", str(FS_BYTES), self.image)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", "/usr/include/linux", self.image)
        run("nbdcopy", "--flush", self.image, site.uri)
        self._write(site)

    def lose(self) -> None:
        if self.writer is not None:
            self.writer.kill()
            self.writer.wait()

    def go_on(self, site: Site) -> str:
        found = RUN / "found.img"
        run("nbdcopy", site.uri, found)
        with found.open("r+b") as file:
            file.truncate(FS_BYTES)
        run("e2fsck", "-f", "-n", found)
        found.unlink()
        self._write(site)
        start = site.status()["writes_total"]
        wait_until(lambda: site.status()["writes_total"] > start + 100, "a hundred writes")
        self.lose()
        return "e2fsck finds nothing wrong"

    def _write(self, site: Site) -> None:
        words = ["/usr/bin/python3", "-c", WRITER, site.uri, str(FS_BYTES), "500"]
        self.writer = subprocess.Popen(words, stderr=subprocess.DEVNULL)


def demo(host: Host) -> None:
    near, far = Site("near"), Site("far")
    link = f"receiver+unix:///{NAME}?socket={RUN}/link"
    step(1, "A receiver at the far site, a volume at the near one")
    for site in (near, far):
        site.make()
    far.show("receive", NAME, "--image", far.disk, "--journal", far.journal, "--listen", link)
    far.show("start", NAME)
    near.show(
        "create", NAME, "--primary", near.disk, "--record", near.record, "--secondary", link,
        "--point-interval", "500ms",
    )  # fmt: skip
    near.show("start", NAME)
    near.show("wait", NAME, "--for", "point")
    say("   the first point: everything was copied")

    step(2, "A file system, written without a pause")
    host.begin(near)
    first = near.status()["points"]["number"]
    wait_until(lambda: near.status()["points"]["number"] >= first + 4, "four more points")
    volume = near.status()
    say(
        f"   point {volume['points']['number']}, {mib(volume['dirty_bytes'])} are not sent yet,"
        f" hosts waited {volume['points']['cbw_wait_seconds_total']:.3f} s for all points together"
    )

    step(3, "kill -9 at the near site, in mid-write; the far one takes over")
    near.kill()
    host.lose()
    record = far.folder / "record.img"
    began = time.monotonic()
    far.show("promote", NAME, "--record", record)
    say(f"   served again after {time.monotonic() - began:.1f} s")
    say(f"   {host.go_on(far)}")

    step(4, "The near site comes back")
    for line in near.refused("start", NAME).splitlines():
        say(f"        {line}")
    near.show("failback", NAME, "--journal", near.journal, "--yes")
    far.show("wait", NAME, "--for", "in-sync", "--timeout", "2min")
    sent = far.status()["points"]["sent_bytes_total"]
    say(f"   {mib(sent)} of {mib(SIZE_BYTES)} were sent: what either record named")

    step(5, "Both sides are compared")
    for site in (far, near):
        site.show("stop", NAME)
    run("cmp", near.disk, far.disk)
    say("   cmp: they are the same, byte by byte")


def release() -> None:
    clean_mounts(RUN)
    for name in ("near", "far"):
        Site(name).kill()


def main() -> int:
    began = time.monotonic()
    if RUN.exists():
        release()
        shutil.rmtree(RUN)
    RUN.mkdir(parents=True)
    host: Host = MountedHost() if can_mount() else CopyingHost()
    if isinstance(host, CopyingHost):
        say("no loop device and FUSE here: a file system image is copied into the volume instead")
    try:
        demo(host)
    except DemoFailed as failure:
        say(f"\nThe demo failed: {failure}")
        return 1
    finally:
        host.lose()
        release()
        if os.environ.get("KEEP") == "1":
            say(f"\nkept: {RUN} (the next run removes it)")
        else:
            shutil.rmtree(RUN)
    took_s = time.monotonic() - began
    say(f"\nThe last point was whole, and only what differed came back ({took_s:.0f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
