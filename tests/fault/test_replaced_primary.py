"""A primary that is not the one it was: what is refused, what is said, and the way back.

The commands of the chapter "The primary was replaced" in docs/recovery.md are run as they stand.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.volumes import DMCTL, MIB, Volume, make_file, noise

SIZE = 16 * MIB
SKIP = ["--initial-sync", "skip", "--era-interval", "100ms"]
RECOVERY = Path(__file__).parents[2] / "docs" / "recovery.md"


def chapter_commands(volume: Volume) -> str:
    """The chapter's commands with this volume's names put in."""
    text = RECOVERY.read_text()
    found = re.search(r"^## The primary was replaced\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    (block,) = re.findall(r"^```sh\n(.*?)^```", found[1], re.MULTILINE | re.DOTALL)
    for word, value in {
        "PRIMARY": volume.primary,
        "SECONDARY": volume.secondary,
        "RECORD": volume.record,
        "SIZE": volume.size_bytes,
        "NAME": volume.name,
    }.items():
        block = re.sub(rf"\b{word}\b", str(value), block)
    return block


def follow(volume: Volume) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{DMCTL.parent}:{os.environ['PATH']}",
        "DMCTL_CONFIG_DIR": str(volume.folder / "etc"),
        "DMCTL_RUN_DIR": str(volume.folder / "run"),
    }
    return subprocess.run(
        ["sh", "-ec", chapter_commands(volume)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def in_use(volume: Volume) -> bytes:
    """A volume that was written and stopped; what hosts wrote."""
    volume.create()
    volume.start()
    content = noise(1, 3 * MIB)
    volume.write(4 * MIB, content)
    volume.wait_in_sync()
    volume.stop()
    return content


@pytest.mark.parametrize("how", ["another disk", "overwritten in place"])
@pytest.mark.parametrize("ending", ["clean", "killed"])
def test_the_chapter_brings_the_data_back(short_path: Path, how: str, ending: str) -> None:
    if (how, ending) == ("overwritten in place", "killed"):
        pytest.skip("after a crash nothing tells a primary that was overwritten in place")
    with Volume(short_path, SIZE, options=SKIP) as volume:
        content = in_use(volume)
        if ending == "killed":
            volume.start()
            volume.write(4 * MIB, content)
            volume.wait_in_sync()
            volume.kill()
        if how == "another disk":
            volume.primary.rename(short_path / "old")
            make_file(volume.primary, SIZE)
        else:
            with volume.primary.open("r+b") as file:
                file.write(bytes(SIZE))
        error = volume.refused("start", volume.name)
        assert error["exit_status"] == 22
        assert f"secondary {volume.secondary} was in sync with it at 20" in error["message"]
        assert "'The primary was replaced'" in error["hint"]
        assert "create" not in error["hint"], "what would overwrite the last good copy"
        done = follow(volume)
        assert done.returncode == 0, done.stderr
        assert volume.read(4 * MIB, 3 * MIB) == content
        volume.stop()
        assert volume.recorded() == set()
        assert volume.differing() == set()


def test_creating_the_volume_anew_asks_before_it_overwrites_the_last_good_copy(
    short_path: Path,
) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        in_use(volume)
        good = volume.secondary.read_bytes()
        volume.primary.rename(short_path / "old")
        make_file(volume.primary, SIZE)
        volume.dmctl("remove", volume.name, "--yes", "--wipe-record")
        for mode in ("full", "checksum"):
            again = volume.create_command("--force")
            again[again.index("skip")] = mode
            error = volume.refused(*again)
            assert "may overwrite the last good copy" in error["message"]
            assert f"{volume.secondary} was, at 20" in error["message"]
            assert f"in sync with {volume.primary}, volume 'vol0'" in error["message"]
            assert error["hint"] == "add --yes to do it"
            assert volume.secondary.read_bytes() == good
            assert volume.refused("status", volume.name)["exit_status"] == 10
        volume.dmctl(*again, "--yes")
        volume.start()
        volume.wait_in_sync()
        volume.stop()
        assert volume.secondary.read_bytes() == bytes(SIZE), "it was asked for"


def test_the_other_way_round_is_asked_for_too(short_path: Path) -> None:
    """Old primary as the new secondary, of a new primary that has nothing to do with it."""
    with Volume(short_path, SIZE, options=SKIP) as volume:
        in_use(volume)
        volume.dmctl("remove", volume.name, "--yes", "--wipe-record")
        make_file(short_path / "blank", SIZE)
        other = Volume(
            short_path,
            SIZE,
            name="vol1",
            media={"primary": short_path / "blank", "secondary": volume.primary},
        )
        other.make_media()
        assert "last good copy" in other.refused(*other.create_command("--force"))["message"]
        other.media["primary"] = volume.secondary
        other = Volume(short_path, SIZE, name="vol1", media=other.media)
        assert "--yes" not in other.create_command()
        other.create()


def test_the_same_two_sides_need_no_question(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        in_use(volume)
        volume.dmctl("remove", volume.name, "--yes", "--wipe-record")
        volume.create()
        volume.start()
        volume.wait_in_sync()


def test_without_a_note_of_this_host_the_record_knows(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        in_use(volume)
        volume.dmctl("remove", volume.name, "--yes")
        for note in (short_path / "etc" / "state").iterdir():
            note.unlink()
        volume.primary.unlink()
        make_file(volume.primary, SIZE)
        again = volume.create_command("--force")
        again[again.index("skip")] = "full"
        assert "last good copy" in volume.refused(*again)["message"]


@pytest.mark.parametrize("by", ["configuration", "names of the media"])
def test_sides_that_have_changed_places_are_named(short_path: Path, by: str) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        in_use(volume)
        file = short_path / "etc" / "volumes" / "vol0.toml"
        one, other = str(volume.primary), str(volume.secondary)
        swap = {one: other, other: one}
        right = file.read_text()
        wrong = re.sub("|".join(map(re.escape, swap)), lambda found: swap[found[0]], right)
        if by == "configuration":
            file.write_text(wrong)
        else:
            spare = short_path / "spare"
            volume.primary.rename(spare)
            volume.secondary.rename(volume.primary)
            spare.rename(volume.secondary)
        error = volume.refused("start", volume.name)
        assert error["exit_status"] == 22
        assert "have changed places" in error["message"]
        assert f"exchange 'primary' and 'secondary' in {file}" in error["hint"]
        file.write_text(right if by == "configuration" else wrong)
        volume.start()
        volume.wait_in_sync()
        volume.stop()
        assert volume.differing() == set()


def test_a_primary_that_is_the_secondary_is_named(short_path: Path) -> None:
    """The other side is not there."""
    with Volume(short_path, SIZE, options=SKIP) as volume:
        in_use(volume)
        volume.secondary.replace(volume.primary)
        error = volume.refused("start", volume.name)
        assert "which the record knows as the volume's secondary" in error["message"]
        assert "nothing was written" in error["hint"]


def test_resync_all_of_a_replaced_primary_leaves_the_record_alone(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        in_use(volume)
        volume.primary.unlink()
        make_file(volume.primary, SIZE)
        before = volume.record.read_bytes()
        assert volume.refused("start", volume.name, "--resync-all")["exit_status"] == 22
        assert volume.record.read_bytes() == before
