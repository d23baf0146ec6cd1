"""test-failover: a point is looked at by foreign programs, while the receiver goes on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.filesystems import Shown, mounted, need_filesystem
from tests.support.needs import need
from tests.support.sites import Sites, Writer, newest
from tests.support.volumes import MIB, Volume, make_file, run

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def sites(short_path: Path) -> Iterator[Sites]:
    with Sites(short_path, 32 * MIB) as made:
        made.create()
        yield made


def drill(sites: Sites, *more: str) -> dict[str, Any]:
    view: dict[str, Any] = json.loads(sites.far.dmctl("--json", "test-failover", "vol0", *more))[
        "view"
    ]
    return view


def copied(view: dict[str, Any], to: Path) -> Path:
    to.unlink(missing_ok=True)
    run(["nbdcopy", view["device"], str(to)])
    return to


def test_a_view_stays_at_its_point_while_points_are_committed_and_applied(
    sites: Sites, tmp_path: Path
) -> None:
    """What the view shows is a prefix, the same one at every look; what the image has moves on."""
    need("nbdcopy", "qemu-img", "qemu-io")
    sites.start()
    writer = Writer(sites.near)
    writer.more(300)
    view = drill(sites)
    assert sites.far.status()["receiver"]["view"]["point"] == view["point"]
    first = copied(view, tmp_path / "first")
    shown = newest(first)
    for _ in range(3):
        writer.more(100)
        sites.point(sites.points()["number"])
    sites.far.until(lambda status: status["receiver"]["applied"] > view["point"])
    again = copied(view, tmp_path / "again")
    assert again.read_bytes() == first.read_bytes()
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", view["device"], str(first)])
    assert sites.far.status()["receiver"]["view"]["overlay_bytes"] > 0

    # What is written there is there, and in no image.
    run(["qemu-io", "-f", "raw", "-c", "write -P 0x5a 1000k 300k", view["device"]])
    changed = bytearray(first.read_bytes())
    changed[1000 << 10 : 1300 << 10] = b"\x5a" * (300 << 10)
    assert copied(view, tmp_path / "changed").read_bytes() == changed
    last = writer.stop()
    sites.near.wait_in_sync()
    sites.far.dmctl("test-failover", "vol0", "--end")
    assert sites.far.status()["receiver"]["view"] is None
    sites.near.stop()
    sites.far.stop()
    assert sites.equal()
    assert shown < newest(sites.image) == last
    assert not list((sites.folder / "far").rglob("*.view"))


def with_ext4(sites: Sites, folder: Path) -> tuple[dict[str, Any], int]:
    """A view of a point with an ext4, of which a later point has nothing left: the view, and the
    number of that one, which is applied."""
    source, tree = make_file(folder / "ext4", 32 * MIB), folder / "tree"
    tree.mkdir()
    for number in range(40):
        (tree / f"file{number}").write_bytes(bytes([number]) * 70_000)
    run(["mkfs.ext4", "-q", "-F", "-d", str(tree), str(source)])
    sites.start()
    run(["nbdcopy", str(source), sites.near.uri])
    sites.near.dmctl("point", "vol0", "--wait")
    committed = sites.points()["number"]
    sites.far.until(lambda status: status["receiver"]["applied"] >= committed)
    view = drill(sites)
    sites.near.write(0, b"\0" * (8 * MIB))
    number = sites.points()["number"]
    sites.near.dmctl("point", "vol0", "--wait")
    sites.far.until(lambda status: status["receiver"]["applied"] > number)
    assert sites.image.read_bytes()[: 8 * MIB] == bytes(8 * MIB)
    return view, number


def test_a_file_system_in_a_view_is_sound_after_the_volume_has_lost_it(
    sites: Sites, tmp_path: Path
) -> None:
    need("nbdcopy", "mkfs.ext4", "e2fsck", "debugfs")
    view, _ = with_ext4(sites, tmp_path)
    found = copied(view, tmp_path / "found")
    run(["e2fsck", "-f", "-n", str(found)])
    for number in (0, 17, 39):
        run(["debugfs", "-R", f"dump file{number} {tmp_path}/dumped", str(found)])
        assert (tmp_path / "dumped").read_bytes() == bytes([number]) * 70_000


def test_a_view_can_be_mounted_and_written(sites: Sites, tmp_path: Path) -> None:
    """By the kernel, over a file of qemu's client; what it writes is in the view, in no image."""
    need("nbdcopy")
    need_filesystem("ext4")
    view, _ = with_ext4(sites, tmp_path)
    far = sites.far
    seen = Volume(far.folder, far.size_bytes)
    seen.socket = far.socket.with_name("vol0.view")
    shown = Shown(seen)
    try:
        with mounted(shown.path, tmp_path / "mounted", "ext4") as folder:
            assert (folder / "file17").read_bytes() == bytes([17]) * 70_000
            (folder / "file17").write_bytes(b"drill" * 20_000)
            (folder / "new").write_bytes(b"n" * 100_000)
    finally:
        shown.end()
    found = copied(view, tmp_path / "found")
    run(["e2fsck", "-f", "-n", str(found)])
    run(["debugfs", "-R", f"dump file17 {tmp_path}/dumped", str(found)])
    assert (tmp_path / "dumped").read_bytes() == b"drill" * 20_000
    far.dmctl("test-failover", "vol0", "--end")
    sites.near.stop()
    far.stop()
    assert sites.equal()


