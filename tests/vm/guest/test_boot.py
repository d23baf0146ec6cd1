"""Volumes that come up by themselves under a real udevd, and media that nobody else finds.

The guest has no udevd of its own and no systemd: this module starts one with our rules, and
`dmctl monitor` in place of the units.  The configuration is the guest's /etc/dmctl, since udev is
told of no other.  Devices appear as device-mapper devices over parts of one RAM disk.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dmctl.cli.main import main
from tests.vm.guest.disks import MIB, SECTOR, load_modules, sh

ROOT = Path(__file__).parents[3]
UDEVD = Path("/lib/systemd/systemd-udevd")
RULES = Path("/etc/udev/rules.d")
CONFIG = Path("/etc/dmctl")
RUN = Path("/run/dmctl")
FS_UUID = "11111111-2222-3333-4444-555555555555"
BY_UUID = Path("/dev/disk/by-uuid", FS_UUID)
SIZES = {"primary": 32 * MIB, "secondary": 32 * MIB, "record": 4 * MIB}
WAIT_S = 300.0  # the machine that emulates this one may be busy

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        os.environ.get("LAB_GUEST") != "1", reason="NEEDS the lab: python -m tests.vm.lab pytest"
    ),
]


def dmctl(*words: str, status: int | None = 0) -> str:
    """Both streams; in this process, since starting one takes seconds in an emulated machine."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        outcome = main(words)
    if status is not None:
        assert outcome == status, (words, said.getvalue())
    return said.getvalue()


def settle() -> None:
    sh("udevadm", "settle", "--timeout=60")


def properties(device: str) -> dict[str, str]:
    """What udev knows of a device."""
    lines = sh("udevadm", "info", "--query=property", device).splitlines()
    known = dict(line.split("=", 1) for line in lines)
    return known | {"DEVLINKS": " ".join(sorted(known.get("DEVLINKS", "").split()))}


class Monitor:
    """`dmctl monitor` in the foreground; its events are the lines of its standard error."""

    def __init__(self, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dmctl", "monitor", *options],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._rest = b""
        self.seen: list[str] = []

    def line(self, word: str) -> str:
        """The next line with that word."""
        assert self._process.stderr is not None
        fd = self._process.stderr.fileno()
        end_s = time.monotonic() + WAIT_S
        while True:
            while b"\n" in self._rest:
                raw, _, self._rest = self._rest.partition(b"\n")
                self.seen.append(raw.decode())
                if word in self.seen[-1]:
                    return self.seen[-1]
            ready, _, _ = select.select([fd], [], [], max(0.0, end_s - time.monotonic()))
            data = os.read(fd, 65536) if ready else b""
            if not data:
                raise AssertionError(f"no line with {word!r}: {self.seen}")
            self._rest += data

    def rest(self) -> str:
        """What it has said since, once it has ended."""
        assert self._process.stderr is not None
        return (self._rest + self._process.stderr.read()).decode()

    def close(self) -> None:
        self._process.terminate()
        try:
            assert self._process.wait(WAIT_S) == 0
        finally:
            self._process.kill()
            self._process.wait()


@dataclass
class Udevd:
    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class Media:
    """Three places on a RAM disk that come and go as device-mapper devices."""

    lower: str
    there: set[str] = field(default_factory=set)

    def path(self, role: str) -> str:
        return f"/dev/mapper/dmtest-boot-{role}"

    def appear(self, *roles: str) -> None:
        for role in roles or tuple(SIZES):
            # Not at the beginning, where the RAM disk would show the same content.
            start = MIB + sum(size for other, size in SIZES.items() if other < role)
            table = f"0 {SIZES[role] // SECTOR} linear {self.lower} {start // SECTOR}"
            sh("dmsetup", "create", f"dmtest-boot-{role}", "--table", table)
            self.there.add(role)

    def vanish(self, *roles: str) -> None:
        for role in roles or tuple(self.there):
            sh("dmsetup", "remove", "--retry", f"dmtest-boot-{role}")
            self.there.discard(role)

    def wipe(self) -> None:
        with open(self.lower, "r+b") as stream:
            for at in range(0, MIB + sum(SIZES.values()), MIB):
                stream.seek(at)
                stream.write(bytes(MIB))


@pytest.fixture(scope="module")
def udevd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Udevd]:
    if not UDEVD.exists():
        pytest.skip(f"NEEDS {UDEVD} (package udev)")
    RULES.mkdir(parents=True, exist_ok=True)
    ours = [Path(shutil.copy(file, RULES)) for file in (ROOT / "udev").glob("*.rules")]
    log = tmp_path_factory.mktemp("udevd") / "log"
    process = subprocess.Popen([UDEVD], stderr=log.open("w"))
    try:
        end_s = time.monotonic() + WAIT_S
        while not Path("/run/udev/control").exists():
            assert time.monotonic() < end_s
            time.sleep(0.05)
        load_modules()
        sh("udevadm", "trigger", "--subsystem-match=block", "--action=add")
        settle()
        yield Udevd(process, log)
    finally:
        process.terminate()
        process.wait(WAIT_S)
        for file in ours:
            file.unlink()
        # The other tests of this boot have no udevd.
        shutil.rmtree("/run/udev", ignore_errors=True)


