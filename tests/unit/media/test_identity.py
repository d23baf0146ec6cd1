"""What a path leads to: files, loop devices with partitions, exports, and what is on them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import BitmapdError, NotFoundError, UsageError
from bitmapd.media import identity
from bitmapd.media.identity import identify, in_use, known_signature, same_medium, signature
from tests.support.loops import loop_device, run, sparse_file

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sparse_file(tmp_path / "file", 8 * MIB)


def partitioned(path: Path) -> Path:
    """An MBR with two partitions: 1 MiB from 1 MiB on, and the 2 MiB behind it."""
    table = bytearray(512)
    for entry, (start, count) in enumerate(((2048, 2048), (4096, 4096))):
        at = 446 + 16 * entry
        table[at + 4] = 0x83
        table[at + 8 : at + 16] = start.to_bytes(4, "little") + count.to_bytes(4, "little")
    table[510:] = b"\x55\xaa"
    with open(path, "r+b") as image:
        image.write(table)
    return path


@pytest.fixture
def disk(file: Path) -> Iterator[str]:
    """A loop device with two partitions, added by hand where the kernel does not read the table;
    their nodes are made here where nothing else makes them."""
    made: list[str] = []
    with loop_device(partitioned(file), 512, "--partscan") as name:
        try:
            for number, (start, count) in enumerate(((2048, 2048), (4096, 4096)), 1):
                node = f"{name}p{number}"
                device = Path("/sys/class/block") / Path(node).name / "dev"
                if not device.exists():
                    run("addpart", name, str(number), str(start), str(count))
                if not os.path.exists(node):
                    major, minor = (int(part) for part in device.read_text().split(":"))
                    os.mknod(node, 0o60600, os.makedev(major, minor))
                    made.append(node)
        except (RuntimeError, FileNotFoundError, PermissionError) as error:
            pytest.skip(f"NEEDS partitions of loop devices: {error}")
        try:
            yield name
        finally:
            run("partx", "--delete", name)
            for node in made:
                os.unlink(node)


# -- identities ---------------------------------------------------------------------------------


def test_a_file_keeps_its_identity_until_it_is_replaced(file: Path, tmp_path: Path) -> None:
    before = identify(file)
    assert (before.kind, before.size_bytes, before.stable) == ("file", 8 * MIB, True)
    assert not before.read_only
    (tmp_path / "elsewhere").mkdir()
    moved = file.rename(tmp_path / "elsewhere" / "new-name")
    moved.write_bytes(b"other content")
    assert identify(moved).text == before.text
    (tmp_path / "link").symlink_to(moved)
    assert identify(tmp_path / "link").text == before.text
    copy = Path(shutil.copy2(moved, tmp_path / "copy"))
    assert identify(copy).text != before.text
    copy.replace(moved)
    assert identify(moved).text != before.text


def test_a_reused_inode_is_another_file(tmp_path: Path) -> None:
    """The time of birth tells apart what the inode's number does not."""
    seen = set()
    for _ in range(3):
        path = sparse_file(tmp_path / "file", 0)
        seen.add(identify(path).text)
        path.unlink()
    if "@" not in next(iter(seen)):
        pytest.skip("NEEDS a file system that keeps times of birth")
    assert len(seen) == 3


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_a_loop_device_is_known_by_its_file(file: Path, sector_bytes: int) -> None:
    with loop_device(file, sector_bytes) as name:
        found = identify(name)
        assert (found.kind, found.size_bytes) == ("block", 8 * MIB)
        assert found.logical_block_bytes == sector_bytes
        assert found.physical_block_bytes is not None
        assert found.physical_block_bytes >= sector_bytes
        assert found.text == f"loop:{identify(file).text}+0"
        assert found.stable
        assert not found.read_only
    with loop_device(file, 512, "--offset", "4096", "--read-only") as name:
        again = identify(name)
        assert again.text == f"loop:{identify(file).text}+4096"
        assert again.size_bytes == 8 * MIB - 4096
        assert again.read_only


def test_a_loop_device_whose_file_is_gone_is_unstable(file: Path) -> None:
    with loop_device(file) as name:
        file.unlink()
        found = identify(name)
        assert not found.stable
        assert found.text.startswith(f"loop:{file}")


def test_partitions_are_parts_of_their_disk(disk: str) -> None:
    whole, first, second = (identify(name) for name in (disk, f"{disk}p1", f"{disk}p2"))
    assert first.text == f"{whole.text}-part1"
    assert second.text == f"{whole.text}-part2"
    assert (first.size_bytes, second.size_bytes) == (MIB, 2 * MIB)
    assert first.logical_block_bytes == 512


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("nbd://Backup.Example.net/vol0", "nbd:backup.example.net:10809/vol0"),
        ("nbds://backup.example.net:10809/vol0", "nbd:backup.example.net:10809/vol0"),
        ("nbd://[::1]:7/a%20b", "nbd:::1:7/a b"),
        ("nbd+unix:///vol0?socket=/run/a.sock", "nbd+unix:/run/a.sock/vol0"),
        ("nbds+unix:///vol0?socket=/run/a.sock", "nbd+unix:/run/a.sock/vol0"),
    ],
)
def test_an_export_is_known_by_where_it_is(uri: str, text: str) -> None:
    found = identify(uri)
    assert (found.kind, found.text, found.size_bytes) == ("nbd", text, None)
    assert found.logical_block_bytes is None


