"""A demoted site hands the volume over, or finds out what became of that (edge).

The volume's process has ended: the record says DEMOTED, and what is done here is asked for by an
administrator, as often as it takes.  The connection is that of `rejoining.Asking`: the greeting
first, then HANDOVER if the other is the receiver that it was, then TAKEN.
"""

from __future__ import annotations

import asyncio

from bitmapd.config import VolumeConfig
from bitmapd.errors import SplitBrainError, UnreachableError
from bitmapd.peer.words import Error
from bitmapd.points.messages import Handover, Have, Hello2, Message, Role, Taken
from bitmapd.points.switchover import Outlook, outlook
from bitmapd.points.wire import MessageWire
from bitmapd.record.superblock import Superblock
from bitmapd.volume.rejoining import Asking, ask, hello_of
from bitmapd.volume.sending import link_settings


class _Handing(Asking[Outlook]):
    """Over one connection; the other has been asked when `answer` is there."""

    _outlook: Outlook | None = None

    def received(self, wire: MessageWire, message: Message) -> None:
        hello = self.hello
        if isinstance(message, Hello2):
            self._outlook = outlook(hello, message)
            if self._outlook is Outlook.NOT_TAKEN:
                wire.greeted(self.geometry)
            elif self._outlook is Outlook.BUSY:
                self.failure = self._outlook.value
                wire.close()
            else:
                self.answered(self._outlook)
        elif isinstance(message, Have) and message.last and self._outlook is Outlook.NOT_TAKEN:
            wire.send(Handover(hello.term + 1))
        elif isinstance(message, Taken):
            self.answered(Outlook.TAKEN)
        elif isinstance(message, Error):
            self.refusal = message.text
        else:
            super().received(wire, message)


async def hand_over(config: VolumeConfig, superblock: Superblock, within_s: float) -> None:
    """Return when the other site is the volume.  UnreachableError if that is not so in time:
    neither serves then; SplitBrainError if it never will be."""
    handing = _Handing(hello_of(config, superblock, Role.DEMOTED), superblock.geometry)
    found = await handing.ask(link_settings(config), within_s)
    if found is None:
        name = config.name
        raise UnreachableError(
            f"volume '{name}' was given away, and nobody has said that it was taken:"
            f" {config.secondary}: {handing.refusal or handing.failure}",
            hint=f"neither site serves it: 'dmctl switchover {name}' once more, 'dmctl promote"
            f" {name}' at the other site, or 'dmctl promote {name}' to serve it here again",
        )
    if found is not Outlook.TAKEN:
        raise SplitBrainError(
            f"volume '{config.name}' cannot be handed over to {config.secondary}: {found.value}",
            hint="nothing was overwritten; see 'Both were written' in docs/recovery.md",
        )


def hand_over_now(config: VolumeConfig, superblock: Superblock, within_s: float) -> None:
    asyncio.run(hand_over(config, superblock, within_s))


def look_now(config: VolumeConfig, superblock: Superblock) -> Outlook:
    """What the other site is.  UnreachableError if it does not answer."""

    async def look() -> Outlook:
        theirs = await ask(config, superblock, link_settings(config))
        return outlook(hello_of(config, superblock, Role.DEMOTED), theirs)

    return asyncio.run(look())
