"""The NBD client and TLS: who is believed, who is not, and that nothing leaks before."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.errors import UsageError
from bitmapd.nbd.client.target import NbdTarget
from bitmapd.net.uri import NbdUri
from tests.support.nbdcerts import issue, make_certificates
from tests.support.nbdpeers import (
    MIB,
    Peer,
    exercise,
    fail,
    image,
    nbdkit,
    opened,
    qemu_nbd,
    read,
    short_folder,
    succeed,
    write,
)

SIZE = 2 * MIB
EXPIRED = (
    "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\nsigning_key\n"
    'activation_date = "2020-01-01 00:00:00"\nexpiration_date = "2020-02-01 00:00:00"\n'
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good`, `foreign`, … and `other`, where another authority has signed everything."""
    root = tmp_path_factory.mktemp("tls")
    make_certificates(root / "other")
    return make_certificates(root)


@pytest.fixture
def certificates(folders: Path) -> Path:
    return folders / "good"


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def tls_nbdkit_options(certificates: Path, mode: str = "require") -> list[str]:
    return [f"--tls={mode}", f"--tls-certificates={certificates}", "--tls-verify-peer"]


def tls_qemu_options(certificates: Path) -> list[str]:
    credentials = f"tls-creds-x509,id=tls0,endpoint=server,dir={certificates},verify-peer=on"
    return ["--object", credentials, "--tls-creds", "tls0"]


async def refused(uri: NbdUri, number: int, certificates: Path | None = None) -> str:
    target = NbdTarget(
        asyncio.get_running_loop(), uri, tls_certificates=certificates, timeout_s=10.0
    )
    text = await fail(number, target.open)
    assert not target.connected
    return text


def exercise_over_tls(peer: Peer, uri: NbdUri, file: Path, certificates: Path) -> None:
    async def use() -> bytes:
        target = await opened(uri, tls_certificates=certificates)
        try:
            return await exercise(target, operations=150)
        finally:
            target.close()

    model = asyncio.run(use())
    assert file.read_bytes() == model


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_nbdkit(folder: Path, certificates: Path, tcp: bool) -> None:
    file = image(folder / "disk", SIZE, seed=1)
    with nbdkit(folder, *tls_nbdkit_options(certificates), "file", file, tcp=tcp) as peer:
        exercise_over_tls(peer, peer.uri(tls=True), file, certificates)


def test_qemu_nbd(folder: Path, certificates: Path) -> None:
    # qemu-nbd speaks TLS over TCP only.
    file = image(folder / "disk", SIZE, seed=2)
    with qemu_nbd(folder, *tls_qemu_options(certificates), file, tcp=True) as peer:
        exercise_over_tls(peer, peer.uri(tls=True), file, certificates)


def test_the_folder_may_stand_in_the_uri(folder: Path, certificates: Path) -> None:
    options = tls_nbdkit_options(certificates)

    async def use(peer: Peer) -> None:
        target = await opened(
            peer.uri(tls=True, host="localhost", tls_certificates=str(certificates))
        )
        data = random.Random(1).randbytes(SIZE)
        await write(target, 0, data)
        assert await read(target, 0, SIZE) == data
        target.close()

    with nbdkit(folder, *options, "memory", SIZE, tcp=True) as peer:
        asyncio.run(use(peer))


def test_a_name_that_the_certificate_lacks(folder: Path, certificates: Path) -> None:
    with nbdkit(folder, *tls_nbdkit_options(certificates), "memory", SIZE, tcp=True) as peer:
        uri = peer.uri(tls=True, tls_hostname="mirror.example")
        text = asyncio.run(refused(uri, errno.EPROTO, certificates))
        assert "mirror.example" in text
        # The name counts for a unix socket too, once it is given.
        asyncio.run(_opens(peer.uri(tls=True, tls_hostname="localhost"), certificates))


async def _opens(uri: NbdUri, certificates: Path | None = None) -> None:
    target = await opened(uri, tls_certificates=certificates)
    await succeed(target.flush)
    target.close()


def test_a_server_of_another_authority(folder: Path, folders: Path) -> None:
    other, certificates = folders / "other" / "good", folders / "good"
    with nbdkit(folder, *tls_nbdkit_options(other), "memory", SIZE) as peer:
        text = asyncio.run(refused(peer.uri(tls=True), errno.EPROTO, certificates))
        assert "the server's certificate is not accepted" in text


