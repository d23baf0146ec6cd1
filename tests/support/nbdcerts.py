"""Certificates for tests, made with certtool: an authority, a server, and clients good and bad."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_CA = "cn = {name}\nca\ncert_signing_key\nexpiration_days = 10\n"
_SERVER = (
    "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\n"
    "signing_key\nexpiration_days = 10\n"
)
_CLIENT = "cn = {name}\ntls_www_client\nsigning_key\nexpiration_days = 10\n"
_EXPIRED = (
    "cn = {name}\ntls_www_client\nsigning_key\n"
    'activation_date = "2020-01-01 00:00:00"\nexpiration_date = "2020-02-01 00:00:00"\n'
)


def _certtool(*arguments: str | Path) -> None:
    if shutil.which("certtool") is None:
        pytest.skip("certtool (gnutls-bin) is not installed: TLS was NOT tested")
    subprocess.run(["certtool", *map(str, arguments)], check=True, capture_output=True)


def _key(path: Path, *kind: str) -> Path:
    _certtool("--generate-privkey", *(kind or ("--key-type=ecdsa",)), "--outfile", path)
    return path


def make_authority(folder: Path, name: str = "test authority") -> Path:
    """Writes ca-cert.pem and ca-key.pem."""
    folder.mkdir(parents=True, exist_ok=True)
    template = folder / "ca.template"
    template.write_text(_CA.format(name=name))
    key = _key(folder / "ca-key.pem")
    _certtool(
        "--generate-self-signed",
        *("--load-privkey", key, "--template", template),
        *("--outfile", folder / "ca-cert.pem"),
    )
    return folder


def issue(authority: Path, folder: Path, side: str, template_text: str, *kind: str) -> None:
    """Writes SIDE-cert.pem, SIDE-key.pem and the authority's ca-cert.pem; `kind` of the key."""
    folder.mkdir(parents=True, exist_ok=True)
    template = folder / f"{side}.template"
    template.write_text(template_text)
    key = _key(folder / f"{side}-key.pem", *kind)
    _certtool(
        "--generate-certificate",
        *("--load-privkey", key, "--template", template),
        *("--load-ca-certificate", authority / "ca-cert.pem"),
        *("--load-ca-privkey", authority / "ca-key.pem"),
        *("--outfile", folder / f"{side}-cert.pem"),
    )
    if authority != folder:
        shutil.copy(authority / "ca-cert.pem", folder)


def make_certificates(folder: Path, *server_key: str) -> Path:
    """Folders: `good` (server and client), `nocert`, `expired`, `foreign` (a client that another
    authority has signed, but that trusts ours).  `server_key`: certtool's options for the key."""
    authority = make_authority(folder / "authority")
    issue(authority, folder / "good", "server", _SERVER, *server_key)
    issue(authority, folder / "good", "client", _CLIENT.format(name="host-a"))
    (folder / "nocert").mkdir()
    shutil.copy(authority / "ca-cert.pem", folder / "nocert")
    issue(authority, folder / "expired", "client", _EXPIRED.format(name="host-b"))
    other = make_authority(folder / "other", "another authority")
    issue(other, folder / "foreign", "client", _CLIENT.format(name="host-c"))
    shutil.copy(authority / "ca-cert.pem", folder / "foreign")
    return folder
