"""Copies of an image that are kept: clones of its file, or whatever a program makes (edge).

A clone shares its blocks with the image until either is written (FICLONE: XFS, btrfs and others).
Its file is `IMAGE.point-NUMBER`, beside the image.  On XFS the time that it takes grows with the
extents of the image, 0.08 ms for each: seconds for one that was written all over.  So copies are
made on a worker thread, and only of points that stay.

A program (`point_hook`) is called with

    keep|drop|restore NAME POINT IMAGE WALLTIME LABEL

and succeeds with status 0.  WALLTIME is in seconds since 1970.  Any of the three may come again for
a point for which it has come before.

1. A clone has its name only when it is whole and durable; what a crash leaves has another one, and
   is written over or taken away with the point.
2. Of the image nothing is written but by `restore`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from bitmapd.config import ReceiverConfig
from bitmapd.media.aio import AioEngine
from bitmapd.media.base import Done
from bitmapd.partner.agent import run
from bitmapd.receiver.directory import KeptPoint
from bitmapd.receiver.keeping import Keeper

_FICLONE: Final = 0x40049409  # linux/fs.h
_RESTORE_S: Final = 86400.0  # a program may have to copy the whole image


def keeper_of(config: ReceiverConfig, engine: AioEngine) -> Keeper:
    """Who keeps the points of this receiver."""
    if config.point_hook is not None:
        return Hook(config, config.point_hook, engine)
    return Clones(config.image, engine)


def clone_obstacle(image: str) -> str | None:
    """Why the file of an image cannot be cloned.  It is tried with another file beside it."""
    path = Path(image).resolve()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return f"the image {image} is no file, and there is no point_hook that keeps its points"
        with (
            tempfile.TemporaryFile(dir=path.parent) as source,
            tempfile.TemporaryFile(dir=path.parent) as clone,
        ):
            source.write(bytes(4096))
            source.flush()
            fcntl.ioctl(clone.fileno(), _FICLONE, source.fileno())
    except OSError as error:
        return f"files beside the image {image} cannot be cloned: {error.strerror}"
    return None


class _Aside:
    """Calls that block, on a thread of the engine."""

    def __init__(self, engine: AioEngine) -> None:
        self._engine = engine

    def _do(self, call: Callable[[], None], done: Done) -> None:
        self._engine.offload(call, lambda error, _: done(error), aside=True)


class Clones(_Aside):
    """Of the file of an image."""

    def __init__(self, image: str, engine: AioEngine) -> None:
        super().__init__(engine)
        self.obstacle = clone_obstacle(image)
        self._image = Path(image).resolve()

    def keep(self, kept: KeptPoint, done: Done) -> None:
        self._do(partial(self._keep, self._clone(kept)), done)

    def drop(self, kept: KeptPoint, done: Done) -> None:
        self._do(partial(self._drop, self._clone(kept)), done)

    def restore(self, kept: KeptPoint, done: Done) -> None:
        self._do(partial(self._restore, self._clone(kept)), done)

    def _clone(self, kept: KeptPoint) -> Path:
        return self._image.with_name(f"{self._image.name}.point-{kept.point}")

    def _keep(self, clone: Path) -> None:
        half = _half(clone)
        with self._image.open("rb") as image, open(half, "wb", opener=_private) as file:
            fcntl.ioctl(file.fileno(), _FICLONE, image.fileno())
            os.fsync(file.fileno())
        half.rename(clone)
        _sync_folder(clone)

    def _drop(self, clone: Path) -> None:
        for path in (_half(clone), clone):
            path.unlink(missing_ok=True)
        _sync_folder(clone)

    def _restore(self, clone: Path) -> None:
        with clone.open("rb") as kept, self._image.open("rb+") as image:
            fcntl.ioctl(image.fileno(), _FICLONE, kept.fileno())
            os.fsync(image.fileno())


def _half(clone: Path) -> Path:
    return clone.with_name(f"{clone.name}.new")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Hook(_Aside):
    """A program of the administrator's."""

    obstacle: str | None = None

    def __init__(self, config: ReceiverConfig, program: str, engine: AioEngine) -> None:
        super().__init__(engine)
        self._config = config
        self._program = program

    def keep(self, kept: KeptPoint, done: Done) -> None:
        self._do(partial(self._call, "keep", kept, self._config.hook_timeout_s), done)

    def drop(self, kept: KeptPoint, done: Done) -> None:
        self._do(partial(self._call, "drop", kept, self._config.hook_timeout_s), done)

    def restore(self, kept: KeptPoint, done: Done) -> None:
        self._do(partial(self._call, "restore", kept, _RESTORE_S), done)

    def _call(self, action: str, kept: KeptPoint, timeout_s: float) -> None:
        config, at_s = self._config, kept.wall_ns // 10**9
        words = (action, config.name, str(kept.point), config.image, str(at_s), kept.label)
        wanted, held = os.pipe2(os.O_CLOEXEC)
        with contextlib.closing(os.fdopen(held, "wb")):
            outcome = run(self._program, b"", timeout_s, wanted, words)
        if outcome.status != 0:
            code = errno.ETIMEDOUT if outcome.status is None else errno.EIO
            raise OSError(code, f"{action} {outcome.explain(timeout_s)}")
