"""file_identity: what a file keeps over a mount, and what tells it from one that looks like it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitmapd.media.file_identity import same_identity
from bitmapd.media.identity import identify
from tests.support.loops import loop_device, run, sparse_file

MIB = 1 << 20
KINDS = {
    "ext4": (["-q"], 32 * MIB),
    "ext4 without times of birth": (["-q", "-I", "128"], 32 * MIB),
    "xfs": (["-q"], 320 * MIB),
    "btrfs": (["-q"], 128 * MIB),
}


def make(image: Path, kind: str) -> None:
    options, size_bytes = KINDS[kind]
    sparse_file(image, size_bytes)
    try:
        run(f"mkfs.{kind.split(maxsplit=1)[0]}", *options, str(image))
    except (RuntimeError, FileNotFoundError) as error:
        pytest.skip(f"NEEDS mkfs of {kind}: {error}")


@contextmanager
def mounted(image: Path) -> Iterator[Path]:
    where = image.with_suffix(".mounted")
    where.mkdir(exist_ok=True)
    with loop_device(image) as device:
        try:
            run("mount", device, str(where))
        except RuntimeError as error:
            pytest.skip(f"NEEDS a kernel that mounts {image}: {error}")
        try:
            yield where
        finally:
            run("umount", str(where))


def text_of(image: Path, name: str = "file") -> str:
    with mounted(image) as folder:
        path = folder / name
        if not path.exists():
            path.write_bytes(b"x")
        return identify(path).text


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_file_of_two_file_systems(tmp_path: Path, kind: str) -> None:
    """It has the same inode number in both; without a time of birth, that was all there was."""
    texts = []
    for name in ("one", "two"):
        make(tmp_path / name, kind)
        texts.append(text_of(tmp_path / name))
        assert texts[-1] == text_of(tmp_path / name), "it stays over a mount"
    assert texts[0].split("+")[0].split("@")[0] == texts[1].split("+")[0].split("@")[0]
    assert not same_identity(*texts)


def test_a_file_of_a_file_system_that_was_cloned_and_named_anew(tmp_path: Path) -> None:
    make(tmp_path / "one", "ext4")
    before = text_of(tmp_path / "one")
    clone = tmp_path / "two"
    clone.write_bytes((tmp_path / "one").read_bytes())
    run("e2fsck", "-fy", str(clone))
    run("tune2fs", "-U", "random", str(clone))
    assert not same_identity(before, text_of(clone))


def test_a_file_in_a_snapshot(tmp_path: Path) -> None:
    make(tmp_path / "image", "btrfs")
    with mounted(tmp_path / "image") as folder:
        run("btrfs", "subvolume", "create", str(folder / "now"))
        (folder / "now" / "file").write_bytes(b"x")
        run("btrfs", "subvolume", "snapshot", str(folder / "now"), str(folder / "then"))
        now, then = (identify(folder / name / "file").text for name in ("now", "then"))
    assert now.split("+fs=")[0] == then.split("+fs=")[0]
    assert not same_identity(now, then)


def test_a_file_that_cannot_be_opened_is_known_by_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    whole = identify(path).text

    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    less = identify(path).text
    assert "+" not in less
    assert same_identity(whole, less)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("file:1@2", "file:1@2", True),
        ("file:1@2", "file:1@3", False),
        ("file:1", "file:2", False),
        ("file:1", "file:1@2", False),
        # Records from before the parts were known, and kernels that offer fewer of them.
        ("file:1@2+gen=a+fs=b", "file:1@2", True),
        ("file:1@2", "file:1@2+gen=a", True),
        ("file:1@2+fs=b", "file:1@2+gen=a", True),
        ("file:1@2+gen=a+fs=b", "file:1@2+gen=a+fs=c", False),
        ("file:1@2+gen=a+fs=b", "file:1@2+gen=c", False),
        ("loop:file:1@2+gen=a+fs=b+0", "loop:file:1@2+0", True),
        ("loop:file:1@2+gen=a+0", "loop:file:1@2+gen=a+4096", False),
        ("loop:file:1@2+gen=a+0-part1", "loop:file:1@2+0-part1", True),
        ("loop:file:1@2+gen=a+0-part1", "loop:file:1@2+gen=b+0-part1", False),
        ("dm:LVM-x+gen=a", "dm:LVM-x", False),
        ("wwid:a", "wwid:a", True),
    ],
)
def test_what_only_one_text_says_is_not_compared(one: str, other: str, same: bool) -> None:
    assert same_identity(one, other) is same
    assert same_identity(other, one) is same
