"""TLS contexts from a folder of certificates: for the export, for the client, for the partner.

| file                                | server   | client          | node     |
| ----------------------------------- | -------- | --------------- | -------- |
| `ca-cert.pem`                       | needed   | needed          | needed   |
| `server-cert.pem`, `server-key.pem` | needed   | not read        | not read |
| `client-cert.pem`, `client-key.pem` | not read | both or neither | not read |
| `node-cert.pem`, `node-key.pem`     | not read | not read        | needed   |

1. Both sides are authenticated by X.509: a client without a certificate that the CA has signed is
   refused by the server, and the other way round.  Nodes check one another's name besides, whoever
   dialled.
2. TLS 1.3 is the least that is spoken.  Session tickets are off: every connection is verified anew.
3. Pre-shared keys are not offered, since Python 3.11 has no interface for them.
4. Keys are not encrypted: a daemon has nobody to ask for a pass phrase.
"""

from __future__ import annotations

import hashlib
import ipaddress
import ssl
from pathlib import Path
from typing import Any

from bitmapd.errors import NotFoundError, PermissionError_, UsageError, refused

CA_CERT = "ca-cert.pem"


class _PassPhraseWanted(Exception):
    """Raised out of OpenSSL's question for a pass phrase, which would go to the terminal."""


def server_context(folder: Path) -> ssl.SSLContext:
    """For accepting clients; raises a BitmapdError that names the file and the reason."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    _prepare(context, folder)
    _load_pair(context, folder, "server")
    return context


def client_context(folder: Path, hostname: str | None) -> ssl.SSLContext:
    """For connecting to a server whose certificate must carry `hostname`, which is also to be
    given to `wrap_socket`.  None checks only that the CA has signed it: for unix sockets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = hostname is not None
    _prepare(context, folder)
    if (folder / "client-cert.pem").exists() or (folder / "client-key.pem").exists():
        _load_pair(context, folder, "client")
    return context


def node_context(folder: Path, *, accepts: bool) -> ssl.SSLContext:
    """For the other node of a volume.  Whether the certificate carries the right name is to be
    asked of `certificate_fault`, on both sides."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if accepts else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if accepts:
        context.num_tickets = 0
    _prepare(context, folder)
    _load_pair(context, folder, "node")
    return context


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate in DER form, as lower-case hexadecimal digits."""
    return hashlib.sha256(certificate).hexdigest()


def certificate_fault(
    connection: ssl.SSLObject | ssl.SSLSocket, name: str, pinned: str | None = None
) -> str | None:
    """What is wrong with the other's certificate, whose chain has been verified: it has to carry
    this DNS name or address, to the letter, and to be the one that is pinned, if one is."""
    certificate = connection.getpeercert() or {}
    entries: Any = certificate.get("subjectAltName", ())
    found = [str(value) for kind, value in entries if kind in ("DNS", "IP Address")]
    if _plain_name(name) not in map(_plain_name, found):
        return f"its certificate is for {', '.join(found) or 'no name'}, not for {name}"
    if pinned is not None:
        found_print = fingerprint(connection.getpeercert(binary_form=True) or b"")
        if found_print != pinned.replace(":", "").lower():
            return f"its certificate has the fingerprint {found_print}, which is not the pinned one"
    return None


def _plain_name(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()


def _prepare(context: ssl.SSLContext, folder: Path) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    path = folder / CA_CERT
    _check_readable(path)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise _bad(path, "is not a certificate in PEM form", error) from error


def _load_pair(context: ssl.SSLContext, folder: Path, side: str) -> None:
    cert, key = folder / f"{side}-cert.pem", folder / f"{side}-key.pem"
    _check_readable(cert)
    _check_readable(key)
    try:
        context.load_cert_chain(cert, key, password=_no_pass_phrase)
    except _PassPhraseWanted as error:
        raise UsageError(
            f"{key} is encrypted", hint="store the key without a pass phrase, readable by root only"
        ) from error
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"{key} is not the key of {cert}") from error
        raise _bad(cert, f"or {key.name} cannot be used", error) from error


def _no_pass_phrase() -> str:
    raise _PassPhraseWanted


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{path} does not exist", hint="TLS needs it; see the manual for how to make it"
        ) from error
    except PermissionError as error:
        raise PermissionError_(f"{path} may not be read by this user") from error
    except OSError as error:
        raise refused(error, f"cannot read {path}") from error


def _bad(path: Path, what: str, error: ssl.SSLError) -> UsageError:
    return UsageError(f"{path} {what}: {error.reason or error}")
