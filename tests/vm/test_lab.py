"""The lab keeps its promises: power cuts, panics, silence."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.vm.lab import MIB, CommandFailed, Disk, Guest, GuestDied, LossyDisk, Mode

SIZE = 64 * MIB
pytestmark = pytest.mark.usefixtures("vm")

# put DISK LETTER AT: four pages of the letter from page AT on; past the guest's page cache.
WRITE = """
put() { head -c 16384 /dev/zero | tr '\\0' "$2" | dd of="/dev/lab/$1" bs=4k count=4 seek="$3" \
    iflag=fullblock oflag=direct conv=notrunc status=none; }
"""


def test_power_cut_takes_what_was_not_flushed_and_nothing_else() -> None:
    forgets = LossyDisk("forgets", SIZE, seed=1, mode=Mode.NOTHING)
    keeps = LossyDisk("keeps", SIZE, sector_bytes=4096, seed=1, mode=Mode.EVERYTHING)
    raw = Disk("raw", SIZE)
    page = 4096
    with Guest([forgets, keeps, raw]) as guest:
        guest.sh("touch /tmp/private /root/private")
        for name in ("forgets", "keeps", "raw"):
            guest.sh(f"{WRITE} put {name} a 0; blockdev --flushbufs /dev/lab/{name}")
            # fsync of the device is a flush of its cache.
            guest.sh(f"sync /dev/lab/{name}; {WRITE} put {name} b 4")
            guest.sh(f"{WRITE} put {name} c 0")
        losses = guest.power_cut()
        assert losses["forgets"].kept_bytes == 0
        assert losses["keeps"].lost_bytes == 0
        # Only what was written after the flush was in the cache.
        assert losses["forgets"].lost_bytes == losses["keeps"].kept_bytes == 8 * page
        assert forgets.path.read_bytes()[: 8 * page] == b"a" * 4 * page + bytes(4 * page)
        for disk in (keeps, raw):
            assert disk.path.read_bytes()[: 8 * page] == b"c" * 4 * page + b"b" * 4 * page

        guest.boot()
        assert guest.boots == 2
        assert guest.sh("head -c 16384 /dev/lab/forgets | tr -d a") == ""
        assert guest.sh("head -c 16384 /dev/lab/keeps | tr -d c") == ""
        for gone in ("/tmp/private", "/root/private"):
            with pytest.raises(CommandFailed, match="ended with 2"):
                guest.run(["ls", gone])

        forgets.server.freeze_after(0)
        job = guest.start(["bash", "-c", f"{WRITE} put forgets d 0"])
        assert forgets.server.frozen.wait(60)
        assert job.status is None
        with pytest.raises(GuestDied, match="Kernel panic - not syncing: sysrq triggered crash"):
            guest.sh("echo c >/proc/sysrq-trigger")
        guest.power_cut()
        assert forgets.path.read_bytes()[:page] == b"a" * page


def test_a_silent_guest_is_ended_with_its_stacks(tmp_path: Path) -> None:
    console = tmp_path / "console"
    with Guest(share=tmp_path, console=console, silence_s=15) as guest:
        result = guest.run(["sh", "-c", "cat; echo no >&2; exit 3"], data=b"in", check=False)
        assert (result.status, result.out, result.err) == (3, "in", "no\n")

        guest.sh(f"echo said in the guest >{tmp_path}/file")
        assert (tmp_path / "file").read_text() == "said in the guest\n"

        job = guest.start(["sleep", "1000"])
        job.signal(signal.SIGTERM)
        assert job.wait(60, check=False).status == -signal.SIGTERM

        with pytest.raises(TimeoutError, match="sleep 1000"):
            guest.run(["sleep", "1000"], timeout_s=1)

        # The agent's process group is the guest's first process's; only the agent is Python.
        with pytest.raises(GuestDied, match=r"(?s)silent.*NMI"):
            guest.run(["pkill", "-STOP", "-f", "vm/agent.py"])
    assert "NMI" in console.read_text()