@pytest.fixture
def media(udevd: Udevd) -> Iterator[Media]:
    made = Media("/dev/ram7")
    made.wipe()
    try:
        made.appear()
        yield made
    finally:
        if CONFIG.exists():
            dmctl("stop", "--all", "--now", status=None)
            for file in (CONFIG / "volumes").glob("*.toml"):
                dmctl("remove", file.stem, "--yes", status=None)
        made.vanish()
        shutil.rmtree(CONFIG, ignore_errors=True)
        settle()


@pytest.fixture
def monitors() -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Monitor:
            made = Monitor(*options)
            stack.callback(made.close)
            return made

        yield start


def create(media: Media, *options: str, name: str = "vol0", attach: str = "nbd") -> str:
    words = [word for role in SIZES for word in (f"--{role}", media.path(role))]
    return dmctl("create", name, "--attach", attach, *words, *options)


def state(name: str = "vol0") -> str:
    return str(json.loads(dmctl("--json", "status", name))["volumes"][0]["state"])


def test_media_that_appear_in_any_order_bring_the_volume_up(media: Media, monitors: Any) -> None:
    create(media)
    media.vanish()
    monitor = monitors()
    assert set(SIZES) == waiting(monitor)
    for order in itertools.permutations(SIZES):
        for number, role in enumerate(order[:-1], 1):
            media.appear(role)
            assert waiting(monitor) == set(order[number:])
        assert state() == "stopped"
        said = dmctl("assemble", "vol0")
        assert said == f"volume 'vol0' waits for its {order[-1]} {media.path(order[-1])}" + (
            "; --degraded starts it without\n" if order[-1] == "secondary" else "\n"
        )
        media.appear(order[-1])
        monitor.line("vol0: assembled")
        assert state() != "stopped"
        dmctl("stop", "vol0", "--now")
        # What was stopped stays stopped, until its media go and come back.
        media.vanish("primary")
        assert waiting(monitor) == {"primary"}
        media.vanish()
        while waiting(monitor) != set(SIZES):
            pass


def waiting(monitor: Monitor) -> set[str]:
    """What the next line that tells of waiting says is missing."""
    words = monitor.line("vol0: waiting").split("waiting ")[1].split()
    return {word.partition("=")[0] for word in words}


def test_a_secondary_that_does_not_come_is_waited_for_no_longer_than_said(
    media: Media, monitors: Any
) -> None:
    create(media)
    media.vanish("secondary")
    monitor = monitors("--patience", "2s")
    assert waiting(monitor) == {"secondary"}
    said = monitor.line("vol0: assembled")
    assert said.endswith(f" without_secondary={media.path('secondary')}")
    assert state() == "link-down"
    media.appear("secondary")
    dmctl("wait", "vol0", "--for", "in-sync", "--timeout", "60s")


def test_a_volume_that_dies_is_started_again_and_one_that_is_stopped_is_not(
    media: Media, monitors: Any
) -> None:
    create(media)
    monitor = monitors()
    monitor.line("vol0: assembled")
    os.kill(int((RUN / "vol0.pid").read_text()), signal.SIGKILL)
    monitor.line("vol0: died")
    monitor.line("vol0: assembled")
    dmctl("stop", "vol0")
    # An event of a medium that stays is not an arrival.
    sh("udevadm", "trigger", "--settle", media.path("record"))
    dmctl("assemble", "vol0", "--wait")
    os.kill(int((RUN / "vol0.pid").read_text()), signal.SIGKILL)
    sh("udevadm", "trigger", "--settle", media.path("record"))
    assert state() == "stopped"
    assert sum("died" in line for line in monitor.seen) == 1


