"""A file that was deleted, moved or replaced while the volume uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.volumes import MIB, Volume, make_file, noise

SIZE = 16 * MIB
SKIP = ["--initial-sync", "skip", "--era-interval", "100ms"]


@pytest.mark.parametrize("role", ["primary", "secondary", "record"])
@pytest.mark.parametrize("how", ["moved", "replaced"])
def test_a_file_that_was_moved_is_told_of_until_it_is_back(
    short_path: Path, role: str, how: str
) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        volume.create()
        volume.start()
        volume.write(0, noise(1, MIB))
        volume.wait_in_sync()
        medium: Path = getattr(volume, role)
        kept = medium.rename(short_path / "kept")
        if how == "replaced":
            make_file(medium, SIZE)
        with volume.events() as events:
            gone = events.wait("medium-gone")
            assert gone["device"] == str(medium)
            assert ("another file" in gone["message"]) == (how == "replaced")
            status = volume.ask("status")
            assert status["state"] == "degraded"
            assert status["last_error"]["code"] == "medium-gone"
            assert volume.dmctl_process("status", volume.name, "--check").returncode == 100
            kept.replace(medium)
            assert events.wait("medium-back")["device"] == str(medium)
        volume.wait_in_sync()
        assert volume.ask("status")["state"] == "in-sync"
        volume.stop()
        assert volume.differing() == set()


def test_a_secondary_that_was_deleted_is_told_of(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        volume.create()
        volume.start()
        volume.secondary.unlink()
        with volume.events() as events:
            assert "was deleted" in events.wait("medium-gone")["message"]
        assert volume.ask("status")["state"] == "degraded"
        volume.stop("--now")


def test_a_link_to_the_file_is_its_name_too(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        volume.create()
        volume.start()
        with volume.events() as events:
            volume.secondary.rename(short_path / "elsewhere")
            events.wait("medium-gone")
            volume.secondary.symlink_to(short_path / "elsewhere")
            events.wait("medium-back")
        assert len([e for e in events.seen if e["event"] == "medium-gone"]) == 1
        volume.stop()
