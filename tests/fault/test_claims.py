"""Media that two volumes, or two processes for one node, would write, and the programs that an
administrator runs.  Which claims admit one another is told in tests/unit/media/test_claims.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

import pytest

from bitmapd.media.claims import Claim
from tests.support.claimant import answer, claimant
from tests.support.loops import loop_device, sparse_file
from tests.support.pairs import Pair
from tests.support.volumes import MIB, Volume, noise

SIZE = 16 * MIB
STRANGER = UUID("c0de0000-0000-4000-8000-000000000002")


@pytest.fixture(params=["files", "block devices"])
def pair(request: pytest.FixtureRequest, short_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        media = None
        if request.param == "block devices":
            one, two = (
                Path(stack.enter_context(loop_device(sparse_file(short_path / name, SIZE))))
                for name in ("one", "two")
            )
            media = one, two
        yield stack.enter_context(Pair(short_path, SIZE, media=media))


def volume_of(home: Path, media: dict[str, Path | str], *options: str) -> Volume:
    """With a configuration of its own, which knows of no other volume."""
    home.mkdir()
    volume = Volume(home, SIZE, options=list(options), media=media)
    volume.make_media()
    return volume


@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("kind", ["file", "block device"])
def test_a_medium_that_another_volume_serves_is_busy(
    short_path: Path, role: str, kind: str
) -> None:
    with ExitStack() as stack:
        medium = sparse_file(short_path / "medium", SIZE)
        if kind == "block device":
            medium = Path(stack.enter_context(loop_device(medium)))
        one, two, late = (
            stack.enter_context(volume_of(short_path / name, {role: medium}))
            for name in ("one", "two", "late")
        )
        for volume in (one, two):
            volume.dmctl(*volume.create_command("--force"))
        one.start()
        one.wait_in_sync()
        errors = [late.refused(*late.create_command("--force"))]
        if role == "primary":
            errors.append(two.refused("start", "vol0"))
        else:  # hosts are served without it
            two.start()
            assert two.status()["state"] == "link-down"
            said = two.dmctl("events", "vol0", "--now")
            assert f"{medium} is in use by a volume" in said
        for error in errors:
            assert error["exit_status"] == 12, error
            assert f"{medium} is in use by a volume" in error["message"]
            assert f"fuser -v {medium}" in error["hint"]
        one.kill()
        if role == "primary":
            two.start()
        two.wait_in_sync()


def test_a_pair_admits_its_two_nodes_and_nobody_else(pair: Pair) -> None:
    pair.create()
    stranger = volume_of(pair.folder / "other", {"primary": pair.primary})
    pair[1].start()
    error = stranger.refused(*stranger.create_command("--force"))
    assert error["exit_status"] == 12
    assert f"{pair.primary} is in use by node 1 of a pair" in error["message"]
    pair[2].start()
    for node in (1, 2):
        pair.until(node, "paired")
    error = stranger.refused(*stranger.create_command("--force"))
    assert "is in use by nodes 1 and 2 of a pair" in error["message"]
    for dead in (1, 2):
        pair[dead].write(0, noise(dead, MIB))
        pair[dead].kill()
        pair.until(3 - dead, "cut")
        for medium in (pair.primary, pair.secondary):
            with claimant(str(medium), Claim(dead, STRANGER)) as process:
                assert answer(process) == f"{medium} is in use by node {3 - dead} of a pair"
        pair[dead].start()
        for node in (1, 2):
            pair.until(node, "paired")
    for node in (1, 2):
        pair[node].wait_in_sync()
    assert pair.equal()
    for node in (1, 2):
        pair[node].stop()
    with claimant(str(pair.primary), Claim()) as process:
        assert answer(process) == "up"


def test_node_2_is_created_while_node_1_serves_and_node_1_is_not_created_again(
    pair: Pair,
) -> None:
    pair[1].dmctl(*pair[1].create_command())
    pair[1].start()
    pair[2].dmctl(*pair[2].create_command("--force"))
    media: dict[str, Path | str] = {"primary": pair.primary, "secondary": pair.secondary}
    again = volume_of(pair.folder / "again", media, *pair[1].options)
    error = again.refused(*again.create_command("--force"))
    assert error["exit_status"] == 12
    assert f"{pair.primary} is in use by node 1 of a pair" in error["message"]
    pair[2].start()
    for node in (1, 2):
        pair.until(node, "paired")


def test_nobody_mounts_the_block_device_of_a_pair(pair: Pair) -> None:
    """Whichever node came first keeps others off; the second does without."""
    if not pair.primary.is_block_device():
        pytest.skip("nobody mounts a file")
    pair.create()
    pair.start()
    for node in (2, 1, 2):
        for medium in (pair.primary, pair.secondary):
            with pytest.raises(OSError, match="busy"):
                os.open(medium, os.O_RDONLY | os.O_EXCL)  # as mount(2) does
        pair[node].kill()
        pair[node].start()
        pair.until(node, "paired")
