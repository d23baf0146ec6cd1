"""media/reporting: what passes, what is told, and in which order."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from bitmapd.media.buffers import aligned
from bitmapd.media.reporting import Reporting
from tests.support.sim import SimDisk, SimLoop, drain

Submit = Callable[[Reporting, Callable[[OSError | None], None]], None]

REQUESTS: dict[str, Submit] = {
    "read": lambda device, done: device.read(4096, aligned(8192), done),
    "write": lambda device, done: device.write(4096, aligned(8192), done, True),
    "zero": lambda device, done: device.zero(4096, 8192, done, fua=True, unmap=False),
    "trim": lambda device, done: device.trim(4096, 8192, done, fua=True),
}


class Rig:
    def __init__(self) -> None:
        self.disk = SimDisk("sda", 1 << 20)
        self.told: list[tuple[Any, ...]] = []
        self.device = Reporting(self.disk, lambda *what: self.told.append(what))

    def ended(self, error: OSError | None) -> None:
        self.told.append(("answer", error))

    def end(self, number: int = 0) -> None:
        if number:
            self.disk.fail_next = {self.disk.pending[0].kind: [number]}
        drain(SimLoop(), self.disk)


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.mark.parametrize("verb", REQUESTS)
def test_a_failure_is_told_before_it_is_answered(rig: Rig, verb: str) -> None:
    REQUESTS[verb](rig.device, rig.ended)
    rig.end(errno.EIO)
    (what, offset, length, told), (_, answer) = rig.told
    assert (what, offset, length) == (verb, 4096, 8192)
    assert isinstance(told, OSError)
    assert told.errno == errno.EIO
    assert answer is told
    assert rig.device.errors == 1


@pytest.mark.parametrize("verb", REQUESTS)
def test_success_is_answered_only(rig: Rig, verb: str) -> None:
    REQUESTS[verb](rig.device, rig.ended)
    assert rig.disk.pending[0].fua == (verb != "read")
    rig.end()
    assert rig.told == [("answer", None)]
    assert rig.device.errors == 0


def test_what_is_not_offered_is_no_failure(rig: Rig) -> None:
    rig.device.zero(0, 4096, rig.ended, fast=True)
    rig.end(errno.EOPNOTSUPP)
    ((_, answer),) = rig.told
    assert isinstance(answer, OSError)
    assert rig.device.errors == 0


def test_a_flush_is_not_told_of(rig: Rig) -> None:
    rig.device.flush(rig.ended)
    rig.end(errno.EIO)
    ((what, answer),) = rig.told
    assert what == "answer"
    assert isinstance(answer, OSError)


def test_the_rest_is_the_devices_own(rig: Rig) -> None:
    device = rig.device
    assert (device.name, device.size_bytes, device.block_size_bytes) == ("sda", 1 << 20, 512)
    found: list[Any] = []
    device.allocation(0, 4096, lambda error, runs: found.append((error, runs)))
    rig.end()
    assert found == [(None, [(4096, 0)])]
    device.close()
    assert not rig.disk.connected