def test_an_expired_server(folder: Path, folders: Path, tmp_path: Path) -> None:
    issue(folders / "authority", tmp_path, "server", EXPIRED)
    with nbdkit(folder, *tls_nbdkit_options(tmp_path), "memory", SIZE) as peer:
        text = asyncio.run(refused(peer.uri(tls=True), errno.EPROTO, folders / "good"))
        assert "expired" in text


@pytest.mark.parametrize("kind", ["foreign", "nocert", "expired"])
def test_a_client_that_the_server_does_not_accept(folder: Path, folders: Path, kind: str) -> None:
    """In TLS 1.3 the server's refusal comes after the client's handshake."""
    good = folders / "good"
    with nbdkit(folder, *tls_nbdkit_options(good), "memory", SIZE) as peer:
        error = asyncio.run(_open_error(peer.uri(tls=True), folders / kind))
        assert error.errno in (errno.EPROTO, errno.ECONNRESET)
        assert "TLS failed" in str(error.strerror) or "closed the connection" in str(error.strerror)
        asyncio.run(_opens(peer.uri(tls=True), good))


async def _open_error(uri: NbdUri, certificates: Path) -> OSError:
    target = NbdTarget(asyncio.get_running_loop(), uri, tls_certificates=certificates)
    future: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    target.open(future.set_result)
    error = await future
    assert error is not None
    return error


def test_a_server_without_tls_is_not_used(folder: Path, certificates: Path) -> None:
    """Neither with nbds nor where only certificates ask for it."""
    with nbdkit(folder, "--tls=off", "memory", SIZE) as peer:
        for tls in (True, False):
            text = asyncio.run(refused(peer.uri(tls=tls), errno.EPROTO, certificates))
            assert "TLS is required, but the server refused it" in text


def test_a_server_that_is_too_old_for_tls(folder: Path, certificates: Path) -> None:
    with nbdkit(folder, "--mask-handshake=0", "memory", SIZE) as peer:
        text = asyncio.run(refused(peer.uri(tls=True), errno.EPROTO, certificates))
        assert "too old" in text


def test_clear_text_against_a_server_that_requires_tls(folder: Path, certificates: Path) -> None:
    with nbdkit(folder, *tls_nbdkit_options(certificates), "memory", SIZE) as peer:
        assert "requires TLS, use nbds" in asyncio.run(refused(peer.uri(), errno.EACCES))


def test_certificates_that_are_missing(folder: Path, tmp_path: Path) -> None:
    async def no_folder() -> None:
        with pytest.raises(UsageError, match="needs TLS, but no certificates"):
            NbdTarget(asyncio.get_running_loop(), NbdUri(True, host="localhost"))

    asyncio.run(no_folder())
    nobody = NbdUri(True, socket_path=str(folder / "nobody"))
    text = asyncio.run(refused(nobody, errno.EACCES, tmp_path))
    assert "ca-cert.pem does not exist" in text


def test_a_server_that_is_stopped_and_killed(folder: Path, certificates: Path) -> None:
    """Requests in flight end once, and the next `open` brings a working link."""

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri(tls=True), tls_certificates=certificates)
        loop = asyncio.get_running_loop()
        data = memoryview(bytearray(random.Random(5).randbytes(MIB)))
        ends: list[asyncio.Future[OSError | None]] = []
        for at in (0, MIB) * 16:
            end: asyncio.Future[OSError | None] = loop.create_future()
            target.write(at, data, end.set_result)
            ends.append(end)
        await ends[0]
        peer.kill()
        errors = await asyncio.gather(*ends)
        assert {error.errno for error in errors if error is not None} <= {
            errno.ENOTCONN,
            errno.EPROTO,
        }
        assert errors[-1] is not None
        assert not target.connected
        peer.start()
        await succeed(target.open)
        await write(target, 0, bytes(data))
        assert await read(target, 0, MIB) == data
        target.close()

    file = image(folder / "disk", SIZE)
    with nbdkit(folder, *tls_nbdkit_options(certificates), "file", file) as peer:
        asyncio.run(use(peer))