def test_volumes_that_are_not_to_be_started_are_left_alone(media: Media) -> None:
    create(media)
    with (CONFIG / "volumes/vol0.toml").open("a") as stream:
        stream.write("start_at_boot = false\n")
    dmctl("udev-rules")
    settle()
    assert "DMCTL_ASSEMBLE" not in properties(media.path("record"))
    media.vanish("record")
    monitor = Monitor()
    try:
        await_monitor()
        media.appear("record")
        settle()
    finally:
        monitor.close()
    assert monitor.rest() == ""
    dmctl("assemble", "--all")
    assert state() == "stopped"
    dmctl("assemble", "vol0")
    assert state() != "stopped"


def await_monitor() -> None:
    end_s = time.monotonic() + WAIT_S
    lock = RUN / ".monitor.lock"
    while not (lock.exists() and lock.read_text()):
        assert time.monotonic() < end_s
        time.sleep(0.1)  # nothing tells when a process has begun


@pytest.mark.parametrize("attach", ["nbd", "dm"])
def test_only_the_volume_shows_its_file_system(media: Media, attach: str) -> None:
    raw = media.path("primary")
    sh("mkfs.ext4", "-q", "-U", FS_UUID, "-L", "boot-test", raw)
    sh("udevadm", "trigger", "--settle", raw)
    assert BY_UUID.exists()
    links = set(properties(raw)["DEVLINKS"].split())

    create(media, attach=attach)
    settle()
    for role in ("primary", "secondary"):
        seen = properties(media.path(role))
        assert (seen["DMCTL_VOLUME"], seen["DMCTL_ROLE"]) == ("vol0", role)
        assert (seen["ID_FS_TYPE"], seen["UDISKS_IGNORE"]) == ("dmctl_member", "1")
        assert "ID_FS_UUID" not in seen
    seen = properties(raw)
    assert seen["DMCTL_CONTENT"] == "ext4"
    gone = {str(BY_UUID), "/dev/disk/by-label/boot-test"}
    assert set(seen["DEVLINKS"].split()) == links - gone
    assert not BY_UUID.exists()
    seen = properties(media.path("record"))
    assert seen["SYSTEMD_WANTS"] == "dmctl-assemble@vol0.service"
    assert "ID_FS_TYPE" not in seen

    # At a boot the raw devices come first; the copy has the same file system by now.
    dmctl("start", "vol0")
    dmctl("wait", "vol0", "--for", "in-sync", "--timeout", "60s")
    if attach == "dm":
        the_volume_has_it()
    dmctl("stop", "vol0")
    settle()
    assert not BY_UUID.exists()
    media.vanish()
    media.appear("secondary", "primary")
    settle()
    assert not BY_UUID.exists()

    dmctl("remove", "vol0", "--yes")
    settle()
    assert BY_UUID.exists()
    assert properties(raw)["ID_FS_TYPE"] == "ext4"
    media.appear("record")


