"""TLS contexts from a folder of certificates, for the export and for the client.

| file                                | server | client                            |
| ----------------------------------- | ------ | --------------------------------- |
| `ca-cert.pem`                       | needed | needed                            |
| `server-cert.pem`, `server-key.pem` | needed | not read                          |
| `client-cert.pem`, `client-key.pem` | not read | both or neither                 |

1. Both sides are authenticated by X.509: a client without a certificate that the CA has signed is
   refused by the server, and the other way round.
2. TLS 1.3 is the least that is spoken.  Session tickets are off: every connection is verified anew.
3. Pre-shared keys are not offered, since Python 3.11 has no interface for them.
4. Keys are not encrypted: a daemon has nobody to ask for a pass phrase.
"""

from __future__ import annotations

import ssl
from pathlib import Path

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
