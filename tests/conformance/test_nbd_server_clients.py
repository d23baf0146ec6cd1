"""Foreign clients against the real server, engine and device: libnbd, nbdcopy, qemu, fio."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.nbdraw import RawClient
from tests.support.nbdserve import MIB, ServerProcess, serve

SIZE = 64 * MIB
# The distribution's programs, and its Python for nbdsh: libnbd's module is installed there only.
SYSTEM_PATH = "/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin"


def need(program: str) -> None:
    if shutil.which(program, path=SYSTEM_PATH) is None:
        pytest.skip(f"{program} is not installed: this interoperability check was NOT run")


def run(*command: str, timeout_s: float = 100, status: int = 0) -> str:
    """Run a program; its output if it ends with the status that is expected."""
    need(command[0])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=os.environ | {"PATH": SYSTEM_PATH},
    )
    assert done.returncode == status, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short names for sockets, and memory rather than a disk where there is some."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="nbd", dir=base) as name:
        yield Path(name)


@pytest.fixture
def image(folder: Path) -> Path:
    """Data, zeros and holes."""
    path = folder / "image"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(os.urandom(3 * MIB + 4096))
        file.seek(20 * MIB)
        file.write(bytes(2 * MIB))
        file.seek(40 * MIB)
        file.write(os.urandom(MIB))
    return path


@pytest.fixture
def served(folder: Path, image: Path) -> Iterator[ServerProcess]:
    with serve(image, unix=folder / "s") as server:
        yield server


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def nbdsh(uri: str, script: str) -> str:
    """Run Python code with libnbd's handle `h` connected, contexts requested."""
    return run("nbdsh", "--base-allocation", "-u", uri, "-c", script)


# -- libnbd --------------------------------------------------------------------------------


def test_nbdinfo(served: ServerProcess) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", served.uri()))["exports"]
    assert export["export-name"] == "vol0"
    assert export["description"] == "a file"
    assert export["export-size"] == SIZE
    assert export["contexts"] == ["base:allocation"]
    assert not export["is_read_only"]
    sizes = ("block_size_minimum", "block_size_preferred", "block_size_maximum")
    assert [export[key] for key in sizes] == [512, 4096, 32 * MIB]
    can = [key for key in export if key.startswith("can_")]
    assert len(can) == 8
    assert all(export[key] for key in can)
    listed = json.loads(run("nbdinfo", "--list", "--json", served.uri()))
    assert [entry["export-name"] for entry in listed["exports"]] == ["vol0"]
    assert run("nbdinfo", "--size", served.uri("vol0")).strip() == str(SIZE)
    run("nbdinfo", served.uri("other"), status=1)


def test_map_tells_holes_from_data(served: ServerProcess) -> None:
    entries = json.loads(run("nbdinfo", "--map", "--json", served.uri()))
    assert sum(entry["length"] for entry in entries) == SIZE
    at = {entry["offset"]: entry["description"] for entry in entries}
    assert at[0] == "data"
    assert at[40 * MIB] == "data"
    assert at[41 * MIB] == "hole,zero"


LIBNBD_SCRIPT = """
import os, errno
data = os.urandom(1 << 20)
h.pwrite(data, 512)
assert h.pread(1 << 20, 512) == data
h.pwrite(data[:4096], 1 << 20, nbd.CMD_FLAG_FUA)
h.flush()
h.zero(65536, 0)
assert h.pread(65536, 0) == bytearray(65536)
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(65536, 65536) == bytearray(65536)
h.zero(65536, 131072, nbd.CMD_FLAG_FAST_ZERO)
h.trim(1 << 20, 8 << 20)
h.cache(1 << 20, 0)
found = []
h.block_status(1 << 20, 8 << 20, lambda *a: found.append(a))
assert found[0][0] == "base:allocation" and found[0][2][:2] == [1 << 20, 3], found
largest = os.urandom(32 << 20)
h.pwrite(largest, 16 << 20)
assert h.pread(32 << 20, 16 << 20) == largest
chunks = []
h.pread_structured(8192, 512, lambda *a: chunks.append(a[1:3]))
assert chunks == [(512, nbd.READ_DATA)], chunks
h.set_strict_mode(0)
def fails(wanted, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errno == errno.errorcode[wanted], (error.errno, error.string)
    else:
        raise AssertionError(f"{call} {arguments} went through")
size = h.get_size()
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.ENOSPC, h.pwrite, bytes(512), size)
fails(errno.ENOSPC, h.zero, 512, size)
fails(errno.EINVAL, h.trim, 512, size)
fails(errno.EINVAL, h.pread, 512, 1)
fails(errno.EINVAL, h.pwrite, bytes(100), 0)
fails(errno.EINVAL, h.pread, 0, 0)
fails(errno.EINVAL, h.flush, nbd.CMD_FLAG_DF)
fails(errno.EINVAL, h.block_status, 512, size, lambda *a: 0)
assert h.pread(512, 0) == bytearray(512)
h.shutdown()
print("reached the end")
"""


def test_libnbd_uses_everything(served: ServerProcess) -> None:
    assert "reached the end" in nbdsh(served.uri(), LIBNBD_SCRIPT)


def test_libnbd_without_structured_replies(served: ServerProcess) -> None:
    script = f"""
h.set_request_structured_replies(False)
h.connect_uri({served.uri()!r})
assert not h.get_structured_replies_negotiated()
h.pwrite(b"p" * 69632, 0)
assert h.pread(4096, 0) == b"p" * 4096
h.flush()
h.shutdown()
print("reached the end")
"""
    assert "reached the end" in run("nbdsh", "-c", script)


