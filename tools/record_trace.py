#!/usr/bin/env python3
"""Records what real programs write to a disk, as traces that `dmctl simulate` reads.

    sudo .venv/bin/python tools/record_trace.py [--list] [--out FOLDER] [WORKLOAD...]

A sparse file is attached to a loop device, a file system is made on it and mounted, and a program
is let loose.  The kernel's tracepoint `block_rq_issue` tells of every request that reaches the
device; an instance of the tracing file system of its own keeps this from disturbing anybody else.
One gzip file for each workload comes out of it, in the CSV format of `dmctl.simulate.formats`.

A virtual machine has no use for a mounted folder: its disk is filled and unmounted first, and it
is given the device.  What filled the disk is not in the trace.

Nothing of what the programs do is made up: where a program is missing, its workload says so and
is left out.  Times, and so the traces, differ a little from one recording to the next.

It needs root, loop devices and tracefs, and about 8 GiB of room in the temporary folder; the
virtual machine needs debootstrap, qemu-system-x86 and a Debian mirror too.  What it mounts and
attaches it takes away again, on errors too.
"""

from __future__ import annotations

import argparse
import contextlib
import email.generator
import email.message
import gzip
import itertools
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
SECTOR_BYTES = 512
TRACING = Path("/sys/kernel/tracing")
BUFFER_KIB = 32768
OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "traces"
POSTGRES = Path("/usr/lib/postgresql")
ARCHIVES = Path("/var/cache/apt/archives")
SYSTEM = Path("/usr/lib/python3")
SOURCES = "pycryptodome==3.20.0"
MIRROR = "http://deb.debian.org/debian"
RELEASE = "bookworm"
QEMU = "qemu-system-x86_64"
BOOT_LIMIT_S = 900
ISSUE = re.compile(r" (\d+\.\d+): block_rq_issue: \d+,\d+ (\w+) \d+ \(.*?\) (\d+) \+ (\d+) ")


class Missing(Exception):
    """Something that a workload needs is not on this machine."""


def need(program: str) -> None:
    if shutil.which(program) is None:
        raise Missing(f"{program} is not installed")


