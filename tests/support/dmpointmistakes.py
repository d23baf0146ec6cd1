"""Mistakes of a gate whose hosts write past it, for the simulation of their points to find."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from bitmapd.gate.changes import Changes
from bitmapd.gate.cycle import CutGate
from bitmapd.gate.direct import DirectPath
from bitmapd.gate.elsewhere import Run
from bitmapd.gate.eras import Eras
from bitmapd.gate.routes import Routes
from bitmapd.gate.unsettled import Unsettled

Patch = pytest.MonkeyPatch


def while_direct(patch: Patch) -> None:
    """A cut comes while hosts write past the gate."""
    patch.setattr(DirectPath, "is_still", property(lambda self: not self.is_busy))


def one_barrier(patch: Patch) -> None:
    """A cut comes when nothing is direct any more, though not all that was written so is known."""
    patch.setattr(Routes, "is_still", property(lambda self: self.all_gated))


def pending_later(patch: Patch) -> None:
    """What a barrier brings while a cut is open gets pending."""
    patch.setattr(Unsettled, "join", Unsettled.take)


def pending_and_direct(patch: Patch) -> None:
    """Hosts write past the gate what has still to be read for the point."""
    patch.setattr(CutGate, "_may_be_direct", Eras._may_be_direct)


def growth_to_all(patch: Patch) -> None:
    """The same, where the table only grows."""
    grow = CutGate.grow_direct

    def of_all(self: CutGate, done: Callable[[], None]) -> None:
        cutting, self._cutting = self._cutting, False
        grow(self, done)
        self._cutting = cutting

    patch.setattr(CutGate, "grow_direct", of_all)


def pieces_of_the_gate(patch: Patch) -> None:
    """Of a block that the kernel wrote as well only what the gate saw is sent."""

    def take(self: CutGate, runs: Sequence[Run]) -> None:
        Eras._take_from_elsewhere(self, runs)

    patch.setattr(CutGate, "_take_from_elsewhere", take)
    patch.setattr(Changes, "unknown", lambda self, first, stop: None)


MISTAKES: dict[str, Callable[[Patch], None]] = {
    mistake.__name__: mistake
    for mistake in (
        while_direct,
        one_barrier,
        pending_later,
        pending_and_direct,
        growth_to_all,
        pieces_of_the_gate,
    )
}
