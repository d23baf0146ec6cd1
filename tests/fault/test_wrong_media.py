"""Wrong media are refused with a reason; unusual ones work, or are refused with a reason."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import rawnbd
from tests.support.loops import loop_device, run, sparse_file
from tests.support.nbdpeers import nbdkit, need
from tests.support.served import served_volume
from tests.support.volumes import KIB, MIB, Volume, make_file, noise

SIZE = 16 * MIB
TIB = 1 << 40
SKIP = ["--initial-sync", "skip", "--era-interval", "100ms"]


def end_equal(volume: Volume) -> None:
    volume.wait_in_sync()
    volume.stop()
    assert volume.recorded() == set()
    assert volume.differing() == set()


# -- not the right one --------------------------------------------------------------------


@pytest.mark.parametrize("other", ["smaller", "another file"])
def test_case_08_another_secondary_is_refused_at_the_start(short_path: Path, other: str) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        volume.create()
        volume.start()
        volume.ask("pause")
        volume.write(MIB, noise(1, MIB))
        volume.stop("--now")
        kept = volume.secondary.rename(short_path / "kept")
        foreign = noise(2, SIZE if other == "another file" else SIZE // 2)
        volume.secondary.write_bytes(foreign)
        error = volume.refused("start", volume.name)
        assert error["exit_status"] == 22
        assert str(volume.secondary) in error["message"]
        assert error["hint"]
        assert volume.secondary.read_bytes() == foreign, "not a byte may be written to it"
        assert not volume.socket.exists()
        kept.rename(volume.secondary)
        volume.start()
        volume.ask("resume")  # a pause lasts over a stop
        end_equal(volume)


def test_case_08_another_secondary_is_refused_while_running(short_path: Path) -> None:
    """The server comes back with another disk; the mirror waits for the right one."""
    backing = make_file(short_path / "far", SIZE)
    foreign = noise(2, SIZE // 2)
    (short_path / "foreign").write_bytes(foreign)
    served = short_path / "served"
    served.symlink_to(backing)
    with (
        nbdkit(short_path, "file", f"file={served}") as server,
        served_volume(short_path, SIZE, server, backing, SKIP) as volume,
    ):
        volume.create()
        volume.start()
        with volume.events() as events:
            server.kill()
            volume.write(0, noise(1, 2 * MIB))
            events.wait("link-down")
            served.unlink()
            served.symlink_to(short_path / "foreign")
            server.start()
            # The reason is told, not only that it is down.
            refused = events.wait("link-error")
            assert f"has {SIZE // 2} bytes" in refused["message"]
            assert volume.ask("status")["state"] == "link-down"
            volume.write(4 * MIB, noise(3, MIB))
            server.kill()
            assert (short_path / "foreign").read_bytes() == foreign
            served.unlink()
            served.symlink_to(backing)
            server.start()
            events.wait("link-up")
        end_equal(volume)


def test_case_08_another_primary_is_refused(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        volume.create()
        volume.start()
        volume.stop()
        kept = volume.primary.rename(short_path / "kept")
        make_file(volume.primary, SIZE)
        assert volume.refused("start", volume.name)["exit_status"] == 22
        volume.primary.unlink()
        assert volume.refused("start", volume.name)["exit_status"] == 10
        kept.rename(volume.primary)
        with kept.parent.joinpath("vol0.primary").open("r+b") as file:
            file.truncate(SIZE // 2)
        assert "shrunk" in volume.refused("start", volume.name)["message"]


def test_case_09_wrong_devices_are_refused_all_at_once(short_path: Path) -> None:
    """A mounted primary, a file system on the secondary, the record on the primary's disk."""
    for program in ("mkfs.ext4", "mount"):
        need(program)
    primary, secondary = (sparse_file(short_path / name, SIZE) for name in ("one", "two"))
    for image in (primary, secondary):
        run("mkfs.ext4", "-q", str(image))
    mounted = short_path / "mounted"
    mounted.mkdir()
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(primary))
        run("mount", device, str(mounted))
        stack.callback(run, "umount", str(mounted))
        twin = stack.enter_context(loop_device(primary, 512, "--offset", str(8 * MIB)))
        media = {"primary": device, "secondary": secondary, "record": twin}
        with Volume(short_path, SIZE, media=media) as volume:
            before = secondary.read_bytes()
            error = volume.refused(*volume.create_command())
            for reason in (
                f"mounted on {mounted}",
                "holds something: ext2/3/4 file system",
                "are the same medium",
            ):
                assert reason in error["message"], error["message"]
            # What is in use stays refused, whatever is said.
            error = volume.refused(*volume.create_command("--force"))
            assert f"mounted on {mounted}" in error["message"]
            assert "holds something" not in error["message"]
            assert secondary.read_bytes() == before
            assert volume.dmctl("--json", "status").find('"volumes": []') > 0


def test_case_09_what_is_found_needs_force(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=["--initial-sync", "full"]) as volume:
        volume.make_media()
        need("mkfs.ext4")
        run("mkfs.ext4", "-q", str(volume.secondary))
        before = volume.secondary.read_bytes()
        error = volume.refused(*volume.create_command())
        assert error["exit_status"] == 11
        assert "--force" in error["hint"] + error["message"]
        assert volume.secondary.read_bytes() == before
        volume.create("--force")
        volume.start()
        end_equal(volume)
        assert volume.secondary.read_bytes() == bytes(SIZE)


