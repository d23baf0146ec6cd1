"""partner-keys: certificates by which the two nodes of a pair know one another.

1. One authority, two certificates, each for one name and good for both sides of a connection.
2. The authority's key is gone when the command ends: nobody can sign for a third node.  Renewing
   means making all of them anew.
3. All files are there, or none: they are made beside the folder, which then gets its name.  Nothing
   that exists is replaced.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bitmapd.errors import BitmapdError, ExistsError, NotFoundError, UsageError, refused
from bitmapd.net.tls import CA_CERT
from bitmapd.net.uri import host_name
from dmctl.cli.context import Context

DAYS: Final = 3650
NODE_CERT: Final = "node-cert.pem"
NODE_KEY: Final = "node-key.pem"
_MOST_COMMON_NAME: Final = 64  # characters, by X.520

_AUTHORITY: Final = """\
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign
"""
_NODE: Final = """\
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectAltName = {alternative}
"""
_CONFIG: Final = """\
[req]
prompt = no
distinguished_name = subject
x509_extensions = extensions
[subject]
CN = {common_name}
[extensions]
subjectKeyIdentifier = hash
{extensions}"""


def partner_keys(context: Context, args: Namespace) -> int:
    names = _checked(args.names)
    make_partner_keys(args.folder, names)
    folders = {name: str(args.folder / name) for name in names}
    if context.output.as_json:
        context.output.json("partner-keys", {"folders": folders, "days": DAYS})
    else:
        for name, folder in folders.items():
            context.output.line(f"{folder}: for {name}; copy it there as partner_certificates")
    return 0


def _checked(text: str) -> list[str]:
    names = [host_name(name) for name in text.split(",")]
    if len(names) != 2 or names[0].lower() == names[1].lower():
        raise UsageError(f"--names {text}: two different names are needed", hint="write A,B")
    return names


def make_partner_keys(folder: Path, names: Sequence[str], days: int = DAYS) -> None:
    """In a folder of its own for each name: ca-cert.pem, node-cert.pem, node-key.pem.  Raises a
    BitmapdError, ExistsError if the folder is there and not empty."""
    if shutil.which("openssl") is None:
        raise NotFoundError("the program openssl is not installed", hint="install openssl")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExistsError(f"{folder} exists", hint="name a new folder; nothing is replaced")
    try:
        with tempfile.TemporaryDirectory(prefix=".partner-keys-", dir=folder.parent) as name:
            made = Path(name) / "made"
            made.mkdir(mode=0o700)
            _make_all(Path(name), made, names, days)
            made.rename(folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise ExistsError(f"{folder} exists", hint="name a new folder") from error
        raise refused(error, f"cannot make {folder}") from error


def _make_all(work: Path, made: Path, names: Sequence[str], days: int) -> None:
    authority, key = work / CA_CERT, work / "ca-key.pem"
    _certificate(work, authority, key, f"pair of {names[0]} and {names[1]}", _AUTHORITY, days)
    for name in names:
        node = made / name
        node.mkdir(mode=0o700)
        shutil.copyfile(authority, node / CA_CERT)
        extensions = _NODE.format(alternative=_alternative(name))
        signer = ("-CA", str(authority), "-CAkey", str(key))
        _certificate(work, node / NODE_CERT, node / NODE_KEY, name, extensions, days, *signer)


def _alternative(name: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(name)}"
    except ValueError:
        return f"DNS:{name}"


def _certificate(
    work: Path,
    certificate: Path,
    key: Path,
    common_name: str,
    extensions: str,
    days: int,
    *signer: str,
) -> None:
    """A new key, and a certificate for it that is signed by itself or by the signer."""
    config = work / "openssl.cnf"
    config.write_text(
        _CONFIG.format(common_name=common_name[:_MOST_COMMON_NAME], extensions=extensions)
    )
    done = subprocess.run(
        [
            *("openssl", "req", "-x509", "-config", str(config), "-days", str(days), *signer),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BitmapdError(f"openssl cannot make a certificate: {reason}")
    key.chmod(0o600)
