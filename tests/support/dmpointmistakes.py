"""Mistakes of a gate whose hosts write past it, for the simulation of their points to find."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from bitmapd.gate.changes import Changes
from bitmapd.gate.cycle import CutGate
from bitmapd.gate.direct import DirectPath
from bitmapd.gate.elsewhere import Run
from bitmapd.gate.eras import Eras

Patch = pytest.MonkeyPatch


def while_direct(patch: Patch) -> None:
    """A cut comes while hosts write past the gate."""
    patch.setattr(DirectPath, "is_still", property(lambda self: not self.is_busy))


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
        pieces_of_the_gate,
    )
}
