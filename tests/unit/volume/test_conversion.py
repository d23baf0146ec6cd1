"""What becomes of a pair's configuration in a single volume, and the other way round."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

from bitmapd.config import Paths, changed, keys, load_volume
from bitmapd.config.tables import OF_A_PAIR
from bitmapd.control.events import EventLog
from bitmapd.daemon import Daemon
from bitmapd.errors import BitmapdError, BusyError
from bitmapd.lastresort import LastResort
from bitmapd.volume import conversion
from dmctl.cli.joining import _pair_keys

PAIR = """
uuid = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
primary = "/dev/p"
secondary = "/dev/s"
record = "/dev/r"
attach = "nbd"
node = 1
partner = "unix:///b"
partner_listen = "unix:///a"
serve = "on-promote"
record_on = "partner"
partner_ack = "stored"
on_cut = "go-on"
fence_command = "/bin/true"
takeover = "auto"
"""


def test_nothing_is_left_that_a_single_volume_must_not_have(tmp_path: Path, monkeypatch) -> None:
    paths = Paths(tmp_path / "etc", tmp_path / "run")
    paths.volumes_dir.mkdir(parents=True)
    paths.volume_file("vol0").write_text(PAIR)
    monkeypatch.setattr(conversion, "_convert", lambda *_: None)  # no record is here
    conversion.become_single(load_volume(paths, "vol0"), paths, print)
    config = load_volume(paths, "vol0")
    assert config.node is None
    assert {name: getattr(config, name) for name in OF_A_PAIR} == OF_A_PAIR


def test_all_of_it_can_be_said_of_a_volume_that_becomes_a_pair(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "etc", tmp_path / "run")
    paths.volumes_dir.mkdir(parents=True)
    single = "\n".join(PAIR.splitlines()[:6])
    paths.volume_file("vol0").write_text(single)
    words = [line.split(" = ") for line in PAIR.splitlines()[6:]]
    changes = {name: value.strip('"') for name, value in words}
    config = changed(load_volume(paths, "vol0"), changes, also=_pair_keys())
    assert (config.node, config.on_cut, config.record_on) == (1, "go-on", "partner")
    assert set(_pair_keys()) <= {key.name for key in keys().values()}


@pytest.mark.parametrize("refused", [True, False])
def test_a_stop_that_fails_ends_the_process_and_one_that_is_refused_does_not(
    tmp_path: Path, refused: bool
) -> None:
    """Of a pair that is dissolved."""
    error = BusyError("in use") if refused else BitmapdError("the superblock cannot be written")

    async def dissolve() -> None:
        log = EventLog("vol0", wall_clock=time.time, clock=time.monotonic)
        process = Daemon(Paths(tmp_path, tmp_path), "vol0", log, LastResort(Mock(), Mock()))
        process.volume = Mock(stop=AsyncMock(side_effect=error), stopping=not refused)
        with pytest.raises(BitmapdError) as raised:
            await process._become_single()
        assert raised.value is error
        assert process._failure is (None if refused else error)
        assert process._ended.is_set() is not refused
        assert not process._turn.locked()

    asyncio.run(dissolve())
