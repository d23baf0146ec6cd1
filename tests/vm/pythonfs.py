"""A disk with the interpreter's library and the checkout's packages, for the guest.

Every start of Python looks for hundreds of files.  Over 9p each look is a message between guest
and host, and under emulation that is half of the time of the start.  So the two folders go into an
ext4 image, which the guest mounts read-only and lays over the originals; the image is made again
when one of the folders changed.  It appears in one rename.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from tests.vm.kernel import CACHE, CHECKOUT

_MIB = 1 << 20


def folders() -> list[Path]:
    """Covered in the guest by folders `0`, `1`, … of the image."""
    return [Path(sysconfig.get_path("stdlib")), (CHECKOUT / ".venv" / "lib").resolve()]


def image() -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"python-{_fingerprint()}.ext4"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(prefix=".new", dir=CACHE) as name:
        staging = Path(name) / "tree"
        staging.mkdir()
        for number, folder in enumerate(folders()):
            shutil.copytree(folder, staging / str(number), symlinks=True)
        made = Path(name) / "image"
        sizes = [entry.lstat().st_size for entry in staging.rglob("*")]
        blocks = sum(size // 4096 + 1 for size in sizes)
        options = ["-q", "-F", "-O", "^has_journal", "-m", "0", "-b", "4096"]
        subprocess.run(
            [
                *("/sbin/mkfs.ext4", *options, "-N", str(len(sizes) + 1024), "-d", str(staging)),
                *(str(made), str(blocks + blocks // 8 + 16 * _MIB // 4096)),
            ],
            check=True,
            capture_output=True,
        )
        made.rename(path)
    for old in CACHE.glob("python-*.ext4"):
        # A guest that still uses it has it open.
        if old != path:
            old.unlink(missing_ok=True)
    return path


def _fingerprint() -> str:
    """Of the packages that are there, and when they came."""
    found = hashlib.sha256()
    for folder in folders():
        for place in (folder, *sorted(folder.glob("python*/site-packages/*"))):
            found.update(f"{place} {os.stat(place).st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]
