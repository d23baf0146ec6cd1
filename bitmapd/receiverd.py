"""The process of a receiver: `daemon.Daemon` without hosts (edge)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from bitmapd.config import ReceiverConfig, load_any
from bitmapd.control.server import Handler, Progress
from bitmapd.errors import WrongStateError
from bitmapd.process import Process, start_anew
from bitmapd.volume.promoting import take_over
from bitmapd.volume.receiving import Receiving

VOLUME_VERBS = (
    "resync", "verify", "pause", "resume", "set", "resize", "partner", "takeover", "demote",
    "dissolve", "point",
)  # fmt: skip


class ReceiverProcess(Process[Receiving]):
    """The process of a receiver."""

    def _make_volume(self) -> Receiving:
        receiving = Receiving(self._config(), asyncio.get_running_loop(), self._log.emit)
        receiving.on_failed = self._fail
        receiving.on_handover = self._handover
        return receiving

    def _handover(self, term: int) -> None:
        task = asyncio.ensure_future(self._take_over(term))
        self._tasks.add(task)
        task.add_done_callback(self._ended_unasked)

    async def _take_over(self, term: int) -> None:
        """The volume of this receiver is given to it: begin anew, as a volume."""
        async with self._turn:
            try:
                taken = await take_over(self.volume, term, self._paths)
            except BaseException as error:
                self._fail(error)
                raise
        if taken:
            start_anew()

    def _config(self) -> ReceiverConfig:
        config = load_any(self._paths, self._name)
        if not isinstance(config, ReceiverConfig):
            raise WrongStateError(f"'{self._name}' is no receiver any more")
        return config

    def _metrics_listen(self) -> str | None:
        return self.volume.config.metrics_listen

    def _reconfigure(self) -> None:
        self.volume.reconfigure(self._config())

    def _handlers(self) -> dict[str, Handler]:
        # What is only for volumes says so, and what a receiver can be asked.
        only_volumes = dict.fromkeys(VOLUME_VERBS, self._refuse)
        return (
            only_volumes
            | super()._handlers()
            | {
                "points": self._points,
                "drop-point": self._drop_point,
                "test-failover": self._test_failover,
            }
        )

    async def _has_point(self, newer_than: int) -> None:
        await self.volume.reached(newer_than)

    async def _refuse(self, args: dict[str, Any], progress: Progress) -> Any:
        raise WrongStateError(
            f"'{self._name}' is a receiver, and this is for volumes",
            hint=f"'dmctl points {self._name}' shows what it holds",
        )

    async def _test_failover(self, args: dict[str, Any], progress: Progress) -> Any:
        from bitmapd.volume.drill import Wanted  # noqa: PLC0415  (a server that is rarely needed)

        if args.get("end"):
            return {"ended": await self._to_its_end(self.volume.end_drill(), progress)}
        folder, point = args.get("overlay"), args.get("point")
        wanted = Wanted(
            str(args["listen"]),
            int(args["limit_bytes"]),
            None if point is None else int(point),
            self._paths.state_dir if folder is None else Path(str(folder)),
        )
        return await self._while_asked(self.volume.begin_drill(wanted), progress)

    async def _drop_point(self, args: dict[str, Any], progress: Progress) -> Any:
        await self._to_its_end(self.volume.drop_point(int(args["point"])), progress)
        return {}

    async def _points(self, args: dict[str, Any], progress: Progress) -> Any:
        return {"points": self.volume.points()}
