"""Notices that the file of a medium was deleted or replaced while it is in use (edge).

An open file outlives its name.  Everything goes on as before, and is lost or not found when the
process ends: a volume can be in sync with a secondary that nobody will ever see again.

1. Looked at every `EVERY_S`, on a worker thread: a file system that hangs holds up nobody, and is
   not asked again before it has answered.
2. What is told of (`medium-gone`) counts until it is seen to be over (`medium-back`).
3. Block devices are left out: their names belong to udev, and the device stays.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial

from bitmapd.media.aio import AioEngine
from bitmapd.media.kdevice import KernelDevice

EVERY_S = 5.0

Emit = Callable[..., None]


def missing(name: str, fd: int) -> str | None:
    """Why a file that is open is not what its name leads to; None if it is, or nobody can tell."""
    try:
        mine = os.fstat(fd)
        if not stat.S_ISREG(mine.st_mode):
            return None
        if mine.st_nlink == 0:
            return "was deleted while it is in use; what is in it goes when bitmapd ends"
        found = os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        return "was moved away while it is in use; the next start will not find it"
    except OSError:
        return None
    if (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino):
        return None
    return "leads to another file now; the one that is in use was moved away"


class Presence:
    """See the module docstring."""

    def __init__(
        self,
        media: Sequence[KernelDevice],
        engine: AioEngine,
        loop: asyncio.AbstractEventLoop,
        emit: Emit,
    ) -> None:
        self._media = media
        self._engine = engine
        self._loop = loop
        self._emit = emit
        self._due_s = loop.time() + EVERY_S
        self._looking: asyncio.Task[None] | None = None
        self.gone: dict[str, str] = {}  # by the medium's name, why

    def tick(self) -> None:
        busy = self._looking is not None and not self._looking.done()
        if self._loop.time() >= self._due_s and not busy:
            self._due_s = self._loop.time() + EVERY_S
            self._looking = self._loop.create_task(self.look())

    def end(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    async def look(self) -> None:
        for medium in self._media:
            name, fd = medium.name, medium.fd
            if fd < 0:
                continue
            why = await self._engine.call(partial(missing, name, fd))
            if medium.fd != fd:
                continue  # closed meanwhile: the number may be another file's
            if why is not None and name not in self.gone:
                self._emit("medium-gone", device=name, message=why)
            elif why is None and name in self.gone:
                self._emit("medium-back", device=name)
            self.gone.pop(name, None)
            if why is not None:
                self.gone[name] = why
