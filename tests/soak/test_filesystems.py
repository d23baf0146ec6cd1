"""File systems in use on a volume whose daemon is killed again and again; part of `make soak`.

An exerciser that knows its file, and stress-ng's stressors of directories, links, names, attributes
and allocation, go on over six deaths of bitmapd.  In the end every file system is whole on both
sides, which are equal byte by byte, and the file is what its owner wrote.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.filesystems import (
    MAKE,
    RECONNECT_S,
    Exerciser,
    Shown,
    check,
    mounted,
    need_filesystem,
)
from tests.support.needs import need
from tests.support.volumes import MIB, Volume, run

SIZE = 512 * MIB
KILLS = 6
OPERATIONS = 60  # between two deaths
STRESSORS = ("chmod", "dentry", "dir", "fallocate", "hdd", "link", "rename", "symlink", "xattr")


@contextmanager
def stress(folder: Path) -> Iterator[None]:
    """stress-ng from here to the end of the body; fails if it found something wrong."""
    command = ["stress-ng", "--temp-path", str(folder), "--timeout", "600s", "--verify"]
    command += ["--hdd-bytes", "16m", "--fallocate-bytes", "16m", "--oom-avoid", "--quiet"]
    for name in STRESSORS:
        command += [f"--{name}", "1"]
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    try:
        yield
        assert process.poll() is None, "it ended early"
    finally:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


@pytest.mark.parametrize("kind", list(MAKE))
def test_a_file_system_over_six_deaths(short_path: Path, kind: str) -> None:
    need_filesystem(kind)
    need("stress-ng")
    options = ["--era-interval", "500ms", "--copy-rate", "60MiB"]
    with Volume(short_path, SIZE, options=options) as volume:
        volume.create("--initial-sync", "skip")
        volume.start()
        shown = Shown(volume)
        try:
            run([*MAKE[kind], str(shown.path)])
            with mounted(shown.path, short_path / "used", kind) as folder:
                exerciser = Exerciser(folder / "file")
                (folder / "stress").mkdir()
                with stress(folder / "stress"):
                    exerciser.start()
                    try:
                        for _ in range(KILLS):
                            exerciser.until(OPERATIONS)
                            volume.kill()
                            volume.start()
                            with volume.events() as events:
                                events.wait("client-connected", RECONNECT_S)
                        exerciser.until(OPERATIONS)
                    finally:
                        exerciser.finish()
        finally:
            shown.end()
        volume.wait_in_sync()
        volume.stop()
        assert volume.recorded() == set()
        assert volume.differing() == set()
        for side in (volume.primary, volume.secondary):
            check(kind, side)
        with mounted(volume.secondary, short_path / "found", kind, "-o", "ro") as folder:
            assert (folder / "file").read_bytes() == exerciser.content
