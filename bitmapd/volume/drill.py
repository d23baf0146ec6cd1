"""A drill: one point of a receiver, exported for a look at it (edge).

What is written to the export is in its overlay and nowhere else; the receiver goes on meanwhile
(`receiver.view`).  The overlay is a file without a name, so that nothing of a drill is left,
however it ends: by `test-failover --end`, with its process, or by itself for want of room
or of an answer.

1. A drill begins when the image is a point as a whole; while one is being applied it waits.
2. One at a time.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmapd.attach.mode import DRAIN_TIMEOUT_S, HOST_POOL_BYTES
from bitmapd.control.events import iso_time
from bitmapd.errors import BitmapdError, UsageError, WrongStateError, explain
from bitmapd.media.aio import AioEngine
from bitmapd.media.base import Device
from bitmapd.media.buffers import BufferPool
from bitmapd.media.kdevice import KernelDevice
from bitmapd.nbd.server.export import NbdServer
from bitmapd.net.tls import server_context
from bitmapd.net.uri import NbdUri, parse_uri
from bitmapd.receiver.applier import Applier
from bitmapd.receiver.receiver import Receiver
from bitmapd.receiver.view import View
from bitmapd.record.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Wanted:
    """`point`: the one that is meant; None: the one that the image has.  `folder` is for the
    overlay."""

    listen: str
    limit_bytes: int
    point: int | None
    folder: Path


class Drill:
    """See the module docstring.  `on_ended` is called when it has ended by itself."""

    def __init__(
        self,
        name: str,
        receiver: Receiver,
        image: Device,
        engine: AioEngine,
        emit: Callable[..., None],
        on_ended: Callable[[], None],
    ) -> None:
        self._name = name
        self._receiver = receiver
        self._image = image
        self._engine = engine
        self._emit = emit
        self._on_ended = on_ended
        self._ending: asyncio.Task[None] | None = None
        self._server: NbdServer | None = None
        self._view: View | None = None
        self._waiting: asyncio.Future[None] | None = None  # for the image to be whole
        self._left = False
        self.point = 0
        self.at: str | None = None

    async def begin(self, wanted: Wanted) -> None:
        """Return when clients may connect.  A BitmapdError leaves nothing behind."""
        uri, tls = _listening(wanted.listen)
        applier, geometry = self._ready()
        self._check_point(wanted.point)
        self._wanted, self._applier = wanted, applier
        self._overlay = await self._make_overlay(wanted.folder, geometry)
        try:
            await self._open(applier, geometry)
            self._check_point(wanted.point)
            self._listen(uri, tls)
        except BaseException:
            await (self._ending or self._close())
            raise
        self._emit("view-opened", point=self.point, device=wanted.listen)

    def _ready(self) -> tuple[Applier, Geometry]:
        journal, applier = self._receiver.journal, self._receiver.applier
        line = journal.superblock.line
        if applier is None or line is None or not journal.page.committed:
            raise WrongStateError(
                f"receiver '{self._name}' has never had a whole point: there is nothing to look at",
                hint="the first one is there when everything was copied",
            )
        return applier, line.geometry

    def _check_point(self, point: int | None) -> None:
        page = self._receiver.journal.page
        if page.inconsistent_until:
            raise WrongStateError(
                f"the image of receiver '{self._name}' is between two points",
                hint="the next point ends that",
            )
        if point not in (None, page.applied):
            raise WrongStateError(
                f"the image of receiver '{self._name}' has point {page.applied}, not {point}",
                hint=f"'dmctl points {self._name}' lists them; one that is applied can be shown",
            )

    async def _make_overlay(self, folder: Path, geometry: Geometry) -> KernelDevice:
        path = folder / f"{self._name}.view"

        def make() -> KernelDevice:
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with path.open("xb") as file:
                file.truncate(geometry.blocks * geometry.block_bytes)
            try:
                return KernelDevice(path, self._engine)
            finally:
                path.unlink()

        try:
            return await self._engine.call(make)
        except OSError as error:
            raise explain(error, f"the overlay {path}") from error

    async def _open(self, applier: Applier, geometry: Geometry) -> None:
        """The view, as soon as the image is a point as a whole: between two steps of the applier,
        so there and then."""
        loop, overlay = asyncio.get_running_loop(), self._overlay
        if geometry.size_bytes % overlay.block_size_bytes:
            raise UsageError(
                f"files in {self._wanted.folder} have blocks of {overlay.block_size_bytes} bytes,"
                f" and the volume's {geometry.size_bytes} are no multiple of that",
                hint="give --overlay DIR in another file system",
            )
        waiting: asyncio.Future[None] = loop.create_future()
        self._waiting = waiting

        def look(_: OSError | None = None) -> None:
            if waiting.done():
                return  # nobody waits any more
            if not applier.is_whole:
                applier.when_applied(look)
                return
            limit_bytes = self._wanted.limit_bytes
            journal = self._receiver.journal
            here = journal.geometry_at(journal.page.size_bytes)
            self._view = View(here, self._image, overlay, limit_bytes, loop, self._failed)
            applier.guard(self._view)
            page = journal.page
            self.point = page.applied
            known = page.applied == page.committed and page.committed_ns
            self.at = iso_time(page.committed_ns / 1e9) if known else None
            waiting.set_result(None)

        look()
        if self._left and not waiting.done():
            waiting.set_exception(self._gone())
        await waiting
        if self._ending is not None:
            raise BitmapdError("the view has ended before anybody saw it", hint="see the events")

    def _gone(self) -> BitmapdError:
        return WrongStateError(f"receiver '{self._name}' stops")

    def _listen(self, uri: NbdUri, tls: ssl.SSLContext | None) -> None:
        loop, view = asyncio.get_running_loop(), self._view
        if view is None:
            raise TypeError("a drill without a view")
        server = NbdServer(
            loop,
            view,
            BufferPool(loop, HOST_POOL_BYTES),
            self._engine.kick,
            export_name=uri.export,
            description=f"point {self.point} of {self._name}",
            tls=tls,
            emit=self._emit,
            cork=self._engine.cork,
            may_spin=lambda: False,
        )
        self._engine.after_reap.append(server.flush_replies)
        self._server = server
        if uri.socket_path is not None:
            server.listen_unix(uri.socket_path, tls=uri.tls)
        else:
            server.listen_tcp(uri.host or "127.0.0.1", uri.port)

    # -- its end --------------------------------------------------------------------------------
    async def end(self) -> None:
        """Clients are cut off once what they had asked for is answered."""
        self._left = True
        if self._server is None:
            if self._waiting is not None and not self._waiting.done():
                self._waiting.set_exception(self._gone())
            return  # `begin` cleans up
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._close())
            self._emit("view-closed", point=self.point)
        await self._ending

    def _failed(self, error: OSError) -> None:
        if error.errno == errno.ENOSPC:
            limit = self._wanted.limit_bytes
            self._emit("view-full", point=self.point, limit_bytes=limit, message=error.strerror)
        else:
            self._emit("view-error", point=self.point, message=error.strerror or str(error))
        if self._ending is None:  # else somebody ends it already
            self._ending = asyncio.ensure_future(self._close())
            self._ending.add_done_callback(lambda _: self._on_ended())

    async def _close(self) -> None:
        if self._server is not None:
            await self._server.drain(DRAIN_TIMEOUT_S)
            self._engine.after_reap.remove(self._server.flush_replies)
        if self._view is not None:
            self._view.end()
            self._applier.guard(None)
            idle = asyncio.Event()
            self._view.when_idle(idle.set)
            await idle.wait()
        await self._engine.call(self._overlay.close)

    def figures(self) -> dict[str, Any] | None:
        """`view` of the status."""
        if self._server is None or self._view is None:
            return None
        return {
            "point": self.point,
            "at": self.at,
            "device": self._wanted.listen,
            "connections": self._server.stats.connections,
            "overlay_bytes": self._view.overlay_bytes,
            "limit_bytes": self._view.limit_bytes,
        }


def _listening(text: str) -> tuple[NbdUri, ssl.SSLContext | None]:
    uri = parse_uri(text)
    if not uri.tls:
        if uri.socket_path is None:
            raise UsageError(
                f"--listen {text} would show the point without encryption",
                hint="a unix socket, or nbds://HOST/NAME?tls-certificates=DIR",
            )
        return uri, None
    if uri.tls_certificates is None:
        raise UsageError(
            f"--listen {text} asks for TLS, and names no certificates",
            hint="append ?tls-certificates=DIR",
        )
    return uri, server_context(Path(uri.tls_certificates))