@given(st.text(st.characters(min_codepoint=0x21, exclude_categories=["Cs", "Cc"]), max_size=1200))
def test_every_identity_fits_into_a_superblock(name: str) -> None:
    text = identity._fitted(f"id:{name}")
    assert len(text.encode()) <= 255
    assert text == identity._fitted(f"id:{name}")
    if len(name.encode()) > 252:
        assert text.startswith("id:sha256=")
        assert text != identity._fitted(f"id:{name}x")


def test_every_block_device_of_the_machine_has_an_identity() -> None:
    """Whatever is there, the rules apply to it; names are the last resort."""
    nodes = sorted(Path("/sys/class/block").iterdir())
    if not nodes:
        pytest.skip("NEEDS a block device")
    for node in nodes:
        text, stable = identity._block_text(node.resolve())
        assert ":" in text
        assert stable or text.startswith(("name:", "loop:")), text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"dm/uuid": "LVM-abc", "wwid": "naa.1"}, ("dm:LVM-abc", True)),
        ({"md/uuid": "0123"}, ("md:0123", True)),
        ({"wwid": "naa.5000c5"}, ("wwid:naa.5000c5", True)),
        ({"device/wwid": "t10.ATA   a  b"}, ("wwid:t10.ATA a b", True)),
        ({"serial": "disk-7\0\0"}, ("serial:disk-7", True)),
        ({"device/serial": "S3"}, ("serial:S3", True)),
        ({"wwid": "\n"}, ("name:sdz", False)),
    ],
)
def test_the_driver_is_asked_first(
    files: dict[str, str], expected: tuple[str, bool], tmp_path: Path
) -> None:
    """A sysfs folder as the kernel lays it out, for drivers that this machine does not have."""
    node = tmp_path / "sdz"
    node.mkdir()
    for name, content in files.items():
        (node / name).parent.mkdir(exist_ok=True)
        (node / name).write_text(content)
    assert identity._block_text(node) == expected
    part = node / "sdz3"
    part.mkdir()
    (part / "partition").write_text("3\n")
    assert identity._block_text(part) == (f"{expected[0]}-part3", expected[1])


def test_what_is_no_medium_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="missing does not exist"):
        identify(tmp_path / "missing")
    with pytest.raises(NotFoundError):
        in_use(tmp_path / "missing" / "below")
    with pytest.raises(UsageError, match="neither a block device nor a regular file"):
        identify(tmp_path)
    with pytest.raises(UsageError, match="neither"):
        signature("/dev/null")
    with pytest.raises(UsageError, match="not a usable path"):
        identify("a\0b")
    with pytest.raises(UsageError, match="bad NBD URI"):
        identify("nbd://")


def test_a_stale_device_node_is_named(tmp_path: Path) -> None:
    node = tmp_path / "stale"
    try:
        os.mknod(node, 0o60600, os.makedev(240, 77))
    except PermissionError:
        pytest.skip("NEEDS root to make a device node")
    with pytest.raises(NotFoundError, match="knows no block device 240:77"):
        identify(node)


# -- who uses it --------------------------------------------------------------------------------


def test_an_idle_medium_is_in_nobodys_use(file: Path) -> None:
    assert in_use(file) is None
    with loop_device(file) as name:
        assert in_use(name) is None
        assert in_use(file) == f"attached to {name}"
    assert in_use(file) is None


def test_an_exclusive_user_is_noticed(file: Path) -> None:
    with loop_device(file) as name:
        fd = os.open(name, os.O_RDONLY | os.O_EXCL)
        try:
            assert in_use(name) == "opened exclusively by another program"
        finally:
            os.close(fd)
        assert in_use(name) is None


