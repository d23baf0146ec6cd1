"""Bytes of a connection, from the parts of its frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from bitmapd.peer import frames


def stream(parts: Iterable[frames.Part]) -> bytes:
    """The first frames of a connection."""
    return b"".join(frames.encode(part, number) for number, part in enumerate(parts, 1))


def write_streams(folder: Path, streams: Mapping[str, bytes]) -> None:
    """A file each."""
    folder.mkdir(exist_ok=True)
    for name, data in streams.items():
        (folder / f"{name}.bin").write_bytes(data)
