"""volume: a secondary behind a server, and an export with TLS."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitmapd.errors import (
    UnreachableError,
)
from bitmapd.media.waiting import completion
from bitmapd.nbd.client.target import NbdTarget
from bitmapd.net.uri import format_uri, parse_uri
from bitmapd.record.geometry import KIB, MIB
from tests.support.local import LocalVolume
from tests.support.nbdcerts import make_certificates
from tests.support.nbdpeers import nbdkit, short_folder
from tests.support.serving import nothing, run, serving

# -- a server as secondary --------------------------------------------------------------------


def behind(local: LocalVolume, folder: Path, **settings: Any) -> LocalVolume:
    """A volume whose secondary is what `local` exports."""
    folder.mkdir()
    listen = local.config.listen
    made = LocalVolume(folder, local.paths.run_dir, "front", secondary=listen, **settings)
    made.primary.write_bytes(local.primary.read_bytes()[: made.geometry.size_bytes])
    return made


def test_a_volume_may_be_the_secondary_of_another(local: LocalVolume, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(local) as back:
            front = behind(local, tmp_path / "front")
            async with serving(front) as served:
                await served.write(3 * MIB, b"f" * 64 * KIB)
                await served.in_sync()
                found = await served.volume.verify(False, nothing)
                assert found["unexpected_bytes"] == 0
                assert back.volume.gate.writes >= 1
                for one in (local, front):
                    os.truncate(one.primary, 9 * MIB)
                os.truncate(local.secondary, 9 * MIB)
                await back.volume.resize()
                assert (await served.volume.resize())["changed"]
                await served.event("link-up")
                await served.write(8 * MIB, b"g" * 64 * KIB)
                await served.in_sync()
                await back.in_sync()
            assert front.primary.read_bytes() == local.primary.read_bytes()

    run(test())
    assert local.differing() == set()


def test_a_server_that_is_away_does_not_keep_a_volume_from_starting(
    local: LocalVolume, tmp_path: Path
) -> None:
    async def test() -> None:
        front = behind(local, tmp_path / "front")
        async with serving(front, now=True) as served:
            assert served.volume.state == "link-down"
            await served.write(3 * MIB, b"f" * 64 * KIB)
            os.truncate(front.primary, 9 * MIB)
            with pytest.raises(UnreachableError):
                await served.volume.resize()
            async with serving(local) as back:
                await served.event("link-up")
                await served.in_sync()
                assert back.volume.gate.writes >= 1

    run(test())
    assert local.primary.read_bytes()[3 * MIB : 3 * MIB + 64 * KIB] == b"f" * 64 * KIB


@pytest.mark.parametrize("late", [False, True], ids=["at once", "while it copies"])
@pytest.mark.parametrize("eras", [False, True], ids=["nbd", "dm"])
def test_a_stop_in_a_hurry_waits_for_no_server(
    make_local: Callable[..., LocalVolume],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: bool,
    eras: bool,
) -> None:
    """A server that takes requests and does not answer them.

    `eras`: the last ones have to end first, which they do while no copy is in flight.
    """
    with short_folder() as folder, nbdkit(folder, "memory", f"{8 * MIB}") as server:
        local = make_local(secondary=format_uri(server.uri()))

        async def test() -> None:
            async with serving(local) as served:
                server.stop()
                await served.write(3 * MIB, b"f" * 64 * KIB)
                served.volume.copier.wake()
                while served.volume.copier.idle:
                    await asyncio.sleep(0.01)
                copier = served.volume.copier
                if eras:
                    monkeypatch.setattr(
                        served.volume._parts.mode,
                        "last_writes",
                        lambda end: end(lambda: copier.idle),
                    )
                stop = asyncio.ensure_future(served.volume.stop(not late))
                if late:
                    await asyncio.wait([stop], timeout=0.3)
                    assert not stop.done()
                    served.volume.hurry()
                assert (await stop)["clean"] is False

        try:
            run(test())
        finally:
            server.signal(signal.SIGCONT)
    assert 3 in local.recorded()


def test_an_export_with_tls(make_local: Callable[..., LocalVolume], tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path) / "good"
    local = make_local(tls_certificates=str(certificates))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    local.config = dataclasses.replace(local.config, listen=f"nbds://127.0.0.1:{port}/vol0")

    async def test() -> None:
        async with serving(local) as served:
            uri = parse_uri(local.config.listen)
            target = NbdTarget(asyncio.get_running_loop(), uri, tls_certificates=certificates)
            await completion(target.open)
            assert target.size_bytes == 8 * MIB
            assert served.volume.status()["connections"] == 1
            target.close()

    run(test())
