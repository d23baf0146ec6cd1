"""Power cuts of a volume with a receiver whose hosts write past the gate, and of the receiver.

Both are in one guest, so that each cut hits both ends at once, over disks that lose what was not
flushed.  After each cut the receiver is promoted, on this machine and from copies of its media, and
it must hold that

(a) the image is a prefix of what the host wrote, one write after the other, and
(b) it has all that is in a point which the volume knew as committed,

and after the next start and its recovery, that

(c) `dmctl verify` finds both sides equal.

POWER_CUTS=N makes N rounds instead of a few, POWER_SEED=K other ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.volumes import DMCTL, run
from tests.vm.guest.dmsites import newest
from tests.vm.kernel import CHECKOUT
from tests.vm.lab import MIB, Disk, Guest, Job, LossyDisk
from tests.vm.powercut_points_guest import FAR, NEAR, first_of
from tests.vm.test_power_cut import ETC, Log, pause, until

CUTS = int(os.environ.get("POWER_CUTS", "3"))
SEED = int(os.environ.get("POWER_SEED", "1"))
LINK = f"receiver+unix:///{FAR}?socket=/run/link"
SIZES = {"primary": 16 * MIB, "record": 4 * MIB, "image": 16 * MIB, "journal": 80 * MIB}

pytestmark = [
    pytest.mark.usefixtures("vm"),
    pytest.mark.timeout(600 + 120 * CUTS),
]


@dataclass(frozen=True, slots=True)
class Round:
    """The cut comes when `disk` has taken so many changes under load, or after `seconds`."""

    number: int
    disk: str
    changes: int
    seconds: float

    @classmethod
    def drawn(cls, number: int) -> Round:
        chance = random.Random(f"{SEED} {number}")
        disk = chance.choice(tuple(SIZES))
        return cls(number, disk, int(300 ** chance.random()), chance.uniform(2.0, 12.0))


class Sites:
    """A guest with both ends, and what is written down of the receiver's volume."""

    def __init__(self, folder: Path) -> None:
        self.disks = {name: LossyDisk(name, size, seed=SEED) for name, size in SIZES.items()}
        self.guest = Guest([*self.disks.values(), Disk("etc", 32 * MIB)], memory_mib=1024)
        self._folder = folder
        self._receiver = ""

    def prepare(self) -> None:
        dmctl = f".venv/bin/dmctl --config-dir {ETC}"
        self.guest.sh(
            f"mkfs.ext4 -q /dev/lab/etc; mkdir {ETC}; mount /dev/lab/etc {ETC};"
            f" {dmctl} receive {FAR} --image /dev/lab/image --journal /dev/lab/journal"
            f" --listen '{LINK}';"
            f" {dmctl} create {NEAR} --attach dm --primary /dev/lab/primary --secondary '{LINK}'"
            " --record /dev/lab/record --extent-size 128KiB --record-limit 4MiB"
            " --point-interval 1s; sync"
        )
        self._receiver = self.guest.sh(f"cat {ETC}/volumes/{FAR}.toml")

    def start(self, number: int, log: Log) -> Job:
        if number:
            self.guest.boot()
            self.guest.sh(f"mkdir {ETC}; mount /dev/lab/etc {ETC}")
        words = [f"{CHECKOUT}/.venv/bin/python", "-m", "tests.vm.powercut_points_guest"]
        env = {"DMCTL_CONFIG_DIR": ETC, "DMCTL_RUN_DIR": "/run/dmctl", "NO_COLOR": "1"}
        return self.guest.start([*words, str(number)], env=env, sink=log.took)

    def cut(self) -> str:
        losses = self.guest.power_cut()
        assert self.guest.complaints() == []
        return "; ".join(
            f"{name}: {loss.mode.name}, kept {loss.kept_bytes}, lost {loss.lost_bytes}"
            for name, loss in losses.items()
        )

    def promoted(self, number: int) -> Path:
        """The image as `dmctl promote` leaves it after this cut."""
        folder = self._folder / str(number)
        (folder / "etc" / "volumes").mkdir(parents=True)
        receiver = self._receiver.replace("/run/link", str(folder / "link"))
        for name in ("image", "journal"):
            shutil.copyfile(self.disks[name].path, folder / name)
            receiver = re.sub(rf"/dev/lab/{name}\b", str(folder / name), receiver)
        (folder / "etc" / "volumes" / f"{FAR}.toml").write_text(receiver)
        places = ["--config-dir", str(folder / "etc"), "--run-dir", str(folder / "run")]
        dmctl = [str(DMCTL), *places]
        try:
            said = run([*dmctl, "--json", "promote", FAR])
            assert json.loads(said)["consistent"], said
        finally:
            with contextlib.suppress(AssertionError):
                run([*dmctl, "stop", FAR, "--now"])
        return folder / "image"


def test_a_power_cut_leaves_a_point_that_is_a_prefix(
    short_path: Path, record_property: Callable[[str, object], None]
) -> None:
    sites = Sites(short_path)
    with_writes = 0
    with sites.guest:
        sites.prepare()
        for number in range(CUTS):
            round_, log, began_s = Round.drawn(number), Log(), time.monotonic()
            server = sites.disks[round_.disk].server
            job = sites.start(number, log)
            until(lambda log=log: log.find("verified") is not None, job, log)  # type: ignore[misc]
            if number % 2:
                # What was durable before tells the least that there has to be.
                until(lambda log=log: log.find("durable") is not None, job, log)  # type: ignore[misc]
                server.freeze_after(round_.changes)
                until(server.frozen.is_set, job, log)
            else:
                pause.wait(round_.seconds)
            losses = sites.cut()
            durable = [int(line.split()[1]) for line in log.lines if line.startswith("durable")]
            found = newest(str(sites.promoted(number)), first_of(number))
            said = (
                f"POWER_SEED={SEED}: {round_}: {len(durable)} points, the last with {durable[-1:]},"
                f" promoted with {found}, {losses}, {time.monotonic() - began_s:.0f} s"
            )
            print(said, flush=True)
            assert found >= max(durable, default=0), said
            with_writes += found >= first_of(number)
        log = Log()
        job = sites.start(CUTS, log)
        until(lambda: log.find("verified") is not None, job, log)
    record_property("cuts", CUTS)
    assert with_writes, "no point had a write of its round"
