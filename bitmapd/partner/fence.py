"""The other node is fenced, and then this one serves alone (edge).

`run` has the configured agent make certain that the other can write no more, waits until nothing
that it had sent to the primary can land any more, and only then has `Node` go alone.  `tick` begins
this by itself where the configuration wants it (`fence_policy`).

1. One at a time, whoever has asked.
2. From the beginning to the end the node takes no connection of the other: nothing is agreed on
   with a node that is being shot.
3. Exit status 0 of the agent is the only proof.  After any other outcome this node is what it was.
4. Late writes to the secondary are the copier's affair (`copier/late`); those to the primary would
   lie on top of what hosts write from then on, so they are waited for here.

A crash at any point leaves a node that is not alone.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import Any, Final, Protocol

from bitmapd.errors import BitmapdError, BusyError, UnreachableError
from bitmapd.media.waiting import Aside
from bitmapd.partner.agent import run
from bitmapd.partner.fence_policy import FenceSettings, Trigger, request
from bitmapd.partner.node import Node
from bitmapd.partner.states import Proof

OFF: Final = FenceSettings()


class Home(Protocol):
    """The appliance around it."""

    def emit(self, event: str, **fields: Any) -> None: ...

    def changed(self) -> None: ...

    def primary_late_s(self) -> float:
        """For how long what the other had sent to the primary may go on to land there."""


class Fence:
    """See the module docstring."""

    def __init__(self, node: Node, loop: asyncio.AbstractEventLoop, home: Home) -> None:
        self.settings = OFF
        self._node = node
        self._loop = loop
        self._home = home
        self._trigger = Trigger()
        self._aside = Aside("fence")
        self._wanting: int | None = None  # end of a pipe: while it is open the agent is wanted
        self._tasks: set[asyncio.Task[None]] = set()
        self.step: str | None = None  # "agent", "late-writes": what is waited for

    @property
    def is_configured(self) -> bool:
        return self.settings.command is not None

    def paired(self) -> None:
        self._trigger.paired()

    def tick(self, cut_for_s: float | None, waiting: int) -> None:
        """Once a second; see `Trigger.is_due`."""
        due = self._trigger.is_due(self.settings, self._loop.time(), cut_for_s, waiting)
        if due and self.step is None:
            task = self._loop.create_task(self._by_itself())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _by_itself(self) -> None:
        try:
            await self.run()
        except BusyError:
            return  # they are just coming together; if not, the next tick is not far
        except UnreachableError:
            return  # was reported, and is tried again later

    async def run(self) -> None:
        """Return when the node goes alone, or need not any more.  UnreachableError if nothing is
        proven; BusyError, WrongStateError if the node cannot go alone now."""
        settings = self.settings
        if settings.command is None:
            raise UnreachableError("there is no fence_command")
        if self.step is not None:
            raise BusyError("a fence command is at work already: wait for its outcome")
        self._node.hold_off()
        self._become("agent")
        try:
            await self._prove(settings, settings.command)
            if not settings.aborts_io and (late_s := self._home.primary_late_s()):
                self._become("late-writes")
                await asyncio.sleep(late_s)
        finally:
            self._node.let_in()
            self._become(None)
        self._node.fenced(Proof.FENCE)

    def _become(self, step: str | None) -> None:
        self.step = step
        self._home.changed()

    async def _prove(self, settings: FenceSettings, command: str) -> None:
        """UnreachableError if it does not."""
        self._home.emit("fence-started", command=command, plug=settings.plug)
        began_s = self._loop.time()
        said = request(settings.plug, settings.options)
        try:
            wanted, self._wanting = os.pipe2(os.O_CLOEXEC)
            outcome = await self._aside(partial(run, command, said, settings.timeout_s, wanted))
        except OSError as error:
            raise self._failed(command, f"cannot be run: {error.strerror or error}") from error
        finally:
            self._let_go()
            self._trigger.ended(self._loop.time())
        if outcome.status != 0:
            raise self._failed(command, outcome.explain(settings.timeout_s))
        seconds = round(self._loop.time() - began_s, 3)
        self._home.emit(
            "fenced",
            seconds=seconds,
            message=f"{command} says that {settings.plug} can write no more",
        )

    def _failed(self, command: str, what: str) -> BitmapdError:
        message = f"fence command {command} {what}"
        self._home.emit("fence-failed", message=f"{message}; nothing is proven")
        return UnreachableError(
            f"{message}, so nothing proves that the partner can write no more",
            hint="mend it and try again; or make certain yourself, then take over with --fenced",
        )

    def close(self) -> None:
        """The agent is killed if it is at work."""
        for task in self._tasks:
            task.cancel()
        self._let_go()
        self._aside.close()

    def _let_go(self) -> None:
        if self._wanting is not None:
            os.close(self._wanting)
            self._wanting = None
