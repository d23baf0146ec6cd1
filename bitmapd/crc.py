"""CRC-32C, by the package crc32c, of which only the extension is loaded.

The package itself asks `importlib.metadata` for its own version and brings a command line along:
email, zipfile, random and more, 1.7 MiB of locked memory in every process of a volume
(`make bench-cost`).
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Protocol, cast


class Crc(Protocol):
    """The checksum of data that follow upon data whose checksum is `value`."""

    def __call__(self, data: bytes | bytearray | memoryview, value: int = 0, /) -> int: ...


def _load(package: str, extension: str) -> Crc:
    """`package.crc32c`, out of `package.extension` if the package is made so."""
    found = PathFinder.find_spec(package)
    places = None if found is None else found.submodule_search_locations
    spec = PathFinder.find_spec(f"{package}.{extension}", places)
    if spec is None or spec.loader is None:
        return cast(Crc, __import__(package).crc32c)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Crc, module.crc32c)


crc32c = _load("crc32c", "_crc32c")
