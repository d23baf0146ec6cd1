"""A boot and a shutdown under a real systemd: a file system upon a volume, mounted by its UUID.

systemd runs as the first process of a PID namespace with our units and rules and its own udevd; the
three media are partitions of one virtio disk, and /etc/fstab names the file system by the UUID that
the raw primary has, too.  What systemd does is in the kernel's log, in order.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.record import tool
from tests.vm.guest.disks import drop_cache, load_modules, sh

ROOT = Path(__file__).parents[3]
SYSTEMD = Path("/lib/systemd/systemd")
UNITS = Path("/etc/systemd/system")
RULES = Path("/etc/udev/rules.d")
CONFIG = Path("/etc/dmctl")
TMP = Path("/etc/tmpfiles.d/tmp.conf")
DISK = Path("/dev/lab/disk0")
BY_ID = Path("/dev/disk/by-id")
MEDIA = {"primary": 1, "secondary": 2, "record": 3}
FS_UUID = "22222222-3333-4444-5555-666666666666"
WAIT_S = 800.0  # the machine that emulates this one may be busy
# Of the host's systemd what a boot needs to mount file systems, and nothing else.
NOT_WANTED = (
    *("systemd-binfmt", "systemd-firstboot", "systemd-hwdb-update", "systemd-journal-flush"),
    *("systemd-machine-id-commit", "systemd-pcrphase", "systemd-pcrphase-sysinit", "ldconfig"),
    *("systemd-random-seed", "systemd-repart", "systemd-sysusers", "systemd-update-utmp"),
    *("systemd-timesyncd", "systemd-modules-load", "lvm2-monitor", "blk-availability"),
)
TARGET = """\
[Unit]
Requires=sysinit.target local-fs.target
After=sysinit.target local-fs.target
"""

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("LAB_GUEST") != "1", reason="NEEDS the lab: python -m tests.vm.lab pytest"
    ),
]


class Machine:
    """systemd in a PID namespace of its own, with its own /run."""

    def __init__(self) -> None:
        begin = "mount -t tmpfs -o mode=755 run /run && exec " + (
            f"{SYSTEMD} --system --unit=lab.target --log-target=kmsg --show-status=no"
        )
        self._process = subprocess.Popen(
            ["unshare", "--fork", "--pid", "--mount-proc", "sh", "-c", begin],
            stdin=subprocess.DEVNULL,
        )

    @property
    def pid(self) -> str:
        """Of its first process, seen from outside."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return children.read_text().split()[0]

    def run(self, *words: str, check: bool = True) -> str:
        return sh("nsenter", "-t", self.pid, "-p", "-m", *words, check=check, timeout_s=WAIT_S)

    def until(self, unit: str, state: str) -> None:
        end_s = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(IndexError, OSError):
                if self.run("systemctl", "is-active", unit, check=False).strip() == state:
                    return
            if time.monotonic() > end_s:
                jobs = self.run("systemctl", "list-jobs", "--no-pager", check=False)
                raise AssertionError(f"{unit} is not {state}: {jobs}\n{sh('dmesg')[-4000:]}")
            time.sleep(1)  # systemctl has no wait for this

    def power_off(self) -> None:
        self.run("systemctl", "start", "--no-block", "poweroff.target")
        self._process.wait(WAIT_S)

    def close(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(IndexError, OSError):
                os.kill(int(self.pid), 9)  # and all of its namespace with it
            self._process.wait(60)


@pytest.fixture
def media() -> Iterator[dict[str, str]]:
    """Role -> path by the disk's serial number, as udev makes it."""
    if shutil.which("sfdisk") is None or not SYSTEMD.exists():
        pytest.skip("NEEDS sfdisk (package fdisk) and systemd")
    load_modules()
    disk = os.path.realpath(DISK)
    table = "label: gpt\n,64M\n,64M\n,16M\n"
    subprocess.run(["sfdisk", "-q", "-w", "always", disk], input=table, text=True, check=True)
    try:
        for number in MEDIA.values():
            sh("wipefs", "-q", "-a", f"{disk}{number}")
        yield {role: f"{BY_ID}/virtio-disk0-part{number}" for role, number in MEDIA.items()}
    finally:
        sh("wipefs", "-q", "-a", *(f"{disk}{number}" for number in MEDIA.values()), disk)
        subprocess.run(["blockdev", "--rereadpt", disk], check=False)


@pytest.fixture
def installed(media: dict[str, str]) -> Iterator[None]:
    """Our units, rules and a configured volume; everything else is taken away again."""
    made: list[Path] = []

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        made.append(path)

    for source in [*(ROOT / "examples").glob("*.service"), ROOT / "examples/dmctl-resync.timer"]:
        write(
            UNITS / source.name,
            source.read_text().replace("/usr/local/bin/", f"{ROOT}/.venv/bin/"),
        )
    for source in (ROOT / "udev").glob("*.rules"):
        write(RULES / source.name, source.read_text())
    write(UNITS / "lab.target", TARGET)
    write(TMP, "")  # a boot would clear /tmp, where other tests have their folders
    for name in NOT_WANTED:
        path = UNITS / f"{name}.service"
        if not path.exists():
            path.symlink_to("/dev/null")
            made.append(path)
    fstab = Path("/etc/fstab")
    before = fstab.read_text() if fstab.exists() else ""
    options = "defaults,x-systemd.device-timeout=0"
    fstab.write_text(f"UUID={FS_UUID} /mnt ext4 {options} 0 2\n")
    sh("sysctl", "-q", "kernel.printk_devkmsg=on")
    shutil.rmtree("/dev/disk", ignore_errors=True)
    try:
        # The disk is still known by other names: there is no udevd yet.
        BY_ID.mkdir(parents=True)
        for role, path in media.items():
            Path(path).symlink_to(f"{os.path.realpath(DISK)}{MEDIA[role]}")
        sh("mkfs.ext4", "-q", "-U", FS_UUID, media["primary"])
        words = [word for role in MEDIA for word in (f"--{role}", media[role])]
        sh(f"{ROOT}/.venv/bin/dmctl", "create", "vol0", "--attach", "dm", *words)
        shutil.rmtree("/dev/disk")
        yield
    finally:
        fstab.write_text(before)
        for path in made:
            path.unlink(missing_ok=True)
        (RULES / "63-volumes-dmctl.rules").unlink(missing_ok=True)
        shutil.rmtree(UNITS / "bitmapd@vol0.service.d", ignore_errors=True)
        for folder in (CONFIG, Path("/dev/disk"), Path("/dev/dmctl")):
            shutil.rmtree(folder, ignore_errors=True)


def times(log: str, *texts: str) -> list[int]:
    """Where these texts stand in the log; each of them has to."""
    found = []
    for text in texts:
        match = re.search(text, log)
        assert match is not None, (text, log[-6000:])
        found.append(match.start())
    return found


def test_boot_and_shutdown(media: dict[str, str], installed: None) -> None:
    sh("dmesg", "--clear")
    machine = Machine()
    try:
        machine.until("lab.target", "active")
        source = machine.run("findmnt", "-no", "SOURCE", "/mnt").strip()
        assert source == "/dev/mapper/vol0"
        machine.run("sh", "-c", "echo written > /mnt/file")
        assert "active" in machine.run("systemctl", "is-active", "bitmapd@vol0.service")
        # Who asks for it is told that it is in use; nothing is killed.
        refused = machine.run("sh", "-c", f"{ROOT}/.venv/bin/dmctl -q stop vol0 2>&1; echo $?")
        assert "in use" in refused
        assert refused.splitlines()[-1] == "12"
        machine.run("sh", "-c", "echo and again >> /mnt/file; sync -f /mnt")
        machine.run(
            *(f"{ROOT}/.venv/bin/dmctl", "wait", "vol0", "--for", "in-sync"),
            *("--timeout", f"{WAIT_S:.0f}s"),
        )
        machine.power_off()
    finally:
        machine.close()
    log = sh("dmesg")
    unmounted, stopping, stopped = times(
        log,
        r"mnt\.mount: Deactivated successfully|Unmounted mnt\.mount",
        r"Stopping bitmapd@vol0\.service",
        r"bitmapd@vol0\.service: Deactivated successfully",
    )
    assert unmounted < stopping < stopped
    assert "ordering cycle" not in log
    assert sh("dmsetup", "ls").strip() == "No devices found"
    record = f"{os.path.realpath(DISK)}{MEDIA['record']}"
    superblock = tool.probe(record)
    assert superblock is not None
    assert superblock.session == 1
    content = []
    for role in ("primary", "secondary"):
        path = f"{os.path.realpath(DISK)}{MEDIA[role]}"
        drop_cache(path)
        content.append(Path(path).read_bytes())
    left = {extent for extent in range(64) if tool.load(record).bits[extent]}
    for extent in set(range(64)) - left:
        at = slice(extent << 20, (extent + 1) << 20)
        assert content[0][at] == content[1][at], extent
    assert b"written\nand again\n" in content[0]
