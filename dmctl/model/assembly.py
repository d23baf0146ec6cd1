"""When a volume is to be started by itself: after its media have come, in whatever order (pure).

`Assembly` takes what is missing and answers what to do; it knows no devices and no clock.

1. Each arrival of a complete set of media starts the volume once.  What an administrator stops
   stays stopped until its primary or its record has gone and come back.
2. Without primary or record nothing is started, and no receiver without image or journal.  A local
   secondary is waited for as long as the patience lasts; after that the volume starts without it,
   as it would go on running without it. A secondary that is reached through the network is not
   waited for at all.
3. A start that failed for a reason that may pass is tried again, at growing intervals.
4. A volume whose process ended without having been stopped is started again in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from bitmapd.config.receiver import ReceiverConfig
from bitmapd.config.volume import VolumeConfig, is_keeper
from bitmapd.net.uri import is_remote

PATIENCE_S = 30.0
FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
# What trying again cannot mend: usage, not found, record damaged, too new, of another volume.
# bitmapd@.service has the same list.
FINAL_STATUSES = frozenset({2, 10, 20, 21, 22})

NEEDED = frozenset({"primary", "record", "image", "journal"})


class Do(Enum):
    NOTHING = "nothing"
    WAIT = "wait"  # something is missing that was not missing before: say so
    START = "start"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, what is missing meanwhile, and when to ask again if nothing happens before."""

    do: Do
    missing: tuple[str, ...] = ()
    again_at_s: float | None = None


def local_media(config: VolumeConfig | ReceiverConfig) -> dict[str, str]:
    """Role -> path of the media that are waited for."""
    if isinstance(config, ReceiverConfig):
        return {"image": config.image, "journal": config.journal}
    if is_keeper(config):
        return {"record": config.record}
    media = {"primary": config.primary, "record": config.record}
    if not is_remote(config.secondary):
        media["secondary"] = config.secondary
    return media


class Assembly:
    """One volume.  Times are in seconds of one clock that never goes back.

    `armed` says whether the next complete set of media starts it.
    """

    def __init__(self, *, armed: bool = True, patience_s: float = PATIENCE_S) -> None:
        self._armed = armed
        self._patience_s = patience_s
        self._said: frozenset[str] = frozenset()
        self._give_up_s: float | None = None  # when to start without the secondary
        self._retry_at_s: float | None = None
        self._retry_s = FIRST_RETRY_S
        self._started_s = 0.0

    def look(self, missing: Sequence[str], now_s: float) -> Verdict:
        """What to do about the roles that are missing now."""
        gone = frozenset(missing)
        told = tuple(sorted(gone))
        if gone & NEEDED:
            self._armed = True
            self._give_up_s = None
            self._retry_at_s = None
            self._retry_s = FIRST_RETRY_S
            return Verdict(self._say(gone), told)
        if not self._armed:
            self._said = frozenset()
            return Verdict(Do.NOTHING)
        if self._retry_at_s is not None and now_s < self._retry_at_s:
            return Verdict(Do.NOTHING, told, self._retry_at_s)
        if gone:
            if self._give_up_s is None:
                self._give_up_s = now_s + self._patience_s
            if now_s < self._give_up_s:
                return Verdict(self._say(gone), told, self._give_up_s)
        self._armed = False
        self._said = frozenset()
        self._give_up_s = None
        self._retry_at_s = None
        self._started_s = now_s
        return Verdict(Do.START, told)

    def _say(self, gone: frozenset[str]) -> Do:
        said, self._said = self._said, gone
        return Do.NOTHING if gone == said else Do.WAIT

    def failed(self, status: int, now_s: float) -> float | None:
        """The start that `look` asked for ended with this exit status; when it is tried again."""
        if status in FINAL_STATUSES:
            return None
        return self._again(now_s)

    def died(self, now_s: float) -> float:
        """The volume's process ended, and nobody had asked for it; when it is started again."""
        if now_s - self._started_s > LONGEST_RETRY_S:
            self._retry_s = FIRST_RETRY_S
        return self._again(now_s)

    def _again(self, now_s: float) -> float:
        self._armed = True
        self._retry_at_s = now_s + self._retry_s
        # What was waited for once is not waited for a second time.
        self._give_up_s = now_s
        self._retry_s = min(self._retry_s * 2, LONGEST_RETRY_S)
        return self._retry_at_s