def run(
    *command: str | Path,
    folder: Path | None = None,
    user: str | None = None,
    limit_s: float | None = None,
) -> str:
    words = [str(word) for word in command]
    if user is not None:
        words = ["runuser", "-u", user, "--", *words]
    need(words[0])
    done = subprocess.run(
        words,
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=limit_s,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {(done.stdout + done.stderr).strip()}")
    return done.stdout


# -- the disk and its trace ------------------------------------------------------------------------


@contextlib.contextmanager
def loop_disk(image: Path, size_bytes: int) -> Iterator[Path]:
    with image.open("wb") as file:
        file.truncate(size_bytes)
    device = Path(run("losetup", "--find", "--show", image).strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
        image.unlink()


@contextlib.contextmanager
def mounted(device: Path, folder: Path, options: str = "rw") -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    run("mount", "-o", options, device, folder)
    try:
        yield
    finally:
        # What debootstrap mounts in there stays when it fails.
        run("umount", "--recursive", folder)


@contextlib.contextmanager
def tracing() -> Iterator[Path]:
    """An instance of the tracing file system that nobody else uses."""
    mounted_here = not (TRACING / "instances").exists()
    if mounted_here:
        run("mount", "-t", "tracefs", "nodev", TRACING)
    instance = TRACING / "instances" / f"record-{os.getpid()}"
    instance.mkdir()
    try:
        (instance / "buffer_size_kb").write_text(str(BUFFER_KIB))
        (instance / "trace_clock").write_text("mono")
        yield instance
    finally:
        instance.rmdir()
        if mounted_here:
            run("umount", TRACING)


@contextlib.contextmanager
def recorded(instance: Path, device: Path, out: Path) -> Iterator[None]:
    """Write every request that reaches the device meanwhile to `out`."""
    number = os.stat(device).st_rdev
    kernel_number = os.major(number) << 20 | os.minor(number)
    event = instance / "events" / "block" / "block_rq_issue"
    (event / "filter").write_text(f"dev == {kernel_number}")
    lines: list[str] = []
    (event / "enable").write_text("1")
    # The kernel ends nobody's wait for its pipe, so `cat` does the waiting.
    cat = subprocess.Popen(["cat", instance / "trace_pipe"], stdout=subprocess.PIPE, text=True)
    if cat.stdout is None:
        raise RuntimeError("cat has no output")
    reader = threading.Thread(target=lines.extend, args=(cat.stdout,))
    reader.start()
    try:
        yield
    finally:
        (event / "enable").write_text("0")
        time.sleep(2)  # what is in the kernel's buffers has no end that one could wait for
        cat.send_signal(signal.SIGTERM)
        reader.join()
        cat.wait()
        cat.stdout.close()
    lost = [line for line in lines if "LOST" in line]
    if lost:
        raise RuntimeError(f"the kernel lost events: {lost[0].strip()}")
    found = list(requests(lines))
    with gzip.GzipFile(out, "wb", 9, mtime=0) as file:
        file.write(b"time_s,op,offset_bytes,length_bytes\n")
        for time_s, kind, offset_bytes, length_bytes in found:
            file.write(f"{time_s:.4f},{kind},{offset_bytes},{length_bytes}\n".encode())
    print(f"   {out.name}: {len(found)} changes, {out.stat().st_size >> 10} KiB", flush=True)


def requests(lines: list[str]) -> Iterator[tuple[float, str, int, int]]:
    """Changes among the kernel's lines, the first at time 0; the kernel calls a flush F."""
    start_s: float | None = None
    for line in lines:
        found = ISSUE.search(line)
        if found is None:
            continue
        at_s, flags, sector, sectors = float(found[1]), found[2], int(found[3]), int(found[4])
        kind = "T" if "D" in flags else "W" if "W" in flags.lstrip("F") else ""
        if not kind or not sectors:
            continue
        start_s = at_s if start_s is None else start_s
        yield at_s - start_s, kind, sector * SECTOR_BYTES, sectors * SECTOR_BYTES


# -- workloads -------------------------------------------------------------------------------------


def packages(folder: Path) -> None:
    """Unpack Debian packages as dpkg does: files, then a sync, then the next."""
    archives = sorted(ARCHIVES.glob("*.deb"))[:360]
    if len(archives) < 50:
        raise Missing(f"there are no packages in {ARCHIVES}")
    status = folder / "status"
    for number, archive in enumerate(archives):
        control = folder / "info"
        control.mkdir(exist_ok=True)
        run("dpkg-deb", "-x", archive, folder / "root")
        run("dpkg-deb", "-e", archive, control / archive.stem)
        with status.open("ab") as file:
            file.write(f"{archive.name}: unpacked\n".encode() * 20)
            os.fsync(file.fileno())
        if number % 4 == 3:
            run("sync", "-f", folder)
        if number % 60 == 59:
            shutil.rmtree(folder / "root" / "usr" / "share" / "doc", ignore_errors=True)
        time.sleep(1)  # what configuring it would take


def build(folder: Path) -> None:
    """Unpack sources, build them, change some, build again; and compile a large Python tree."""
    with tempfile.TemporaryDirectory() as cache:
        run(
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:",
            "-d", cache, SOURCES,
        )  # fmt: skip
        (archive,) = Path(cache).iterdir()
        for copy in range(6):
            tree = folder / f"tree{copy}"
            tree.mkdir()
            run("tar", "-xf", archive, "-C", tree, "--strip-components=1")
    shutil.copytree(SYSTEM, folder / "python", symlinks=True, ignore_dangling_symlinks=True)
    for copy in range(3):
        tree = folder / f"tree{copy}"
        (tree / "out").mkdir()
        sources = sorted((tree / "src").glob("*.c"))
        for _ in range(2):
            for source in sources:
                built = tree / "out" / f"{source.stem}.o"
                with contextlib.suppress(RuntimeError):  # some want other processors
                    run("gcc", "-O1", "-c", "-I", tree / "src", source, "-o", built)
                source.write_bytes(source.read_bytes() + b"\n")
        run("ar", "rcs", tree / "out" / "all.a", *sorted((tree / "out").glob("*.o")))
    with contextlib.suppress(RuntimeError):  # files that are not for this Python
        run(sys.executable, "-m", "compileall", "-q", folder / "python")


def sqlite(folder: Path) -> None:
    """A database with an index, small transactions, first with a rollback journal, then a WAL."""
    dice = random.Random(1)  # noqa: S311
    with contextlib.closing(sqlite3.connect(folder / "db", isolation_level=None)) as db:
        db.execute("create table item (id integer primary key, name text, body blob)")
        db.execute("create index by_name on item (name)")
        for mode in ("delete", "wal"):
            db.execute(f"pragma journal_mode = {mode}")
            db.execute("pragma synchronous = full")
            until_s = time.monotonic() + 240
            for number in itertools.count():
                if time.monotonic() > until_s:
                    break
                many = 1000 if number % 100 == 0 else 5
                db.execute("begin")
                for _ in range(many):
                    key = dice.randrange(1 << 20)
                    body = dice.randbytes(dice.randrange(100, 1500))
                    db.execute("replace into item values (?, ?, ?)", (key, body[:12].hex(), body))
                db.execute("commit")
                time.sleep(0.1)


def postgres(folder: Path) -> None:
    """pgbench's transactions at an even rate, with frequent checkpoints."""
    programs = next(iter(sorted(POSTGRES.glob("*/bin"), reverse=True)), None)
    if programs is None:
        raise Missing("PostgreSQL is not installed")
    data = folder / "data"
    data.mkdir()
    shutil.chown(data, "postgres", "postgres")
    run(programs / "initdb", "-D", data, folder=data, user="postgres")
    settings = (
        "listen_addresses=''",
        f"unix_socket_directories='{data}'",
        "shared_buffers=64MB",
        "checkpoint_timeout=30s",
        "max_wal_size=256MB",
    )
    options = " ".join(f"-c {setting}" for setting in settings)
    control = (programs / "pg_ctl", "-D", data, "-w", "-s")
    run(*control, "-l", data / "log", "-o", options, "start", folder=data, user="postgres")
    try:
        bench = (programs / "pgbench", "-h", data, "postgres")
        run(*bench, "-i", "-q", "-s", "60", folder=data, user="postgres")
        run(*bench, "-c", "2", "-R", "50", "-T", "480", "-n", folder=data, user="postgres")
    finally:
        run(*control, "stop", "-m", "fast", folder=data, user="postgres")


def mail(folder: Path) -> None:
    """Deliveries into many mailboxes, each with its fsync and rename; reading, moving, deleting."""
    dice = random.Random(2)  # noqa: S311
    boxes = [folder / f"{number % 16}" / f"user{number}" for number in range(160)]
    for box in boxes:
        for part in ("tmp", "new", "cur"):
            (box / part).mkdir(parents=True)
    until_s = time.monotonic() + 480
    for number in itertools.count():
        if time.monotonic() > until_s:
            break
        box = boxes[min(int(dice.expovariate(1 / 30)), len(boxes) - 1)]
        letter = email.message.EmailMessage()
        letter["Subject"] = f"letter {number}"
        letter.set_content(dice.randbytes(int(dice.paretovariate(1.1) * 800) & 0xFFFFF).hex())
        with (box / "tmp" / f"{number}").open("w") as file:
            email.generator.Generator(file).flatten(letter)
            file.flush()
            os.fsync(file.fileno())
        (box / "tmp" / f"{number}").rename(box / "new" / f"{number}")
        with (box / "index").open("ab") as file:
            file.write(dice.randbytes(60))
        if number % 7 == 0:
            for seen in list((box / "new").iterdir())[:20]:
                seen.rename(box / "cur" / f"{seen.name}:2,S")
        if number % 11 == 0:
            for old in sorted((box / "cur").iterdir())[:10]:
                old.unlink()
        time.sleep(0.03)


def files(folder: Path) -> None:
    """A file server: people make, extend, replace, copy and remove files of all sizes."""
    dice = random.Random(3)  # noqa: S311
    places = [folder / f"d{number // 20}" / f"s{number}" for number in range(200)]
    for place in places:
        place.mkdir(parents=True)
    have: list[Path] = []
    until_s = time.monotonic() + 480
    for number in itertools.count():
        if time.monotonic() > until_s:
            break
        roll = dice.random()
        if roll < 0.45 or len(have) < 50:
            path = dice.choice(places) / f"f{number}"
            path.write_bytes(dice.randbytes(min(int(dice.paretovariate(0.9) * 4000), 20 << 20)))
            have.append(path)
        elif roll < 0.65:
            with dice.choice(have[-300:]).open("ab") as file:
                file.write(dice.randbytes(dice.randrange(100, 200_000)))
        elif roll < 0.8:
            path = dice.choice(have)
            fresh = path.with_suffix(".new")
            fresh.write_bytes(path.read_bytes()[::-1])
            fresh.rename(path)
        elif roll < 0.9:
            with dice.choice(have).open("r+b") as file:
                file.seek(dice.randrange(1 + max(0, os.fstat(file.fileno()).st_size - 4096)))
                file.write(dice.randbytes(4096))
        else:
            have.pop(dice.randrange(len(have))).unlink()
        time.sleep(0.1)  # people are slower than disks


# In the image: besides systemd, what a small server has.
GUEST_PACKAGES = (
    *("linux-image-cloud-amd64", "initramfs-tools", "systemd-sysv", "udev", "dbus", "kmod"),
    *("e2fsprogs", "rsyslog", "logrotate", "cron", "openssh-server", "ca-certificates"),
)
# Installed in the virtual machine; the first keeps /etc in git and commits what the second adds.
GUEST_INSTALLS = ("etckeeper", "nginx-light")
GUEST_DONE = "what this boot was for is done"
GUEST_FILES = {
    "etc/hostname": "guest\n",
    "etc/fstab": "/dev/vda / ext4 errors=remount-ro 0 1\n",
    "etc/machine-id": "",
    "etc/systemd/journald.conf.d/disk.conf": "[Journal]\nStorage=persistent\n",
    "etc/systemd/system/errand.service": """\
[Unit]
After=multi-user.target
SuccessAction=poweroff
FailureAction=poweroff

[Service]
Type=oneshot
Environment=HOME=/root DEBIAN_FRONTEND=noninteractive
ExecStart=/bin/sh -ex /etc/errand
StandardOutput=journal+console
""",
    "etc/errand": f"""\
if [ ! -e /etc/ssh/ssh_host_ed25519_key ]; then
    ssh-keygen -A
    systemctl restart ssh
else
    for package in {" ".join(GUEST_INSTALLS)}; do
        apt-get install -y --no-download --no-install-recommends "$package"
    done
    systemctl is-active nginx
    apt-get clean
    journalctl --rotate
    logrotate --force /etc/logrotate.conf
fi
echo {GUEST_DONE}
""",
}


def guest(folder: Path) -> None:
    """Install a Debian system that has never been booted."""
    need(QEMU)  # said before the long part
    run(
        *("debootstrap", "--variant=minbase", f"--include={','.join(GUEST_PACKAGES)}"),
        *(RELEASE, folder, MIRROR),
    )
    run(
        *("chroot", folder, "apt-get", "install", "-y", "--download-only"),
        *("--no-install-recommends", *GUEST_INSTALLS),
    )
    for key in (folder / "etc" / "ssh").glob("ssh_host_*"):
        key.unlink()
    for name, text in GUEST_FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    wanted = folder / "etc" / "systemd" / "system" / "graphical.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / "errand.service").symlink_to("../errand.service")


def boot(device: Path) -> None:
    """Boot a fresh Debian system (keys, journal), then again, and install packages in it."""
    with tempfile.TemporaryDirectory(prefix="boot-") as made:
        room = Path(made)
        with mounted(device, room / "mnt", "ro,noload"):
            for name in ("vmlinuz", "initrd.img"):
                shutil.copy(room / "mnt" / name, room / name)
        for _ in range(2):
            said = run(
                *(QEMU, "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1024"),
                *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
                *("-drive", f"file={device},format=raw,cache=none,aio=native,if=virtio"),
                *("-kernel", room / "vmlinuz", "-initrd", room / "initrd.img"),
                # A busy machine may keep the guest from counting the ticks it tests its timer by.
                *("-append", "root=/dev/vda ro console=ttyS0 panic=-1 no_timer_check"),
                limit_s=BOOT_LIMIT_S,
            )
            if f"]: {GUEST_DONE}" not in said:
                raise RuntimeError(f"the virtual machine ended too early: {said[-2000:]}")


@dataclass(frozen=True, slots=True)
class Workload:
    kind: str  # of file system
    size_bytes: int
    work: Callable[[Path], None]  # on the folder where it is mounted
    fill: Callable[[Path], None] | None = None  # not recorded; `work` is given the device then


WORKLOADS = {
    "ext4-packages": Workload("ext4", 8 * GIB, packages),
    "xfs-packages": Workload("xfs", 8 * GIB, packages),
    "ext4-build": Workload("ext4", 16 * GIB, build),
    "ext4-sqlite": Workload("ext4", 4 * GIB, sqlite),
    "ext4-postgres": Workload("ext4", 16 * GIB, postgres),
    "xfs-postgres": Workload("xfs", 16 * GIB, postgres),
    "xfs-mail": Workload("xfs", 32 * GIB, mail),
    "ext4-files": Workload("ext4", 64 * GIB, files),
    "ext4-vm-boot": Workload("ext4", 8 * GIB, boot, guest),
}


def record(name: str, out: Path, instance: Path) -> None:
    workload = WORKLOADS[name]
    print(f"{name}: {workload.work.__doc__}", flush=True)
    with tempfile.TemporaryDirectory(prefix="record-") as made:
        room = Path(made)
        room.chmod(0o755)  # for programs that do not run as root
        with loop_disk(room / "image", workload.size_bytes) as device:
            run(f"mkfs.{workload.kind}", "-q", "-f" if workload.kind == "xfs" else "-F", device)
            target = out / f"{name}.csv.gz"
            if workload.fill is None:
                with recorded(instance, device, target), mounted(device, room / "mnt"):
                    workload.work(room / "mnt")
            else:
                with mounted(device, room / "mnt"):
                    workload.fill(room / "mnt")
                with recorded(instance, device, target):
                    workload.work(device)


def main() -> int:
    parser = argparse.ArgumentParser(description="Record what real programs write to a disk.")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="all if none is named")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the traces")
    given = parser.parse_args()
    if given.list:
        for name, workload in WORKLOADS.items():
            print(f"{name:16} {workload.work.__doc__}")
        return 0
    unknown = set(given.workloads).difference(WORKLOADS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(WORKLOADS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    with tracing() as instance:
        for name in given.workloads or WORKLOADS:
            try:
                record(name, given.out, instance)
            except Missing as error:
                print(f"   {name} is left out: {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
