"""A volume whose secondary is what a server shows of a file."""

from __future__ import annotations

from pathlib import Path

from tests.support.nbdpeers import Peer
from tests.support.volumes import Volume


def served_volume(
    folder: Path, size_bytes: int, server: Peer, backing: Path, options: list[str]
) -> Volume:
    """Not created yet; `backing` is the server's file."""
    return Volume(
        folder,
        size_bytes,
        options=options,
        secondary_target=str(server.uri()),
        media={"secondary": backing},
    )
