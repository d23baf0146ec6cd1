"""What has the turn of a process, and what does not wait for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

from bitmapd.config import Paths
from bitmapd.errors import BitmapdError, BusyError, WrongStateError
from tests.support.serving import process_of


@pytest.mark.parametrize("refused", [True, False])
def test_a_stop_that_fails_ends_the_process_and_one_that_is_refused_does_not(
    tmp_path: Path, refused: bool
) -> None:
    """Of a pair that is dissolved."""
    error = BusyError("in use") if refused else BitmapdError("the superblock cannot be written")

    async def dissolve() -> None:
        volume = Mock(stop=AsyncMock(side_effect=error), stopping=not refused)
        it = process_of(Paths(tmp_path, tmp_path), volume)
        with pytest.raises(BitmapdError) as raised:
            await it._become_single()
        assert raised.value is error
        assert it._failure is (None if refused else error)
        assert it._ended.is_set() is not refused
        assert not it._turn.locked()

    asyncio.run(dissolve())


def test_a_stop_does_not_wait_for_a_resize_that_nobody_answers(tmp_path: Path) -> None:
    async def stop() -> None:
        answer = asyncio.get_running_loop().create_future()
        given_up = WrongStateError("the volume is being stopped")
        volume = Mock(
            make_way=Mock(side_effect=lambda: answer.set_exception(given_up)),
            stop=AsyncMock(return_value={"clean": True}),
        )
        volume.resize.return_value = answer
        it = process_of(Paths(tmp_path, tmp_path), volume)
        growing = asyncio.ensure_future(it._take_up_size())
        await asyncio.sleep(0)
        assert it._turn.locked()
        async with asyncio.timeout(30):
            assert await it._begin_stop(False) == {"clean": True}
        with pytest.raises(WrongStateError):
            await growing

    asyncio.run(stop())
