"""A filter over a device: tells of every request that fails, and hands the error on.

What the mirror itself asks of a medium is answered for where it is asked; a host's request ends at
the host, and without this nobody else would learn that a disk has begun to fail.

1. Requests and answers pass unchanged; `failed` is called before the answer is.
2. A flush is not told of: who relies on it says so (the copier), because more follows from it.
3. An operation that the medium does not offer is no failure.
"""

from __future__ import annotations

import errno
from typing import Protocol

from bitmapd.media.base import AllocationDone, Device, Done


class Failed(Protocol):
    def __call__(self, verb: str, offset_bytes: int, length_bytes: int, error: OSError) -> None: ...


class Reporting:
    """The part of a `Device` that a gate uses; see the module docstring."""

    def __init__(self, device: Device, failed: Failed) -> None:
        self.errors = 0
        self._device = device
        self._failed = failed
        self._read = device.read
        self._write = device.write

    @property
    def name(self) -> str:
        return self._device.name

    @property
    def size_bytes(self) -> int:
        return self._device.size_bytes

    @property
    def block_size_bytes(self) -> int:
        return self._device.block_size_bytes

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        def ended(error: OSError | None) -> None:
            if error is not None:
                self._tell("read", offset_bytes, len(buffer), error)
            done(error)

        self._read(offset_bytes, buffer, ended)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        def ended(error: OSError | None) -> None:
            if error is not None:
                self._tell("write", offset_bytes, len(buffer), error)
            done(error)

        self._write(offset_bytes, buffer, ended, fua)

    def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = True,
        fast: bool = False,
    ) -> None:
        def ended(error: OSError | None) -> None:
            if error is not None:
                self._tell("zero", offset_bytes, length_bytes, error)
            done(error)

        self._device.zero(offset_bytes, length_bytes, ended, fua=fua, unmap=unmap, fast=fast)

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        def ended(error: OSError | None) -> None:
            if error is not None:
                self._tell("trim", offset_bytes, length_bytes, error)
            done(error)

        self._device.trim(offset_bytes, length_bytes, ended, fua=fua)

    def flush(self, done: Done) -> None:
        self._device.flush(done)

    def allocation(self, offset_bytes: int, length_bytes: int, done: AllocationDone) -> None:
        self._device.allocation(offset_bytes, length_bytes, done)

    def close(self) -> None:
        self._device.close()

    def _tell(self, verb: str, offset_bytes: int, length_bytes: int, error: OSError) -> None:
        if error.errno != errno.EOPNOTSUPP:
            self.errors += 1
            self._failed(verb, offset_bytes, length_bytes, error)
