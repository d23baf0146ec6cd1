"""Mistakes of a gate whose hosts write past it, for the simulation of their points to find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest

from bitmapd.gate.changes import Changes
from bitmapd.gate.cycle import CutGate
from bitmapd.gate.direct import DirectPath
from bitmapd.gate.elsewhere import Run
from bitmapd.gate.eras import Eras
from bitmapd.gate.unsettled import Unsettled

Patch = pytest.MonkeyPatch


def one_barrier(patch: Patch) -> None:
    """A cut comes after the barrier that moved all to the gate: what was written between its
    snapshot and its drain is not in the point."""
    patch.setattr(DirectPath, "is_still", property(lambda self: self.routes.all_gated))


def while_direct(patch: Patch) -> None:
    """A cut comes while hosts write past the gate."""
    patch.setattr(DirectPath, "is_still", property(lambda self: not self.is_busy))


def pending_of_later(patch: Patch) -> None:
    """What a barrier brings while a cut is open is pending, too."""

    def join(self: Unsettled, runs: Iterable[Run], since_s: float) -> None:
        self.take(runs, since_s)

    patch.setattr(Unsettled, "join", join)


def pending_is_direct(patch: Patch) -> None:
    """The table that follows a cut has extents that were not read."""
    follow = CutGate.follow

    def following(self: CutGate, done: Callable[[bool], None]) -> None:
        cutting, self._cutting = self._cutting, False
        follow(self, done)
        self._cutting = cutting

    patch.setattr(CutGate, "follow", following)


def pieces_of_the_gate(patch: Patch) -> None:
    """Of a block that the kernel wrote as well only what the gate saw is sent."""

    def take(self: CutGate, runs: Sequence[Run]) -> None:
        Eras._take_from_elsewhere(self, runs)

    patch.setattr(CutGate, "_take_from_elsewhere", take)
    patch.setattr(Changes, "unknown", lambda self, first, stop: None)


MISTAKES: dict[str, Callable[[Patch], None]] = {
    mistake.__name__: mistake
    for mistake in (
        one_barrier,
        while_direct,
        pending_of_later,
        pending_is_direct,
        pieces_of_the_gate,
    )
}
