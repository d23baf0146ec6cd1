"""Fault case 11: far more dirty pages than memory, to be written through the volume.

What frees memory then is the very process that serves the volume: if it waited for memory, nothing
would ever be written again.  The guest has as little memory as it can boot and work with.
"""

from __future__ import annotations

import filecmp

import pytest

from tests.vm.kernel import CHECKOUT
from tests.vm.lab import GIB, MIB, Disk, Guest

MEMORY_MIB = 448
WRITTEN = "768m"
SECONDS = 420.0

pytestmark = pytest.mark.usefixtures("vm")

DMCTL = f"{CHECKOUT}/.venv/bin/dmctl --config-dir /tmp/etc --run-dir /run/dmctl"
# Half of the memory may be dirty.  With 80 % the kernel ended the hog, since a machine as slow as
# this one wrote too little back while it looked for pages that it could take.
RATIOS = "sysctl -q vm.dirty_background_ratio=30 vm.dirty_ratio=50 vm.dirty_expire_centisecs=360000"
HOG = "m = bytearray(64 << 20); m[::4096] = b'x' * (len(m) // 4096); import time; time.sleep(1e4)"


def test_case_11_dirty_pages_far_beyond_memory() -> None:
    disks = [Disk("primary", GIB), Disk("secondary", GIB), Disk("record", 4 * MIB)]
    with Guest(disks, memory_mib=MEMORY_MIB) as guest:
        guest.sh(
            f"{DMCTL} create vol0 --attach dm --initial-sync skip --primary /dev/lab/primary"
            " --secondary /dev/lab/secondary --record /dev/lab/record --record-limit 64MiB;"
            f" {DMCTL} start vol0; {RATIOS}"
        )
        assert "memory-not-locked" not in guest.sh(f"{DMCTL} events vol0 --now")
        hog = guest.start(["python3", "-c", HOG])
        words = ["fio", "--name=job", "--filename=/dev/mapper/vol0", "--direct=0", "--bs=64k"]
        words += ["--rw=randwrite", f"--size={WRITTEN}", "--end_fsync=1"]
        flood = guest.start([*words, "--randseed=11"])
        # Hosts and commands get their turn meanwhile.
        guest.sh(f"{DMCTL} status vol0; head -c 4096 /dev/mapper/vol0 >/dev/null")
        flood.wait(SECONDS)
        assert hog.status is None, "the kernel ended a program for want of memory"
        hog.signal(9)
        told = guest.sh("dmesg")
        assert "Out of memory" not in told
        assert "blocked for more than" not in told
        guest.sh(f"{DMCTL} wait vol0 --for in-sync --timeout {SECONDS:.0f}s", timeout_s=SECONDS)
        guest.sh(f"{DMCTL} stop vol0")
        assert guest.complaints() == []
        primary, secondary = (disk.path for disk in disks[:2])
        assert primary.stat().st_blocks * 512 > MEMORY_MIB * MIB
        assert filecmp.cmp(primary, secondary, shallow=False)