def test_a_view_that_is_full_ends_and_replication_goes_on(sites: Sites) -> None:
    sites.start()
    with sites.far.events() as events:
        view = drill(sites, "--view-limit", "64KiB")
        assert view["limit_bytes"] == 64 << 10
        writer = Writer(sites.near)
        writer.more(300)
        assert events.wait("view-full")["point"] == view["point"]
    last = writer.stop()
    sites.near.wait_in_sync()
    sites.far.until(lambda status: status["receiver"]["view"] is None)
    gone = subprocess.run(["nbdinfo", view["device"]], capture_output=True, check=False)
    assert gone.returncode
    sites.near.stop()
    sites.far.stop()
    assert newest(sites.image) == last


def test_what_a_view_cannot_be_had_of(sites: Sites, tmp_path: Path) -> None:
    sites.far.start()
    assert sites.far.refused("test-failover", "vol0")["code"] == "wrong-state"  # no point yet
    sites.near.start()
    sites.point(0)
    assert sites.near.refused("test-failover", "vol0")["code"] == "wrong-state"
    assert "point" in sites.far.refused("test-failover", "vol0", "--point", "4711")["message"]
    plain = sites.far.refused("test-failover", "vol0", "--listen", "nbd://127.0.0.1/vol0")
    assert plain["code"] == "usage"
    nowhere = sites.far.refused("test-failover", "vol0", "--overlay", "/proc/nowhere")
    assert nowhere["code"] in ("failed", "not-found", "permission")
    assert sites.far.status()["receiver"]["view"] is None
    sites.far.dmctl("test-failover", "vol0", "--end")  # nothing to do
    for option in (
        ("--overlay", str(tmp_path)),
        ("--listen", f"nbd+unix:///vol0?socket={tmp_path}/s"),
        ("--view-limit", "1MiB"),
        ("--point", "1"),
    ):
        assert sites.far.refused("test-failover", "vol0", "--end", *option)["code"] == "usage"
    view = drill(sites, "--overlay", str(tmp_path))
    assert sites.far.refused("test-failover", "vol0")["code"] == "busy"
    assert not list(tmp_path.iterdir())
    sites.far.kill()  # a drill outlives nothing
    sites.far.start()
    assert sites.far.status()["receiver"]["view"] is None
    assert drill(sites)["point"] >= view["point"]
    sites.far.stop()