@pytest.fixture
def mounted(disk: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A disk whose second partition is mounted at a place with blanks in its name."""
    where = tmp_path / "a mount point"
    where.mkdir()
    try:
        run("mkfs.ext4", "-q", f"{disk}p2")
        run("mount", f"{disk}p2", str(where))
    except (RuntimeError, FileNotFoundError) as error:
        pytest.skip(f"NEEDS mkfs.ext4 and mount: {error}")
    try:
        yield disk, where
    finally:
        run("umount", str(where))


def test_a_mounted_partition_is_in_use_and_so_is_its_disk(mounted: tuple[str, Path]) -> None:
    name, where = mounted
    part = Path(name).name + "p2"
    assert in_use(f"{name}p2") == f"mounted on {where}"
    assert in_use(name) == f"{part} is mounted on {where}"
    assert in_use(f"{name}p1") is None


def test_swap_is_in_use(file: Path) -> None:
    file.write_bytes(os.urandom(MIB))
    file.chmod(0o600)
    with loop_device(file) as name:
        try:
            run("mkswap", name)
            run("swapon", name)
        except (RuntimeError, FileNotFoundError) as error:
            pytest.skip(f"NEEDS mkswap and swapon: {error}")
        try:
            assert in_use(name) == "in use as swap"
        finally:
            run("swapoff", name)


# -- what is the same ---------------------------------------------------------------------------


def test_names_of_one_file_are_one_medium(file: Path, tmp_path: Path) -> None:
    os.link(file, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(file)
    other = sparse_file(tmp_path / "other", 4096)
    assert same_medium(file, tmp_path / "hard")
    assert same_medium(tmp_path / "soft", file)
    assert not same_medium(file, other)


def test_a_loop_device_is_the_same_as_its_file(file: Path, tmp_path: Path) -> None:
    other = sparse_file(tmp_path / "other", MIB)
    with loop_device(file) as one, loop_device(file) as two, loop_device(other) as three:
        assert same_medium(one, file)
        assert same_medium(file, one)
        assert same_medium(one, two)
        assert not same_medium(one, three)
        assert not same_medium(one, other)


def test_a_disk_is_the_same_as_its_partitions_but_they_differ(disk: str, tmp_path: Path) -> None:
    link = tmp_path / "by-name"
    link.symlink_to(f"{disk}p1")
    assert same_medium(link, f"{disk}p1")
    assert same_medium(disk, f"{disk}p1")
    assert same_medium(f"{disk}p2", disk)
    assert same_medium(f"{disk}p1", tmp_path / "file")
    assert not same_medium(f"{disk}p1", f"{disk}p2")


def test_exports_are_compared_by_place(file: Path) -> None:
    assert same_medium("nbd://h/x", "nbds://H:10809/x")
    assert not same_medium("nbd://h/x", "nbd://h/y")
    assert not same_medium("nbd://h/x", file)
    assert not same_medium(file, "nbd://h/x")


def test_a_mapped_device_is_the_same_as_what_it_is_made_of(file: Path) -> None:
    name = f"bitmapd-test-{os.getpid()}"
    with loop_device(file) as loop:
        try:
            run("dmsetup", "create", name, "--table", f"0 1024 linear {loop} 0")
        except (RuntimeError, FileNotFoundError) as error:
            pytest.skip(f"NEEDS device-mapper: {error}")
        try:
            assert same_medium(f"/dev/mapper/{name}", loop)
            assert same_medium(file, f"/dev/mapper/{name}")
            assert "part of dm-" in str(in_use(loop))
        finally:
            run("dmsetup", "remove", name)


# -- what is on it ------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "magic", "meaning"), identity.SIGNATURES)
def test_every_known_signature_is_found(offset: int, magic: bytes, meaning: str) -> None:
    image = bytearray(128 << 10)
    image[offset : offset + len(magic)] = magic
    assert known_signature(lambda at, length: bytes(image[at : at + length])) == meaning


def test_nothing_is_found_where_nothing_is(file: Path) -> None:
    assert signature(file) is None
    assert signature(sparse_file(file.parent / "empty", 0)) is None
    with loop_device(file, 4096) as name:
        assert signature(name) is None


@pytest.mark.parametrize(
    ("command", "meaning"),
    [
        (["mkfs.ext4", "-q"], "ext2/3/4 file system"),
        (["mkswap"], "swap space"),
        (["qemu-img", "create", "-q", "-f", "qcow2"], "qcow2 disk image"),
    ],
)
def test_real_content_is_found(command: list[str], meaning: str, file: Path) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"NEEDS {command[0]}")
    size = ["8M"] if command[0] == "qemu-img" else []
    run(*command, str(file), *size)
    assert signature(file) == meaning


def test_a_partition_table_is_found_but_not_on_its_partitions(disk: str) -> None:
    assert signature(disk) == "partition table or boot sector"
    assert signature(f"{disk}p1") is None


def test_blkid_is_asked_about_what_the_table_does_not_know(file: Path) -> None:
    if shutil.which("blkid", path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None:
        pytest.skip("NEEDS blkid (package util-linux)")
    with open(file, "r+b") as image:  # the magic and the version of a squashfs
        image.write(b"hsqs" + bytes(24) + b"\x04\x00\x00\x00")
    assert signature(file) == "squashfs (found by blkid)"


def fake_blkid(folder: Path, script: str) -> None:
    program = folder / "blkid"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_contradicting_signatures_are_found(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_blkid(tmp_path, "exit 8")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert signature(file) == "several signatures that contradict one another"


def test_a_blkid_that_hangs_is_an_error(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_blkid(tmp_path, "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(identity, "BLKID_TIMEOUT_S", 0.05)
    with pytest.raises(BitmapdError, match="did not finish"):
        signature(file)


def test_without_blkid_the_table_alone_decides(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    assert signature(file) is None
