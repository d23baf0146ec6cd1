"""Real media for tests: loop devices over files in a test's own folder, files in memory."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.needs import lacks


def run(*command: str) -> str:
    """Standard output; the error names the command and what it said."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip() or result.returncode}")
    return result.stdout.strip()


@contextmanager
def loop_device(path: Path, sector_bytes: int = 512, *options: str) -> Iterator[str]:
    """A loop device over `path`; skips the test, loudly, where there can be none."""
    if shutil.which("losetup") is None:
        lacks("losetup (package mount or util-linux)")
    try:
        name = run(
            "losetup", "--find", "--show", "--sector-size", str(sector_bytes), *options, str(path)
        )
    except RuntimeError as error:
        lacks(f"loop devices, for which one has to be root: {error}")
    try:
        yield name
    finally:
        run("losetup", "--detach", name)


def sparse_file(path: Path, size_bytes: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size_bytes)
    return path


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder of a tmpfs; skips the test, loudly, where there is none."""
    if not Path("/dev/shm").is_dir():
        lacks("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="bitmapd-test-", dir="/dev/shm") as path:
        yield Path(path)
