"""RAM disks of equal make for all contenders: null_blk, one at a time through configfs.

They have a volatile write cache, as disks have.  brd has none, and then the kernel ends flushes
above the layers that are to be measured.  A disk answers in the caller's context and costs nothing
but the copying of its bytes, so what is measured is the layers; one with a latency answers later.
"""

from __future__ import annotations

import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

MIB = 1 << 20
_CONFIGFS = Path("/sys/kernel/config")
_ROOT = _CONFIGFS / "nullb"


class CommandFailed(Exception):
    """A program ended with a status other than 0; the text is what it said."""


def sh(*words: str, timeout_s: float = 120, check: bool = True) -> str:
    """Standard output of a program."""
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if check and done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise CommandFailed(f"{' '.join(words)}: exit status {done.returncode}: {said}")
    return done.stdout


class Media(AbstractContextManager["Media"]):
    """Makes the disks, and takes them away at the end."""

    def __init__(self) -> None:
        sh("modprobe", "null_blk", "nr_devices=0")
        if not _ROOT.exists():
            sh("mount", "-t", "configfs", "none", str(_CONFIGFS))
        self._made: list[Path] = []

    def __exit__(self, *_: object) -> None:
        for folder in reversed(self._made):
            (folder / "power").write_text("0")
            folder.rmdir()

    def make(self, name: str, size_bytes: int, latency_us: int = 0) -> str:
        """Path of a new disk, all zeros; memory is taken as it is written.  Whole MiB.

        With a latency it answers each request that long after it has done it.
        """
        name = f"bvm-{name}"
        folder = _ROOT / name
        folder.mkdir()
        self._made.append(folder)
        mib = str(size_bytes // MIB)
        for attribute, value in (
            ("memory_backed", "1"),
            ("queue_mode", "0"),  # bios, as brd and device-mapper
            ("irqmode", "2" if latency_us else "0"),  # by a timer, or at once
            ("completion_nsec", str(1000 * latency_us)),
            ("blocksize", "512"),
            ("discard", "1"),
            ("size", mib),
            ("cache_size", mib),
            ("power", "1"),
        ):
            (folder / attribute).write_text(value)
        return f"/dev/{name}"
