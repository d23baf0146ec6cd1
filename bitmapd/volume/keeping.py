"""A keeper as its process has it: a stored record and a link, and no volume (edge).

The pair is that of a node that serves hosts (`partner/pair`), with nothing behind it: it grants
what the other node asks for, notes it, and stores it.  There is neither gate nor copier.

1. The record stays what it is when the other node is lost, and is stored whole then.
2. What the other takes out of the record is cleared once a second.
3. A size is taken up when the other node says so; the record has to have room for it.

A crash leaves what is stored; what that is worth the superblock says (`partner/keeping`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bitmapd.config import Paths, VolumeConfig
from bitmapd.control.told import Told
from bitmapd.errors import NoSpaceError, WrongStateError
from bitmapd.media.aio import AioEngine
from bitmapd.media.base import Done
from bitmapd.media.identity import identify
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import Aside, completion
from bitmapd.partner.growth import Answer
from bitmapd.partner.node import State
from bitmapd.peer.payloads import Runs
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import record_size_bytes
from bitmapd.record.store import RecordStore
from bitmapd.volume.answers import Answers
from bitmapd.volume.keeper_status import described
from bitmapd.volume.pairing import make_pair
from bitmapd.volume.resize import (
    commit_growth,
    new_page_states,
    prepare_growth,
    record_short_end,
)
from bitmapd.volume.session import RecordSession

TICK_S = 1.0


class NoHosts:
    """`partner.holder.Mirror` and `Copies` where nothing is written: nothing is in flight, dirty,
    or ever ours."""

    embargoed_extents = 0

    def when_landed(self, call: Callable[[], None]) -> None:
        call()

    def when_left(self, extents: Sequence[int], call: Callable[[], None]) -> None:
        call()

    def give(self, extents: Sequence[int]) -> list[tuple[int, int]]:
        return []

    def given(self, extents: Sequence[int], free: Callable[[list[int]], None]) -> set[int]:
        return set()

    def take_over(self, dirt: Iterable[tuple[int, int]], embargoed: Iterable[int]) -> None:
        """Nothing is copied here."""

    def free(self, extents: Iterable[int]) -> None:
        """Nothing was withheld."""

    def free_all(self) -> None:
        """Nothing was withheld."""

    def guessed(self, runs: Runs) -> None:
        """There is no policy."""

    def refused(self, runs: Runs) -> None:
        """There is no policy."""

    def is_clean(self, extent: int) -> bool:
        return True

    def drop_clean(self, extents: Iterable[int]) -> None:
        """Nothing is ours."""


class Keeping:
    """See the module docstring.  All methods are called on the loop's thread."""

    def __init__(
        self,
        config: VolumeConfig,
        paths: Paths,
        loop: asyncio.AbstractEventLoop,
        emit: Callable[..., None],
    ) -> None:
        self.config = config
        self.on_outdated: Callable[[], None] = lambda: None
        self._paths = paths
        self._loop = loop
        self._told = Told(emit)
        self.emit = self._told.emit
        self._stopping = False
        self._changed = asyncio.Event()
        self._tick_timer: asyncio.TimerHandle | None = None
        self._answers = Answers(loop)

    # -- life ------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Look for the other node; on an error everything that was opened is closed again."""
        config, loop = self.config, self._loop
        self._aside = aside = Aside(f"record-{config.name}")
        closing: list[Callable[[], object]] = [aside.close]
        try:
            self._session = await aside(
                partial(RecordSession, config, self._paths, self._emit_aside, node=config.node)
            )
            closing.append(self._session.close)
            self._engine = AioEngine(loop)
            closing.append(self._engine.close)
            self._record = await self._engine.call(
                partial(KernelDevice, config.record, self._engine)
            )
            closing.append(self._record.close)
            await aside(self._session.begin)
            self.geometry = self._session.superblock.geometry
            self._store = RecordStore(
                self.geometry, self._session.loaded, self._record, self._engine, self.emit
            )
            session = self._session
            if session.pair is None:
                raise WrongStateError(f"the record {config.record} is of no pair")
            self.pair = pair = make_pair(
                config, session, session.pair, self._store, loop, self._engine, aside, self, ()
            )
            closing.append(pair.close)
            nothing = NoHosts()
            pair.attach(nothing, nothing)
            pair.node.growth.media = self
            pair.start()
        except BaseException:
            for close in reversed(closing):
                close()
            raise
        self._tick_timer = loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)
        self.pair.tick()
        self._store.flush_clears()
        self.changed()

    async def stop(self, now: bool) -> dict[str, Any]:
        """The other node goes on alone, if it hears of it.  There is nothing to hurry."""
        if self._stopping:
            raise WrongStateError(f"the keeper of '{self.config.name}' is stopping already")
        self._stopping = True
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        await self._answers.end()
        await self.pair.leave()
        extents = self._store.recorded_extents
        self._store.flush_clears()
        try:
            await completion(self._store.when_idle)
        except OSError as error:
            self.emit("record-error", message=f"cannot write the record: {error}")
        self.emit("stopped", clean=False, record_extents=extents, paused=False)
        self.pair.close()
        await self._engine.call(self._record.close)
        idle = asyncio.Event()
        self._engine.when_idle(idle.set)
        await idle.wait()
        await self._aside(self._session.close)
        self._aside.close()
        self._engine.close()
        return {"clean": False, "record_extents": extents, "paused": False}

    def hurry(self) -> None:
        """Nothing is copied that a stop would wait for."""

    def asked(self) -> tuple[int, ...] | None:
        """Figures of which some move when the record answers; None while nothing is asked of it."""
        if not self._engine.in_flight and not self._aside.at_work:
            return None
        return (self._engine.in_flight, self._aside.at_work, self._store.updates)

    def silent_media(self) -> str:
        return f"record {self.config.record}"

    def reconfigure(self, config: VolumeConfig) -> None:
        """Nothing of a keeper changes while it runs."""
        if config != self.config:
            self.emit("settings-refused", message="a keeper takes up its settings at its start")

    # -- partner.pair.Home -----------------------------------------------------------------------
    def changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _emit_aside(self, event: str, **fields: Any) -> None:
        self._loop.call_soon_threadsafe(partial(self.emit, event, **fields))

    def figures(self) -> tuple[int, float, str, int]:
        return 0, 0.0, "down", 0

    def idle_dirt(self, *, wanted: bool) -> Sequence[int]:
        return ()

    def other_died(self, extents: Runs, *, late: bool) -> None:
        """Nothing of it becomes ours."""

    def primary_late_s(self) -> float:
        return 0.0

    def outdated(self) -> None:
        self._loop.call_soon(self.on_outdated)

    # -- partner.growth.Media --------------------------------------------------------------------
    def look(self, size_bytes: int, answer: Answer) -> None:
        self._answers.begin(self._look(size_bytes), answer)

    async def _look(self, size_bytes: int) -> None:
        path, need = self.config.record, record_size_bytes(self._larger(size_bytes).extents)
        found = await self._loop.run_in_executor(None, identify, path)
        if (found.size_bytes or 0) < need:
            raise NoSpaceError(f"record {path} has {found.size_bytes} bytes there and needs {need}")

    def record_end(self, done: Done) -> None:
        """Of the node that grows first, which a keeper never is."""
        self._loop.call_soon(done, None)

    def enlarge(self, size_bytes: int, answer: Answer) -> None:
        self._answers.begin(self._enlarge(self._larger(size_bytes)), answer)

    async def _enlarge(self, geometry: Geometry) -> None:
        end = partial(record_short_end, self._store, self.geometry, self._loop)
        await prepare_growth(self._session, self._store, self._aside, geometry, end)
        await commit_growth(self._session, geometry, self._aside)

    def _larger(self, size_bytes: int) -> Geometry:
        return replace(self.geometry, size_bytes=size_bytes)

    def grow(self, size_bytes: int) -> None:
        geometry = self._larger(size_bytes)
        self._store.grow(geometry, new_page_states(self.geometry, geometry))
        self.pair.grow(geometry)
        self.geometry = geometry
        self.emit("resized", size_bytes=size_bytes)

    # -- what is asked of it ---------------------------------------------------------------------
    @property
    def state(self) -> str:
        if self.pair.state is State.OUTDATED:
            return "failed"
        if self.pair.is_paired and not (self._store.failing or self._store.slow):
            return "keeping"
        return "degraded"

    async def wait(self, state: str) -> None:
        if state == "started":
            return
        if state != "paired":
            raise WrongStateError(
                f"'{self.config.name}' is a keeper here and is never '{state}'",
                hint="it can be waited for until it is started, paired or stopped",
            )
        while not self.pair.is_paired:
            changed = self._changed
            await changed.wait()

    def refuse(self, doing: str) -> WrongStateError:
        """Why it does not do what a volume does."""
        return WrongStateError(
            f"this node keeps the record of '{self.config.name}' and has no way to its primary: it"
            f" cannot {doing}",
            hint="give the command at node 1; see 'A record keeper' in docs/failover.md",
        )

    def status(self) -> dict[str, Any]:
        return described(
            self.config,
            self.geometry,
            self.state,
            self._store,
            self.pair.status(),
            self._session.superblock.session,
            self._told.last_error,
        )