def test_many_requests_at_once_on_several_connections(served: ServerProcess) -> None:
    """Flush on one connection covers the writes of the other (CAN_MULTI_CONN)."""
    script = f"""
import random
other = nbd.NBD()
other.connect_uri({served.uri()!r})
assert h.can_multi_conn()
blocks = list(range(2000))
random.shuffle(blocks)
pending = []
for number, block in enumerate(blocks):
    handle = (h, other)[number % 2]
    content = nbd.Buffer.from_bytearray(bytearray(block.to_bytes(4, "big") * 1024))
    pending.append((handle, handle.aio_pwrite(content, block * 4096), content))
for handle, cookie, _ in pending:
    while not handle.aio_command_completed(cookie):
        handle.poll(-1)
other.flush()
for block in blocks:
    assert h.pread(4096, block * 4096) == block.to_bytes(4, "big") * 1024
print("reached the end")
"""
    assert "reached the end" in nbdsh(served.uri(), script)


# -- nbdcopy -------------------------------------------------------------------------------


def test_nbdcopy_both_ways(served: ServerProcess, image: Path, folder: Path) -> None:
    copy = folder / "copy"
    run("nbdcopy", served.uri(), str(copy))
    assert digest(copy) == digest(image)
    new = folder / "new"
    new.write_bytes(os.urandom(SIZE // 2) + bytes(SIZE // 2))
    run("nbdcopy", "--flush", str(new), served.uri())
    assert digest(new) == digest(image)


def test_nbdcopy_with_the_largest_requests(
    served: ServerProcess, image: Path, folder: Path
) -> None:
    copy = folder / "copy"
    run("nbdcopy", "--request-size", str(32 * MIB), "--requests", "4", served.uri(), str(copy))
    assert digest(copy) == digest(image)


# -- qemu ----------------------------------------------------------------------------------


def test_qemu_img_info_and_map(served: ServerProcess) -> None:
    info = json.loads(run("qemu-img", "info", "-f", "raw", "--output=json", served.uri("vol0")))
    assert info["virtual-size"] == SIZE
    entries = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", served.uri("vol0")))
    assert sum(entry["length"] for entry in entries) == SIZE
    assert not entries[0]["zero"]
    last = entries[-1]
    assert last["zero"]
    assert last["start"] == 41 * MIB


def test_qemu_img_convert_and_compare(served: ServerProcess, image: Path, folder: Path) -> None:
    copy = folder / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri(), str(copy))
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(copy), served.uri())
    new = folder / "new"
    new.write_bytes(bytes(MIB) + os.urandom(5 * MIB) + bytes(SIZE - 6 * MIB))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(new), served.uri())
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(new), served.uri())
    assert digest(new) == digest(image)


def test_qemu_io(served: ServerProcess, image: Path) -> None:
    commands = [
        "write -P 0x5a 64k 128k",
        "read -P 0x5a 64k 128k",
        "write -f -P 0x5b 1M 64k",
        "write -z 64k 64k",
        "write -z -u 128k 64k",
        "read -P 0 64k 128k",
        "discard 2M 1M",
        "aio_write -P 0x11 4M 1M",
        "aio_write -P 0x22 5M 1M",
        "aio_flush",
        "read -P 0x22 5M 1M",
        "writev -P 0x33 6M 512 1024 4096",
        "flush",
        "quit",
    ]
    arguments = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *arguments, served.uri())
    assert "failed" not in output.lower()
    content = image.read_bytes()
    assert content[4 * MIB : 5 * MIB] == b"\x11" * MIB
    assert content[MIB : MIB + 65536] == b"\x5b" * 65536
    assert content[6 * MIB : 6 * MIB + 5632] == b"\x33" * 5632


# -- fio -----------------------------------------------------------------------------------


def fio(uri: str, *arguments: str) -> dict[str, Any]:
    need("fio")
    output = run(
        "fio",
        "--output-format=json",
        "--name=job",
        "--ioengine=nbd",
        f"--uri={uri}",
        *arguments,
    )
    jobs = json.loads(output[output.index("{") :])["jobs"]
    assert all(job["error"] == 0 for job in jobs)
    return dict(jobs[0])


def test_fio_verifies_two_jobs_at_depth_16(served: ServerProcess) -> None:
    job = fio(
        served.uri("vol0"),
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--iodepth=16",
        "--numjobs=2",
        "--size=16m",
        "--offset_increment=16m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--fsync=32",
        "--group_reporting",
    )
    assert job["write"]["total_ios"] > 0
    assert job["read"]["io_bytes"] >= 32 * MIB


def test_fio_trims_and_reads(served: ServerProcess) -> None:
    job = fio(served.uri("vol0"), "--rw=randtrimwrite", "--bs=64k", "--iodepth=8", "--size=16m")
    assert job["trim"]["total_ios"] > 0


# -- the medium ----------------------------------------------------------------------------


def test_a_file_of_odd_size(folder: Path) -> None:
    path = folder / "odd"
    path.write_bytes(os.urandom(MIB + 700))
    with serve(path, unix=folder / "s") as server, RawClient(str(folder / "s")) as client:
        assert client.enter().size == MIB + 512
        assert client.read(MIB, 512) == path.read_bytes()[MIB : MIB + 512]
        assert server.process.poll() is None


def test_many_requests_do_not_make_it_grow(served: ServerProcess) -> None:
    for rw in ("write", "read"):
        fio(served.uri("vol0"), f"--rw={rw}", "--bs=1m", "--iodepth=16", "--size=64m", "--loops=4")
    assert served.resident_bytes() < 110 * MIB
