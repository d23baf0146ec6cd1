"""Foreign programs as hosts of a whole volume: what they keep on it is whole on both sides.

`bitmapd` serves, and what each program says of its own data is asked of the primary through the
export and of the secondary behind it, after both have become equal.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.needs import lacks, need
from tests.support.volumes import MIB, Volume, run

SIZE = 64 * MIB
QCOW2 = ("-f", "qcow2")
LOAD = Path(__file__).resolve().parents[1] / "support" / "libnbd_load.py"


@pytest.fixture
def volume(short_path: Path) -> Iterator[Volume]:
    with Volume(short_path, SIZE, options=["--era-interval", "100ms"]) as made:
        made.create("--initial-sync", "skip")
        made.start()
        yield made


def end_equal(volume: Volume) -> None:
    volume.wait_in_sync()
    volume.stop()
    assert volume.recorded() == set()
    assert volume.differing() == set()


# -- qemu: an image of its own format inside the volume -----------------------------------------


def qemu_io(image: str, *commands: str) -> None:
    run(["qemu-io", *QCOW2, *(word for line in commands for word in ("-c", line)), image])


def test_qcow2_with_snapshots_and_a_chain_of_images(volume: Volume, short_path: Path) -> None:
    """An overlay in a file is committed into the image on the volume, another one is rebased."""
    need("qemu-img", "qemu-io")
    base, overlay, other = volume.uri, str(short_path / "overlay"), str(short_path / "other")
    run(["qemu-img", "create", *QCOW2, base, "40M"])
    qemu_io(base, "write -P 1 0 8M", "write -P 2 12M 3M", "flush")
    run(["qemu-img", "snapshot", "-c", "first", base])
    qemu_io(base, "write -P 3 4M 8M", "discard 0 2M", "write -z 12M 1M", "flush")
    run(["qemu-img", "snapshot", "-c", "second", base])
    run(["qemu-img", "check", *QCOW2, base])

    for name in (overlay, other):
        run(["qemu-img", "create", *QCOW2, "-F", "qcow2", "-b", base, name])
    qemu_io(overlay, "write -P 4 6M 1M", "write -P 5 30M 2M")
    qemu_io(other, "write -P 6 7M 1M")
    run(["qemu-img", "rebase", *QCOW2, "-F", "qcow2", "-b", overlay, other])
    run(["qemu-img", "commit", *QCOW2, overlay])
    run(["qemu-img", "rebase", *QCOW2, "-F", "qcow2", "-b", base, other])
    qemu_io(base, "read -P 3 4M 2M", "read -P 4 6M 1M", "read -P 3 7M 5M", "read -P 5 30M 2M")
    # What an image shows is not changed by a rebase.
    qemu_io(other, "read -P 3 6M 1M", "read -P 6 7M 1M", "read -P 0 30M 2M")
    run(["qemu-img", "snapshot", "-a", "first", base])
    qemu_io(base, "read -P 1 0 8M", "read -P 2 12M 3M", "read -P 0 30M 2M")
    run(["qemu-img", "snapshot", "-d", "second", base])
    run(["qemu-img", "check", *QCOW2, base])

    end_equal(volume)
    far = str(volume.secondary)
    run(["qemu-img", "check", *QCOW2, far])
    qemu_io(far, "read -P 1 0 8M", "read -P 2 12M 3M", "read -P 0 30M 2M")
    assert "first" in run(["qemu-img", "snapshot", "-l", far])


# -- libnbd: many requests at once, on several connections -------------------------------------


@pytest.mark.parametrize("mode", ["synch", "aio"])
def test_libnbd_in_parallel(volume: Volume, mode: str) -> None:
    need("/usr/bin/python3")
    python = ["/usr/bin/python3", "-I"]
    if subprocess.run([*python, "-c", "import nbd"], check=False, capture_output=True).returncode:
        lacks("python3-libnbd")
    run([*python, str(LOAD), volume.uri, mode, "1200", "5"])
    end_equal(volume)
