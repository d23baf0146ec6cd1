"""What a path leads to: its lasting identity, who uses it, and what is on it.

A record names its primary and its secondary by identities, so that a disk that was replaced, or
two device names that changed places at boot, are noticed before anything is copied.

1. An identity survives a reboot and a rename and changes when the medium is another one.  Block
   devices are known by what their driver or their partition table says (device-mapper UUID, WWN,
   serial number, partition UUID), files as `file_identity` says, NBD exports by where they are.
   Sizes are kept beside the text and compared apart from it.
2. A device that offers nothing lasting gets an identity marked `stable=False`; comparing it over
   a reboot proves nothing.
3. Nothing here writes.  `in_use` opens a block device exclusively for a moment, which is the
   kernel's own test for mounted, swapped-on or stacked devices.
4. What is asked of the kernel comes from sysfs and /proc, read anew each time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bitmapd.errors import BitmapdError, NotFoundError, UsageError, refused
from bitmapd.media.file_identity import file_text
from bitmapd.net.uri import is_receiver, is_remote, is_uri, parse_receiver_uri, parse_uri

SECTOR_BYTES: Final = 512  # of sysfs, whatever the device's own sectors are
MAX_TEXT_BYTES: Final = 255
BLKID_TIMEOUT_S: Final = 30
_SYS_BLOCK: Final = Path("/sys/dev/block")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Identity:
    kind: str  # "block", "file", "nbd" or "receiver"
    text: str  # at most 255 bytes of UTF-8
    size_bytes: int | None  # None: has to be asked of the server
    logical_block_bytes: int | None
    physical_block_bytes: int | None
    read_only: bool
    stable: bool


# -- identities ---------------------------------------------------------------------------------


def identify(target: str | Path) -> Identity:
    """Of a block device, a regular file, an NBD URI or a receiver's; otherwise NotFoundError,
    PermissionError_ or UsageError (neither device nor file)."""
    text = str(target)
    if is_receiver(text):
        receiver = str(parse_receiver_uri(text))
        return Identity("receiver", _fitted(receiver), None, None, None, False, True)
    if is_uri(text):
        return Identity("nbd", _fitted(_nbd_text(text)), None, None, None, False, True)
    found = _stat(text)
    if stat.S_ISREG(found.st_mode):
        writable = os.access(text, os.W_OK)
        return Identity(
            "file", file_text(text, found), found.st_size, SECTOR_BYTES, None, not writable, True
        )
    node = _sys_node(found.st_rdev)
    disk = node.parent if (node / "partition").exists() else node
    name, stable = _block_text(node)
    return Identity(
        kind="block",
        text=_fitted(name),
        size_bytes=int(_read(node / "size") or 0) * SECTOR_BYTES,
        logical_block_bytes=int(_read(disk / "queue/logical_block_size") or SECTOR_BYTES),
        physical_block_bytes=int(_read(disk / "queue/physical_block_size") or SECTOR_BYTES),
        read_only=_read(node / "ro") == "1",
        stable=stable,
    )


def _stat(path: str) -> os.stat_result:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path} does not exist") from None
    except PermissionError as error:
        raise refused(error, f"cannot look at {path}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path!r} is not a usable path: {error}") from error
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        raise UsageError(f"{path} is neither a block device nor a regular file")
    return found


def _sys_node(device: int) -> Path:
    """The sysfs folder of a block device; a partition's lies inside its disk's."""
    link = _SYS_BLOCK / f"{os.major(device)}:{os.minor(device)}"
    if not link.exists():
        raise NotFoundError(
            f"the kernel knows no block device {os.major(device)}:{os.minor(device)}",
            hint="the device node is stale, or /sys is not mounted",
        )
    return link.resolve()


def _read(path: Path) -> str:
    """Content without the white space around it; empty if the kernel does not offer it."""
    try:
        return path.read_text(errors="replace").strip().strip("\0")
    except OSError:
        return ""


def _block_text(node: Path) -> tuple[str, bool]:
    mapped = _read(node / "dm/uuid")
    if mapped:
        return f"dm:{mapped}", True
    backing = _backing_file(node)
    if backing is not None:
        offset = _read(node / "loop/offset")
        try:
            return f"loop:{file_text(backing, os.stat(backing))}+{offset}", True
        except OSError:
            return f"loop:{backing}+{offset}", False
    if (node / "partition").exists():
        number = _read(node / "partition")
        parent, stable = _block_text(node.parent)
        if stable:
            return f"{parent}-part{number}", True
        partition_uuid = _link_to(node, "by-partuuid")
        if partition_uuid:
            return f"partuuid:{partition_uuid}", True
        return f"{parent}-part{number}", False
    array = _read(node / "md/uuid")
    if array:
        return f"md:{array}", True
    for label, file in (
        ("wwid", "wwid"),
        ("wwid", "device/wwid"),
        ("serial", "serial"),
        ("serial", "device/serial"),
    ):
        value = " ".join(_read(node / file).split())
        if value:
            return f"{label}:{value}", True
    by_id = _link_to(node, "by-id")
    if by_id:
        return f"id:{by_id}", True
    return f"name:{node.name}", False


def _link_to(node: Path, folder: str) -> str:
    """The first name under /dev/disk/FOLDER that leads to this device."""
    links = Path("/dev/disk") / folder
    try:
        names = sorted(os.listdir(links))
    except OSError:
        return ""
    device = _read(node / "dev")
    for name in names:
        try:
            found = os.stat(links / name)
        except OSError:
            continue
        if device == f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}":
            return name
    return ""


def _nbd_text(uri: str) -> str:
    """Where the export is; how it is reached (TLS, keys) does not make it another one."""
    parsed = parse_uri(uri)
    if parsed.socket_path is not None:
        return f"nbd+unix:{parsed.socket_path}/{parsed.export}"
    return f"nbd:{(parsed.host or '').lower()}:{parsed.port}/{parsed.export}"


def _fitted(text: str) -> str:
    """`text`, or a digest of it where it would not fit into a superblock."""
    raw = text.encode(errors="replace")
    if len(raw) <= MAX_TEXT_BYTES:
        return raw.decode()
    return f"{text.split(':', 1)[0]}:sha256={hashlib.sha256(raw).hexdigest()}"


# -- who uses it --------------------------------------------------------------------------------


def in_use(path: str | Path, *, shared: bool = False) -> str | None:
    """Who uses a device or file ("mounted on /srv"), or None.  `shared`: with somebody who may
    have it open exclusively."""
    text = str(path)
    found = _stat(text)
    swaps = [line.split()[0] for line in _lines("/proc/swaps")[1:] if line]
    if any(_same_node(swap, found) for swap in swaps):
        return "in use as swap"
    if stat.S_ISREG(found.st_mode):
        for node in sorted(Path("/sys/block").glob("loop*")):
            backing = _backing_file(node)
            if backing is not None and _same_node(backing, found):
                return f"attached to /dev/{node.name}"
        return None
    node = _sys_node(found.st_rdev)
    for part in (node, *sorted(node.glob(f"{node.name}*"))):
        label = "" if part == node else f"{part.name} is "
        mounts = _mount_points(_read(part / "dev"))
        if mounts:
            return f"{label}mounted on {mounts[0]}"
        holders = _names(part / "holders")
        if holders:
            return f"{label}part of {holders[0]}"
    if shared:
        return None
    try:
        fd = os.open(text, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return "opened exclusively by another program"
        raise refused(error, f"cannot open {text}") from error
    os.close(fd)
    return None


def _same_node(path: str, found: os.stat_result) -> bool:
    try:
        other = os.stat(path)
    except OSError:
        return False
    if stat.S_ISBLK(found.st_mode):
        return stat.S_ISBLK(other.st_mode) and other.st_rdev == found.st_rdev
    return (other.st_dev, other.st_ino) == (found.st_dev, found.st_ino)


def _backing_file(node: Path) -> str | None:
    return _read(node / "loop/backing_file") or None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _lines(path: str) -> list[str]:
    return _read(Path(path)).split("\n")


def _mount_points(device: str) -> list[str]:
    """Where MAJOR:MINOR is mounted; octal escapes of the kernel are undone."""
    points = []
    for line in _lines("/proc/self/mountinfo"):
        fields = line.split()
        if len(fields) > 4 and fields[2] == device:
            points.append(_OCTAL.sub(lambda found: chr(int(found[1], 8)), fields[4]))
    return points


# -- what is the same ---------------------------------------------------------------------------


def same_medium(one: str | Path, other: str | Path) -> bool:
    """Whether writing to one may change the other: the same file, device or export, a disk and its
    partition, a loop device and its file, loop devices over one file (wherever in it they begin), a
    mapped device and what it is made of."""
    first, second = str(one), str(other)
    if is_remote(first) or is_remote(second):
        both = is_remote(first) and is_remote(second)
        return both and identify(first).text == identify(second).text
    below_first = list(_below(first))
    below_second = list(_below(second))
    if below_first[0] in below_second or below_second[0] in below_first:
        return True
    return _behind_loops(first) == _behind_loops(second)


def _behind_loops(path: str) -> str:
    """The key of what a loop device, or one upon another, is attached to."""
    found = _stat(path)
    if stat.S_ISBLK(found.st_mode):
        backing = _backing_file(_sys_node(found.st_rdev))
        if backing is not None and os.path.exists(backing):
            return _behind_loops(backing)
    return next(_below(path))


def _below(path: str) -> Iterator[str]:
    """Keys of a medium and of everything it stands on, itself first."""
    found = _stat(path)
    if stat.S_ISREG(found.st_mode):
        yield f"file:{found.st_dev}:{found.st_ino}"
    else:
        yield from _below_node(_sys_node(found.st_rdev))


def _below_node(node: Path) -> Iterator[str]:
    yield f"block:{_read(node / 'dev')}"
    backing = _backing_file(node)
    if backing is not None and os.path.exists(backing):
        yield from _below(backing)
    if (node / "partition").exists():
        yield from _below_node(node.parent)
    for slave in _names(node / "slaves"):
        yield from _below_node((node / "slaves" / slave).resolve())


# -- what is on it ------------------------------------------------------------------------------

# (byte offset, magic, what it is).  The offsets of GPT are those of 512-byte and 4 KiB sectors, the
# offsets of LVM the sectors a label may stand in, those of swap the usual memory page sizes.
SIGNATURES: Final[tuple[tuple[int, bytes, str], ...]] = (
    (1080, b"\x53\xef", "ext2/3/4 file system"),
    (0, b"XFSB", "XFS file system"),
    (65600, b"_BHRfS_M", "btrfs file system"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS file system"),
    (3, b"NTFS    ", "NTFS file system"),
    (82, b"FAT32   ", "FAT file system"),
    (54, b"FAT1", "FAT file system"),
    (0, b"LUKS\xba\xbe", "LUKS encrypted volume"),
    (512, b"LABELONE", "LVM physical volume"),
    (0, b"LABELONE", "LVM physical volume"),
    (1024, b"LABELONE", "LVM physical volume"),
    (1536, b"LABELONE", "LVM physical volume"),
    (4096, b"\xfc\x4e\x2b\xa9", "Linux RAID member"),
    (0, b"\xfc\x4e\x2b\xa9", "Linux RAID member"),
    (4086, b"SWAPSPACE2", "swap space"),
    (16374, b"SWAPSPACE2", "swap space"),
    (65526, b"SWAPSPACE2", "swap space"),
    (512, b"EFI PART", "GPT partition table"),
    (4096, b"EFI PART", "GPT partition table"),
    (0, b"\x93bitmapd-points\n", "journal of a receiver"),
    (0, b"QFI\xfb", "qcow2 disk image"),
    (0, b"KDMV", "VMDK disk image"),
    (510, b"\x55\xaa", "partition table or boot sector"),
)


def known_signature(read: Callable[[int, int], bytes]) -> str | None:
    """What `read(offset_bytes, length_bytes)` gives away, by the table (pure)."""
    for offset_bytes, magic, meaning in SIGNATURES:
        if read(offset_bytes, len(magic)) == magic:
            return meaning
    return None


def signature(path: str | Path) -> str | None:
    """A file system, volume manager, partition table or image on a device or file, or None.

    blkid of util-linux, which knows many more, is asked where there is one.
    """
    text = str(path)
    _stat(text)
    try:
        fd = os.open(text, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = os.pread(fd, 128 * 1024, 0)
        finally:
            os.close(fd)
    except OSError as error:
        raise refused(error, f"cannot read {text}") from error
    known = known_signature(lambda offset, length: head[offset : offset + length])
    return known or _ask_blkid(text)


def _ask_blkid(path: str) -> str | None:
    try:
        answer = subprocess.run(
            ["blkid", "-p", "-o", "export", "--", path],
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=BLKID_TIMEOUT_S,
        )
    except (FileNotFoundError, PermissionError):
        return None
    except subprocess.TimeoutExpired:
        raise BitmapdError(f"blkid did not finish with {path} in {BLKID_TIMEOUT_S} s") from None
    values = dict(
        line.split("=", 1)
        for line in answer.stdout.decode(errors="replace").splitlines()
        if "=" in line
    )
    if answer.returncode == 8:  # several signatures at once
        return "several signatures that contradict one another"
    kind = values.get("TYPE") or values.get("PTTYPE")
    return f"{kind} (found by blkid)" if kind else None