def the_volume_has_it() -> None:
    settle()
    top = Path("/dev/mapper/vol0").resolve()
    assert BY_UUID.resolve() == top == Path("/dev/dmctl/vol0").resolve()
    seen = properties(str(top))
    assert (seen["ID_FS_TYPE"], seen["SYSTEMD_READY"]) == ("ext4", "1")
    uuid = json.loads(dmctl("--json", "status", "vol0"))["volumes"][0]["uuid"].replace("-", "")
    gate = [node for node in Path("/sys/block").glob("nbd*/backend")
            if node.read_text().strip() == uuid]  # fmt: skip
    assert len(gate) == 1
    for inner in ("/dev/mapper/dmctl-vol0-w", "/dev/mapper/dmctl-vol0-era",
                  f"/dev/{gate[0].parent.name}"):  # fmt: skip
        seen = properties(inner)
        assert "ID_FS_TYPE" not in seen, seen
        assert (seen["SYSTEMD_READY"], seen["UDISKS_IGNORE"]) == ("0", "1")
        assert not any("by-uuid" in link for link in seen["DEVLINKS"].split())
    Path("/mnt/boot-test").mkdir(exist_ok=True)
    sh("mount", f"UUID={FS_UUID}", "/mnt/boot-test")
    try:
        assert sh("findmnt", "-no", "SOURCE", "/mnt/boot-test").strip() == "/dev/mapper/vol0"
        # A volume in use is not stopped, by whoever asks.
        assert "in use" in dmctl("stop", "vol0", status=12)
        pid = int((RUN / "vol0.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        Path("/mnt/boot-test/file").write_text("served")
        sh("sync", "-f", "/mnt/boot-test")
        assert state() != "stopped"
        assert "stop-refused" in dmctl("events", "vol0", "--now")
    finally:
        sh("umount", "/mnt/boot-test")


def test_partitions_of_a_primary_and_loop_devices_are_hidden_too(
    media: Media, tmp_path: Path
) -> None:
    if shutil.which("sfdisk") is None:
        pytest.skip("NEEDS sfdisk (package fdisk)")
    disk = tmp_path / "disk"
    with disk.open("wb") as stream:
        stream.truncate(48 * MIB)
    subprocess.run(["sfdisk", "-q", disk], input="label: gpt\n,16M\n,16M\n", text=True, check=True)
    loop = sh("losetup", "-f", "--show", "--partscan", str(disk)).strip()
    try:
        settle()
        sh("mkfs.ext4", "-q", "-U", FS_UUID, f"{loop}p2")
        sh("udevadm", "trigger", "--settle", f"{loop}p2")
        assert BY_UUID.resolve() == Path(f"{loop}p2")
        before = set(properties(f"{loop}p2")["DEVLINKS"].split())
        assert any("by-partuuid" in link for link in before)
        secondary = tmp_path / "secondary"
        with secondary.open("wb") as stream:
            stream.truncate(48 * MIB)
        dmctl("create", "vol0", "--attach", "nbd", "--primary", loop, "--secondary", str(secondary),
              "--record", media.path("record"))  # fmt: skip
        sh("udevadm", "trigger", "--settle", f"{loop}p2")
        seen = properties(f"{loop}p2")
        assert (seen["DMCTL_ROLE"], seen["ID_FS_TYPE"]) == ("primary", "dmctl_member")
        assert set(seen["DEVLINKS"].split()) == before - {str(BY_UUID)}
        assert not BY_UUID.exists()
        assert "SYSTEMD_WANTS" not in seen
        assert properties(loop)["SYSTEMD_WANTS"] == "dmctl-assemble@vol0.service"
    finally:
        dmctl("remove", "vol0", "--yes", status=None)
        sh("losetup", "-d", loop)


def test_the_image_of_a_receiver_is_hidden_and_brings_it_up(
    media: Media, monitors: Any, tmp_path: Path
) -> None:
    raw, journal = media.path("primary"), tmp_path / "journal"
    sh("mkfs.ext4", "-q", "-U", FS_UUID, raw)
    sh("udevadm", "trigger", "--settle", raw)
    assert BY_UUID.exists()
    with journal.open("wb") as stream:
        stream.truncate(64 * MIB)
    dmctl("receive", "vol0", "--force", "--image", raw, "--journal", str(journal),
          "--listen", f"receiver+unix:///vol0?socket={RUN}/vol0.points")  # fmt: skip
    settle()
    seen = properties(raw)
    assert (seen["DMCTL_ROLE"], seen["ID_FS_TYPE"]) == ("image", "dmctl_member")
    assert seen["SYSTEMD_WANTS"] == "dmctl-assemble@vol0.service"
    assert not BY_UUID.exists()
    media.vanish("primary")
    monitor = monitors()
    assert waiting(monitor) == {"image"}
    media.appear("primary")
    monitor.line("vol0: assembled")
    settle()
    assert not BY_UUID.exists()
    dmctl("stop", "vol0")
    dmctl("remove", "vol0", "--yes")
    settle()
    assert BY_UUID.exists()


def test_devices_that_are_none_of_ours_are_left_alone(media: Media) -> None:
    """Whatever else there is: udev sees it as it does without our rules."""
    create(media)
    settle()
    others = [f"/dev/{node.name}" for node in Path("/sys/block").glob("[lv]*")]
    assert others

    def seen() -> dict[str, dict[str, str]]:
        sh("udevadm", "trigger", "--settle", *others)
        return {name: properties(name) for name in others}

    with_ours = seen()
    assert not [name for name in others if any("DMCTL" in key for key in with_ours[name])]
    for file in RULES.glob("*dmctl*"):
        file.rename(file.with_suffix(".off"))
    try:
        sh("udevadm", "control", "--reload")
        without = seen()
        for name in others:
            assert with_ours[name] == without[name]
    finally:
        for file in RULES.glob("*dmctl*.off"):
            file.rename(file.with_suffix(".rules"))
        sh("udevadm", "control", "--reload")


def test_a_record_is_found_by_its_partition_type(media: Media, tmp_path: Path) -> None:
    """Its name has changed, and the configuration expects another one."""
    program = Path("/usr/local/bin/dmctl")
    made = not program.exists()
    if made:
        program.symlink_to(ROOT / ".venv/bin/dmctl")
    if shutil.which("sfdisk") is None:
        pytest.skip("NEEDS sfdisk (package fdisk)")
    disk = tmp_path / "disk"
    with disk.open("wb") as stream:
        stream.truncate(8 * MIB)
    kind = "22a97922-7e0b-42b7-9e79-a9e765cb67f9"
    table = f"label: gpt\n,4M,{kind}\n"
    subprocess.run(["sfdisk", "-q", disk], input=table, text=True, check=True)
    loop = sh("losetup", "-f", "--show", "--partscan", str(disk)).strip()
    try:
        settle()
        assert "DMCTL_VOLUME" not in properties(f"{loop}p1")
        create(media)
        shutil.copyfile(media.path("record"), f"{loop}p1")
        sh("udevadm", "trigger", "--settle", f"{loop}p1")
        seen = properties(f"{loop}p1")
        assert (seen["DMCTL_VOLUME"], seen["DMCTL_ROLE"]) == ("vol0", "record")
        assert seen["SYSTEMD_WANTS"] == "dmctl-assemble@vol0.service"
    finally:
        sh("losetup", "-d", loop)
        if made:
            program.unlink()


def test_lvm_finds_its_physical_volume_on_the_volume_only(media: Media) -> None:
    if shutil.which("lvm") is None:
        pytest.skip("NEEDS lvm (package lvm2)")
    raw = media.path("primary")
    sh("pvcreate", "-q", raw)
    sh("vgcreate", "-q", "boottest", raw)
    sh("lvcreate", "-q", "-n", "data", "-L", "8m", "-Wn", "-Zn", "boottest")
    sh("vgchange", "-an", "boottest")
    create(media, attach="dm")
    try:
        media.vanish()
        media.appear()
        settle()
        assert properties(raw)["DMCTL_CONTENT"] == "LVM2_member"
        assert not Path("/dev/boottest/data").exists()
        dmctl("start", "vol0")
        settle()
        assert Path("/dev/boottest/data").exists()
        under = sh("dmsetup", "deps", "-o", "devname", "boottest-data")
        assert "(vol0)" in under
        assert "in use" in dmctl("stop", "vol0", status=12)
    finally:
        sh("dmsetup", "remove", "boottest-data", check=False)


def test_a_udevd_that_stands_still_holds_up_no_volume(media: Media, udevd: Udevd) -> None:
    create(media, attach="dm")
    settle()
    udevd.process.send_signal(signal.SIGSTOP)
    try:
        dmctl("start", "vol0")
        with open("/dev/mapper/vol0", "r+b", buffering=0) as stream:
            stream.write(b"x" * 4096)
            os.fsync(stream.fileno())
        dmctl("wait", "vol0", "--for", "in-sync", "--timeout", f"{WAIT_S:.0f}s")
        dmctl("stop", "vol0")
    finally:
        udevd.process.send_signal(signal.SIGCONT)
    settle()
    assert not [path for path in Path("/dev/mapper").iterdir() if "vol0" in path.name]
    dmctl("start", "vol0")
    settle()
    assert Path("/dev/dmctl/vol0").resolve() == Path("/dev/mapper/vol0").resolve()


def test_udev_has_nothing_against_our_rules(media: Media, udevd: Udevd) -> None:
    """The last one: it has read them all by now, and applied them."""
    create(media)
    settle()
    assert [line for line in udevd.log.read_text().splitlines() if "dmctl" in line] == []