def test_case_09_the_primary_keeps_its_file_system(short_path: Path) -> None:
    """Mirroring what there is must not need force, and must not touch it."""
    need("mkfs.ext4")
    with Volume(short_path, SIZE, options=["--initial-sync", "full"]) as volume:
        volume.make_media()
        run("mkfs.ext4", "-q", "-d", str(Path(__file__).parent), str(volume.primary))
        before = volume.primary.read_bytes()
        volume.create()
        volume.start()
        end_equal(volume)
        assert volume.primary.read_bytes() == before


# -- unusual kinds ------------------------------------------------------------------------


@pytest.mark.parametrize("sectors", [*itertools.product((512, 4096), repeat=3)], ids=str)
def test_case_39_sectors_of_4096_bytes(short_path: Path, sectors: tuple[int, int, int]) -> None:
    """Primary, secondary and record in every combination; the last extent and block are odd."""
    size = 5 * MIB + 3 * 64 * KIB + 4096
    with ExitStack() as stack:
        media = {}
        for role, sector in zip(("primary", "secondary", "record"), sectors, strict=True):
            length = 2 * MIB if role == "record" else size
            backing = sparse_file(short_path / f"{role}.file", length)
            media[role] = stack.enter_context(loop_device(backing, sector))
        volume = stack.enter_context(Volume(short_path, size, options=SKIP, media=media))
        volume.create()
        volume.start()
        with volume.host() as host:
            assert host.size_bytes == size
            host.call(rawnbd.WRITE, size - 4096, 4096, noise(1, 4096), rawnbd.FUA)
            host.call(rawnbd.WRITE, 2 * MIB - 4096, 8192, noise(2, 8192))
            host.call(rawnbd.WRITE_ZEROES, size - 8192, 4096)
            if sectors[0] == 4096:
                with pytest.raises(OSError, match="failed"):
                    host.call(rawnbd.WRITE, 512, 512, bytes(512))
            else:
                host.call(rawnbd.WRITE, size - 512, 512, noise(3, 512))
            host.disconnect()
        volume.kill()
        assert volume.differing() <= volume.recorded()
        volume.start()
        end_equal(volume)


def test_case_39_a_primary_of_odd_size(short_path: Path) -> None:
    """A multiple of 512 that is none of 4096, on a secondary that can only write 4096."""
    size = 5 * MIB + 512
    far = sparse_file(short_path / "far", 6 * MIB)
    with loop_device(far, 4096) as device:
        media = {"secondary": device}
        with Volume(short_path, size, options=SKIP, media=media) as volume:
            volume.make_media()
            error = volume.refused(*volume.create_command())
            assert error["exit_status"] == 2
            assert "no multiple of the secondary's blocks" in error["message"]
    with Volume(short_path, size, options=SKIP) as volume:
        volume.create()
        volume.start()
        volume.write(5 * MIB, noise(1, 512))
        end_equal(volume)
        assert volume.secondary.read_bytes()[-512:] == noise(1, 512)


def test_case_39_more_than_16_tib(short_path: Path) -> None:
    """Sparse files on XFS, because an ext4 file ends at 16 TiB."""
    need("mkfs.xfs")
    size = 17 * TIB + 3 * MIB
    image = sparse_file(short_path / "xfs", 1 << 30)
    run("mkfs.xfs", "-q", str(image))
    media = short_path / "media"
    media.mkdir()
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(image))
        try:
            run("mount", device, str(media))
        except RuntimeError as error:
            pytest.skip(f"NEEDS XFS: a volume of more than 16 TiB was NOT tested: {error}")
        stack.callback(run, "umount", "-l", str(media))
        volume = stack.enter_context(Volume(short_path, size, options=SKIP, media_folder=media))
        volume.create()
        volume.start()
        places = [0, 16 * TIB - 64 * KIB, 16 * TIB, size - 64 * KIB]
        for number, place in enumerate(places):
            volume.write(place, noise(number, 64 * KIB))
        volume.kill()
        recorded = volume.recorded()
        assert {place // MIB for place in places} <= recorded
        assert len(recorded) < 300
        volume.start()
        with volume.events() as events:
            recovery = events.wait("recovery-finished")
        assert recovery["bytes_total"] == len(recorded) * MIB
        volume.wait_in_sync()
        volume.stop()
        assert volume.recorded() == set()
        with volume.secondary.open("rb") as file:
            for number, place in enumerate(places):
                file.seek(place)
                assert file.read(64 * KIB) == noise(number, 64 * KIB)


@pytest.mark.parametrize("when", ["at create", "at start"])
def test_case_39_a_read_only_primary_is_refused(short_path: Path, when: str) -> None:
    backing = sparse_file(short_path / "backing", SIZE)
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(backing))
        volume = Volume(short_path, SIZE, options=SKIP, media={"primary": device})
        stack.enter_context(volume)
        volume.make_media()
        if when == "at start":
            volume.create()
        # The flag would outlive the loop device's attachment.
        stack.callback(run, "blockdev", "--setrw", device)
        run("blockdev", "--setro", device)
        if when == "at create":
            error = volume.refused(*volume.create_command())
            assert f"primary {device} cannot be written" in error["message"]
        else:
            error = volume.refused("start", volume.name)
            assert f"{device} is read-only" in error["message"]
        assert error["exit_status"] == 30
        run("blockdev", "--setrw", device)
        if when == "at create":
            volume.create()
        volume.start()
        end_equal(volume)
