"""A volume with a receiver grows: both sides, and what a point of before is worth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import rawnbd
from tests.support.loops import loop_device, run
from tests.support.sites import Sites, Writer, newest
from tests.support.volumes import MIB, make_file

pytestmark = pytest.mark.timeout(180)

SIZE = 64 * MIB + 512
LARGER = 96 * MIB


@pytest.fixture
def sites(short_path: Path) -> Iterator[Sites]:
    with Sites(short_path, SIZE) as made:
        made.create()
        yield made


def write_at(sites: Sites, offset_bytes: int, data: bytes) -> None:
    with sites.near.host() as host:
        host.call(rawnbd.WRITE, offset_bytes, len(data), data)


def test_both_sides_grow_under_load_and_points_go_on(sites: Sites) -> None:
    sites.start()
    writer = Writer(sites.near)
    writer.more(100)
    os.truncate(sites.near.primary, LARGER)
    sites.near.dmctl("resize", "vol0")
    assert sites.near.status()["size_bytes"] == LARGER
    assert sites.image.stat().st_size == LARGER
    writer.more(100)
    number = writer.stop()
    write_at(sites, LARGER - 512, b"\7" * 512)
    sites.near.wait_in_sync()
    assert sites.far.status()["size_bytes"] == LARGER
    sites.near.kill()
    sites.far.dmctl("promote", "vol0")
    assert sites.far.status()["size_bytes"] == LARGER
    sites.far.stop()
    assert sites.equal()
    assert newest(sites.image) == number


def test_a_point_of_before_has_the_size_of_before_and_both_sites_go_on_with_it(
    sites: Sites,
) -> None:
    """The old primary, which has the larger size, follows; then both grow again."""
    sites.start()
    write_at(sites, SIZE - 512, b"\1" * 512)
    sites.near.wait_in_sync()
    sites.near.dmctl("pause", "vol0")
    os.truncate(sites.near.primary, LARGER)
    sites.near.dmctl("resize", "vol0")
    write_at(sites, LARGER - 512, b"\2" * 512)
    sites.near.kill()
    sites.far.dmctl("promote", "vol0")
    assert sites.far.status()["size_bytes"] == SIZE
    away = sites.far.refused("resize", "vol0")
    assert away["code"] == "unreachable"
    assert "take up the larger size first" in away["message"]

    sites.near.dmctl("failback", "vol0", "--journal", str(sites.near_journal), "--yes")
    sites.far.wait_in_sync()
    assert sites.near.primary.read_bytes()[:SIZE] == sites.image.read_bytes()[:SIZE]
    sites.far.dmctl("resize", "vol0")
    assert sites.far.status()["size_bytes"] == LARGER
    sites.far.wait_in_sync()
    sites.far.stop()
    sites.near.stop()
    assert sites.equal()


def test_a_device_that_is_too_small_is_named_and_enlarged_first(short_path: Path) -> None:
    with Sites(short_path, SIZE) as sites:
        backing = make_file(short_path / "backing", 65 * MIB)
        with loop_device(backing) as device:
            sites.image = Path(device)
            sites.far.dmctl(
                "receive", "vol0", "--image", device, "--journal", str(sites.journal),
                "--listen", sites.listen,
            )  # fmt: skip
            sites.near.create()
            sites.start()
            os.truncate(sites.near.primary, LARGER)
            refused = sites.near.refused("resize", "vol0")
            assert refused["code"] == "no-space"
            assert f"the image has {65 * MIB} bytes, the volume {LARGER}" in refused["message"]
            assert sites.near.status()["size_bytes"] == SIZE
            number = sites.points()["number"]
            write_at(sites, 0, b"\3" * 512)
            sites.point(number)

            os.truncate(backing, LARGER)
            run("losetup", "--set-capacity", device)
            sites.near.dmctl("resize", "vol0")
            assert sites.near.status()["size_bytes"] == LARGER
            sites.near.wait_in_sync()
            sites.near.stop()
            sites.far.stop()
            assert sites.equal()
