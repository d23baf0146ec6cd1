"""What of the kernel's NBD client needs no kernel that has it; the rest is in tests/vm/guest."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest

from dmctl.kernel.nbd_messages import NbdCommand, NbdMessage
from dmctl.kernel.nbd_netlink import NbdNetlink, _split, find_device, raise_request_size


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data.ljust((len(data) + 3) & ~3, b"\0")


def test_a_request_is_encoded_as_the_header_file_says() -> None:
    message = NbdMessage()
    message["cmd"] = NbdCommand.CONNECT
    message["version"] = 1
    message["attrs"] = [
        ("NBD_ATTR_INDEX", 3),
        ("NBD_ATTR_SIZE_BYTES", 1 << 40),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", 4096),
        ("NBD_ATTR_TIMEOUT", 10),
        ("NBD_ATTR_SERVER_FLAGS", 0x2D),
        ("NBD_ATTR_CLIENT_FLAGS", 0),
        ("NBD_ATTR_SOCKETS", {"attrs": [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", 7)]})]}),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", 100),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "abc"),
    ]
    message.encode()
    quad = struct.Struct("=Q").pack
    assert bytes(message.data[16:]) == struct.pack("=BBH", 1, 1, 0) + b"".join(
        (
            attribute(1, struct.pack("=I", 3)),
            attribute(2, quad(1 << 40)),
            attribute(3, quad(4096)),
            attribute(4, quad(10)),
            attribute(5, quad(0x2D)),
            attribute(6, quad(0)),
            attribute(7, attribute(1, attribute(1, struct.pack("=I", 7)))),
            attribute(8, quad(100)),
            attribute(10, b"abc\0"),
        )
    )


def test_a_list_of_devices_is_read() -> None:
    item = attribute(1, struct.pack("=I", 5)) + attribute(2, b"\1")
    text = struct.pack("=BBH", NbdCommand.STATUS, 1, 0) + attribute(9, attribute(1, item))
    message = NbdMessage(struct.pack("=IHHII", 16 + len(text), 33, 0, 1, 0) + text)
    message.decode()
    ((name, device),) = message.get_attr("NBD_ATTR_DEVICE_LIST")["attrs"]
    assert name == "NBD_DEVICE_ITEM"
    assert device.get_attr("NBD_DEVICE_INDEX") == 5
    assert device.get_attr("NBD_DEVICE_CONNECTED") == 1


def test_a_datagram_is_cut_into_messages() -> None:
    one = struct.pack("=IHHII", 19, 33, 0, 4, 0) + b"abc"
    two = struct.pack("=IHHII", 16, 2, 0, 5, 0)
    assert list(_split(one + b"\0" + two)) == [(33, 4, one), (2, 5, two)]
    assert list(_split(two[:10])) == []
    with pytest.raises(OSError, match="a netlink message of 3 bytes"):
        list(_split(struct.pack("=IHHII", 3, 2, 0, 5, 0)))


def device(root: Path, index: int, backend: str | None, used: bool = True) -> Path:
    folder = root / f"nbd{index}"
    (folder / "queue").mkdir(parents=True)
    if backend is not None:
        (folder / "backend").write_text(f"{backend}\n")
    if used:
        (folder / "pid").write_text("1\n")
    return folder


def test_a_device_is_found_by_its_identifier(tmp_path: Path) -> None:
    device(tmp_path, 0, None)
    device(tmp_path, 1, "a" * 32)
    device(tmp_path, 2, "b" * 32, used=False)
    device(tmp_path, 12, "b" * 32)
    assert find_device("a" * 32, tmp_path) == 1
    assert find_device("b" * 32, tmp_path) == 12
    assert find_device("c" * 32, tmp_path) is None
    assert find_device("a" * 31, tmp_path) is None
    assert find_device("", tmp_path / "nothing") is None


def test_requests_grow_to_the_limit_of_the_device(tmp_path: Path) -> None:
    queue = device(tmp_path, 4, None) / "queue"
    (queue / "max_hw_sectors_kb").write_text("32768\n")
    (queue / "max_sectors_kb").write_text("128\n")
    raise_request_size(4, 1280, tmp_path)
    assert (queue / "max_sectors_kb").read_text() == "1280"
    (queue / "max_hw_sectors_kb").write_text("512\n")
    raise_request_size(4, 1280, tmp_path)
    assert (queue / "max_sectors_kb").read_text() == "512"


def test_a_kernel_without_the_client_is_told() -> None:
    if Path("/sys/module/nbd").exists():
        pytest.skip("this kernel has the NBD client; see tests/vm/guest/test_nbd_attach.py")
    with pytest.raises(OSError, match="NBD client") as missing:
        NbdNetlink()
    assert missing.value.errno in {errno.ENODEV, errno.EPERM}
