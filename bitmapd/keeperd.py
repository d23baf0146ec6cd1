"""The process of a keeper: `daemon.Daemon` without a volume (edge)."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Final

from bitmapd.config import load_volume
from bitmapd.control.server import Handler, Progress
from bitmapd.process import Process, start_anew
from bitmapd.volume.keeping import Keeping

# Verb of a volume -> what a keeper cannot do.
_REFUSED: Final = {
    "resync": "copy",
    "verify": "compare",
    "pause": "stop copying",
    "resume": "copy",
    "set": "take up settings while it runs",
    "resize": "be the one that grows first",
    "takeover": "let hosts in",
    "demote": "let hosts in, nor stop that",
    "dissolve": "become a volume",
    "point": "cut points",
}


class KeeperProcess(Process[Keeping]):
    """The process of a keeper."""

    def _make_volume(self) -> Keeping:
        config = load_volume(self._paths, self._name)
        keeping = Keeping(config, self._paths, asyncio.get_running_loop(), self._log.emit)
        keeping.on_outdated = start_anew
        return keeping

    def _metrics_listen(self) -> str | None:
        return self.volume.config.metrics_listen

    def _reconfigure(self) -> None:
        self.volume.reconfigure(load_volume(self._paths, self._name))

    def _handlers(self) -> dict[str, Handler]:
        refused = {verb: partial(self._refuse, doing) for verb, doing in _REFUSED.items()}
        return super()._handlers() | refused | {"partner": self._partner}

    async def _refuse(self, doing: str, args: dict[str, Any], progress: Progress) -> Any:
        raise self.volume.refuse(doing)

    async def _partner(self, args: dict[str, Any], progress: Progress) -> Any:
        pair, count = self.volume.pair, int(args.get("ping", 0))
        if args.get("lead"):
            raise self.volume.refuse("lead")
        if count:
            trips = [await self._while_asked(pair.ping(), progress) for _ in range(count)]
            return trips
        return pair.status()
