"""volume/demoting: what has to be over before the role is given away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bitmapd.copier.engine import CopyState
from bitmapd.points.sender import Phase
from bitmapd.volume.demoting import Demoting


async def until(reached: Callable[[], bool]) -> None:
    while not reached():
        await asyncio.sleep(0)


@pytest.fixture
def sender() -> SimpleNamespace:
    """Everything is sent; an empty point is open."""
    return SimpleNamespace(
        phase=Phase.ENDED,
        closing=SimpleNamespace(idle=True),
        state=CopyState.RUNNING,
        uplink=SimpleNamespace(applied=3, known_committed=3),
        is_leaving=False,
        wake=lambda: None,
    )


@pytest.fixture
def demoting(sender: SimpleNamespace) -> Demoting:
    parts: Any = SimpleNamespace(gate=SimpleNamespace(in_sync=True))
    link: Any = SimpleNamespace(sender=sender)
    around: Any = SimpleNamespace(until=until)
    return Demoting("vol0", parts, link, around)


@pytest.mark.parametrize("stage", ["_send_all", "_see_it_applied"])
def test_the_receiver_has_no_point_that_the_volume_does_not_know_of(
    demoting: Demoting, sender: SimpleNamespace, stage: str
) -> None:
    async def test() -> None:
        waiting = asyncio.ensure_future(getattr(demoting, stage)())
        for phase, idle in ((Phase.ENDED, True), (Phase.ENDED, False), (Phase.OPEN, False)):
            sender.phase, sender.closing.idle = phase, idle
            for _ in range(3):
                await asyncio.sleep(0)
            assert not waiting.done()
        sender.closing.idle = True
        await waiting
        assert sender.is_leaving is (stage == "_see_it_applied")

    asyncio.run(test())
