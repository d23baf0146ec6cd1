"""Where the export of a volume in nbd mode listens (edge)."""

from __future__ import annotations

import ssl
from pathlib import Path

from bitmapd.config import VolumeConfig
from bitmapd.errors import UsageError
from bitmapd.nbd.server import NbdServer
from bitmapd.nbd.tls import server_context
from bitmapd.nbd.uri import parse_uri


def tls_context(config: VolumeConfig) -> ssl.SSLContext | None:
    """What `listen` asks for; None for a plain export."""
    uri = parse_uri(config.listen)
    if not uri.tls:
        return None
    folder = uri.tls_certificates or config.tls_certificates
    if folder is None:
        raise UsageError(
            f"listen = {config.listen} asks for TLS, but there are no certificates",
            hint="set tls_certificates to their folder",
        )
    return server_context(Path(folder))


def listen(server: NbdServer, config: VolumeConfig, context: ssl.SSLContext | None) -> None:
    """Begin to listen; UsageError for what would be open to others."""
    uri = parse_uri(config.listen)
    if uri.socket_path is not None:
        server.listen_unix(Path(uri.socket_path), tls=uri.tls)
    elif context is None and not config.allow_plaintext_loopback:
        raise UsageError(
            f"listen = {config.listen} would export the volume without encryption",
            hint="use nbds:// with certificates, or a unix socket, or a loopback address with"
            " allow_plaintext_loopback = true",
        )
    else:
        server.listen_tcp(uri.host or "127.0.0.1", uri.port)
