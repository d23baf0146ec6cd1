"""TLS on the export: who gets in, who does not, and that nobody gets around it (case 30)."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bitmapd.errors import NotFoundError, PermissionError_, UsageError
from bitmapd.nbd.numbers import Cmd, Opt, Rep
from bitmapd.nbd.server.hub import ConnectionLimits
from bitmapd.net.tls import client_context, server_context
from tests.support.nbdcerts import make_authority, make_certificates
from tests.support.nbdraw import RawClient, info_data, option, request, write
from tests.support.nbdserve import MIB, HeldDevice, ServerThread, serve


@pytest.fixture(scope="module")
def certificates() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nbdtls") as folder:
        yield make_certificates(Path(folder))


class Secure:
    def __init__(self, thread: ServerThread, certificates: Path) -> None:
        self.thread = thread
        self.certificates = certificates
        self.port = thread.call(lambda: thread.server.listen_tcp("127.0.0.1", 0))[0][1]

    def client(self, context: ssl.SSLContext | None = None) -> RawClient:
        """TLS has been started when this returns; in TLS 1.3 the server may refuse later."""
        context = context or client_context(self.certificates / "good", "localhost")
        client = RawClient(self.port)
        client.greet()
        assert client.ask(Opt.STARTTLS) == [(Rep.ACK, b"")]
        try:
            client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
        except BaseException:
            client.sock.close()
            raise
        return client

    def entered(self) -> RawClient:
        client = self.client()
        assert client.ask(Opt.GO, info_data(""))[-1][0] == Rep.ACK
        return client

    def reasons(self) -> list[str]:
        events = [fields for event, fields in self.thread.events if event == "client-dropped"]
        return [fields["reason"] for fields in events]

    def refused(self, count: int) -> None:
        self.thread.until(lambda: self.thread.server.stats.refused_total == count)


@pytest.fixture
def secure(certificates: Path) -> Iterator[Secure]:
    options: dict[str, Any] = {
        "tls": server_context(certificates / "good"),
        "limits": ConnectionLimits(handshake_timeout_s=2.0),
    }
    with ServerThread(lambda loop, _: HeldDevice(loop, 16 * MIB), **options) as thread:
        yield Secure(thread, certificates)
    assert thread.pool.out_bytes == 0


# -- who gets in


def test_data_over_tls(secure: Secure) -> None:
    with secure.entered() as client:
        assert client.sock.version() == "TLSv1.3"
        payload = os.urandom(3 * MIB)
        client.write(4096, payload)
        assert client.read(4096, len(payload)) == payload
        client.send(b"".join(request(Cmd.READ, i, 512 * i, 512) for i in range(200)))
        for i in range(200):
            answer = client.answer(512)
            assert answer.handle == i
            assert answer.data == secure.thread.device.content[512 * i : 512 * i + 512]
        client.send(b"".join(write(i, 512 * i, bytes([i]) * 512) for i in range(200)))
        assert [client.answer().handle for _ in range(200)] == list(range(200))
    connected = [fields for event, fields in secure.thread.events if event == "client-connected"]
    assert connected[0]["certificate"] == "host-a"


def test_answers_wait_for_a_client_that_takes_its_time(secure: Secure) -> None:
    with secure.entered() as client:
        client.send(b"".join(request(Cmd.READ, i, 0, MIB) for i in range(16)))
        secure.thread.until(lambda: secure.thread.server.stats.read_bytes == 16 * MIB)
        assert [client.answer(MIB).handle for _ in range(16)] == list(range(16))


def test_requests_that_tls_has_decrypted_survive_a_stall(certificates: Path) -> None:
    """They are in the memory of the TLS library, where no readable socket tells of them."""
    options: dict[str, Any] = {
        "tls": server_context(certificates / "good"),
        "limits": ConnectionLimits(in_flight=4),
        "pool_bytes": 256 << 10,
    }
    with ServerThread(lambda loop, _: HeldDevice(loop, 16 * MIB), **options) as thread:
        secure = Secure(thread, certificates)
        with secure.entered() as client, secure.entered() as other:
            content = os.urandom(64 << 10)
            client.send(b"".join(write(i, i << 16, content) for i in range(60)))
            other.send(b"".join(request(Cmd.READ, i, 0, 64 << 10) for i in range(60)))
            assert [client.answer().handle for _ in range(60)] == list(range(60))
            assert [other.answer(64 << 10).handle for _ in range(60)] == list(range(60))
            client.send(b"".join(request(Cmd.READ, i, i << 16, 64 << 10) for i in range(60)))
            for i in range(60):
                answer = client.answer(64 << 10)
                assert answer.handle == i
                assert answer.data == content
        thread.until(lambda: thread.server.stats.connections == 0)
        assert thread.pool.out_bytes == 0


def test_end_of_tls_while_requests_are_at_the_disk(secure: Secure) -> None:
    with secure.entered() as client:
        secure.thread.call(lambda: setattr(secure.thread.device, "held", True))
        client.send(write(1, 0, b"t" * 512))
        secure.thread.until(lambda: secure.thread.device.waiting)
    secure.thread.call(lambda: setattr(secure.thread.device, "held", False))
    secure.thread.call(secure.thread.device.release)
    with secure.entered() as client:
        assert client.read(0, 512) == b"t" * 512


def run(*command: str, status: int = 0) -> str:
    if shutil.which(command[0], path="/usr/bin") is None:
        pytest.skip(f"{command[0]} is not installed: this interoperability check was NOT run")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode != 0) == (status != 0), f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(12 * MIB) + bytes(4 * MIB))
    return path


def test_libnbd_and_qemu_over_tls(certificates: Path, image: Path, tmp_path: Path) -> None:
    good = certificates / "good"
    with serve(image, "--tls", str(good)) as server:
        uri = f"{server.uri('vol0', 'nbds')}?tls-certificates={good}"
        assert str(16 * MIB) in run("nbdinfo", "--json", uri)
        copy = tmp_path / "copy"
        run("nbdcopy", uri, str(copy))
        assert hashlib.sha256(copy.read_bytes()).digest() == (
            hashlib.sha256(image.read_bytes()).digest()
        )
        copy.write_bytes(os.urandom(16 * MIB))
        run("nbdcopy", "--flush", str(copy), uri)
        run(
            "qemu-img",
            "compare",
            *("--object", f"tls-creds-x509,id=t,endpoint=client,dir={good}", "--image-opts"),
            f"driver=raw,file.driver=file,file.filename={copy}",
            "driver=nbd,server.type=inet,server.host=localhost,"
            f"server.port={server.port},export=vol0,tls-creds=t",
        )
        run("nbdinfo", server.uri("vol0"), status=1)
        nocert = f"{server.uri('vol0', 'nbds')}?tls-certificates={certificates / 'nocert'}"
        run("nbdinfo", nocert, status=1)
        assert server.process.poll() is None


def test_tls_on_a_unix_socket(certificates: Path, image: Path) -> None:
    good = certificates / "good"
    with (
        tempfile.TemporaryDirectory(prefix="nbd") as folder,
        serve(image, "--tls", str(good), unix=Path(folder) / "s") as server,
    ):
        uri = server.uri("vol0", "nbds") + f"&tls-certificates={good}&tls-hostname=localhost"
        assert run("nbdinfo", "--size", uri).strip() == str(16 * MIB)
        run("nbdinfo", server.uri(), status=1)


# -- who does not


def test_case_30_clients_without_a_good_certificate(secure: Secure) -> None:
    inside = secure.entered()
    for number, folder in enumerate(("nocert", "foreign", "expired"), 1):
        context = client_context(secure.certificates / folder, "localhost")
        with pytest.raises((ssl.SSLError, EOFError, ConnectionError)), secure.client(context) as c:
            c.ask(Opt.GO, info_data(""))
        secure.refused(number)
    # The log hears of one address once a minute.
    assert len(secure.reasons()) == 1
    assert "TLS failed" in secure.reasons()[0]
    inside.write(0, b"i" * 512)
    assert inside.read(0, 512) == b"i" * 512
    inside.sock.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_1"])
def test_case_30_old_tls(secure: Secure, version: str) -> None:
    context = client_context(secure.certificates / "good", "localhost")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion[version]
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        secure.client(context)
    secure.refused(1)


def test_case_30_plaintext_clients(secure: Secure) -> None:
    with RawClient(secure.port) as client:
        client.greet()
        for number in (Opt.GO, Opt.INFO, Opt.LIST, Opt.STRUCTURED_REPLY):
            assert client.ask(number, info_data(""))[-1][0] == Rep.ERR_TLS_REQD
        client.send(option(Opt.EXPORT_NAME, b"vol0"))
        assert client.dropped()
    with RawClient(secure.port) as client:
        client.greet()
        assert client.ask(Opt.STARTTLS) == [(Rep.ACK, b"")]
        client.send(option(Opt.GO, info_data("")))
        client.sock.settimeout(10)
        received = b""
        with suppress(ConnectionResetError):
            while piece := client.sock.recv(100):
                received += piece
        # What comes, if anything, is an alert of TLS and no reply of the protocol.
        assert received[:1] in (b"", b"\x15")


def test_case_30_bytes_injected_before_tls(secure: Secure) -> None:
    with RawClient(secure.port) as client:
        client.greet()
        client.send(option(Opt.STARTTLS) + option(Opt.STRUCTURED_REPLY))
        assert client.dropped()
    secure.refused(1)
    assert "between STARTTLS and TLS" in secure.reasons()[0]


def test_noise_in_place_of_tls(secure: Secure) -> None:
    for noise in (os.urandom(2000), b"\x16\x03\x01\xff\xff" + os.urandom(3000), b"GET / HTTP\r\n"):
        with RawClient(secure.port) as client:
            client.greet()
            client.ask(Opt.STARTTLS)
            client.sock.settimeout(10)
            # It may be dropped at any of these steps.
            with suppress(OSError):
                client.send(noise)
                client.sock.shutdown(socket.SHUT_WR)
                while client.sock.recv(1000):
                    pass
    secure.thread.until(lambda: secure.thread.server.stats.connections == 0)
    with secure.entered() as client:
        assert client.read(0, 512) == bytes(512)


def test_noise_inside_tls(secure: Secure) -> None:
    with secure.entered() as client:
        client.send(os.urandom(100))
        with pytest.raises((EOFError, ConnectionError, ssl.SSLError)):
            client.receive(1)


def test_a_tls_handshake_has_a_deadline(secure: Secure) -> None:
    with RawClient(secure.port) as client:
        client.greet()
        client.ask(Opt.STARTTLS)
        client.send(b"\x16\x03\x01\x02\x00")
        assert client.dropped()
    assert "no handshake within" in secure.reasons()[0]


# -- contexts


def test_hostname_is_checked(secure: Secure) -> None:
    context = client_context(secure.certificates / "good", "elsewhere")
    with RawClient(secure.port) as client:
        client.greet()
        client.ask(Opt.STARTTLS)
        with pytest.raises(ssl.SSLCertVerificationError):
            context.wrap_socket(client.sock, server_hostname="elsewhere")
    assert not client_context(secure.certificates / "good", None).check_hostname


def test_files_that_cannot_be_used(certificates: Path, tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(certificates / "good", copy)
        return copy

    missing = folder("missing")
    (missing / "server-key.pem").unlink()
    with pytest.raises(NotFoundError, match=r"server-key\.pem does not exist"):
        server_context(missing)
    with pytest.raises(NotFoundError, match=r"ca-cert\.pem does not exist"):
        client_context(tmp_path / "nowhere", "h")
    half = folder("half")
    (half / "client-key.pem").unlink()
    with pytest.raises(NotFoundError, match=r"client-key\.pem"):
        client_context(half, "h")
    bad = folder("bad")
    (bad / "ca-cert.pem").write_text("not a certificate")
    with pytest.raises(UsageError, match=r"ca-cert\.pem is not a certificate"):
        server_context(bad)
    garbled = folder("garbled")
    (garbled / "server-cert.pem").write_text("not a certificate")
    with pytest.raises(UsageError, match=r"server-cert\.pem or server-key\.pem cannot be used"):
        server_context(garbled)
    swapped = folder("swapped")
    shutil.copy(swapped / "client-key.pem", swapped / "server-key.pem")
    with pytest.raises(UsageError, match="is not the key of"):
        server_context(swapped)
    directory = folder("directory")
    (directory / "server-key.pem").unlink()
    (directory / "server-key.pem").mkdir()
    with pytest.raises(Exception, match="cannot read") as caught:
        server_context(directory)
    assert caught.value.code == "failed"  # type: ignore[attr-defined]


def test_an_encrypted_key_is_refused_without_a_question(certificates: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encrypted"
    shutil.copytree(certificates / "good", folder)
    key = folder / "server-key.pem"
    run(
        "openssl", "pkcs8", "-topk8", "-in", str(certificates / "good" / "server-key.pem"),
        "-out", str(key), "-passout", "pass:secret",
    )  # fmt: skip
    with pytest.raises(UsageError, match="is encrypted"):
        server_context(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_key_that_may_not_be_read(tmp_path: Path) -> None:
    folder = make_authority(tmp_path / "a")
    os.chmod(folder / "ca-cert.pem", 0)
    os.chmod(tmp_path, 0o711)  # noqa: S103
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.seteuid(65534)
            server_context(folder)
        except PermissionError_ as error:
            status = 0 if "may not be read" in error.message else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
