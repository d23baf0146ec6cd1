"""gate/gate: the errors of the primary that hosts are given, and who else is told of them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from bitmapd.gate.gate import Gate
from bitmapd.media.base import Done
from bitmapd.media.buffers import aligned
from tests.support.mirror import BLOCK, EXTENT, Mirror

OFFSET, LENGTH = BLOCK, 2 * BLOCK
Submit = Callable[[Gate, Done], None]

REQUESTS: dict[str, Submit] = {
    "read": lambda gate, done: gate.read(OFFSET, aligned(LENGTH), done),
    "write": lambda gate, done: gate.write(OFFSET, aligned(LENGTH), done),
    "zero": lambda gate, done: gate.zero(OFFSET, LENGTH, done, unmap=False),
    "trim": lambda gate, done: gate.trim(OFFSET, LENGTH, done),
}
CHANGES: dict[str, Submit] = {
    "write": lambda gate, done: gate.write(OFFSET, aligned(LENGTH), done, fua=True),
    "zero": lambda gate, done: gate.zero(OFFSET, LENGTH, done, fua=True),
    "trim": lambda gate, done: gate.trim(OFFSET, LENGTH, done, fua=True),
}


class Rig:
    """A gate, and in one list what it told and what it answered."""

    def __init__(self, *, recorded: bool) -> None:
        self.mirror = Mirror()
        self.gate = self.mirror.gate
        if recorded:
            self.mirror.policy.kept = {0}
            self.mirror.put(OFFSET // BLOCK)
        self.told: list[tuple[Any, ...]] = []
        self.gate.on_primary_error = lambda *what: self.told.append(what)
        self.gate.on_flush_error = lambda error: self.told.append(("flush", error))

    def ended(self, error: OSError | None) -> None:
        self.told.append(("answer", error))

    def end(self, error: int) -> None:
        """Have the record written, and the primary's request fail or succeed."""
        mirror = self.mirror
        mirror.turn()
        while mirror.record.pending:
            mirror.finish(mirror.record)
        assert len(mirror.primary.pending) == 1
        if error:
            mirror.fail(mirror.primary, error)
        else:
            mirror.finish(mirror.primary)


@pytest.fixture(params=[True, False], ids=["hit", "miss"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(recorded=request.param)


@pytest.mark.parametrize("verb", REQUESTS)
def test_a_failure_is_told_before_it_is_answered(rig: Rig, verb: str) -> None:
    REQUESTS[verb](rig.gate, rig.ended)
    rig.end(errno.EIO)
    (what, offset, length, told), (_, answer) = rig.told
    assert (what, offset, length) == (verb, OFFSET, LENGTH)
    assert isinstance(told, OSError)
    assert told.errno == errno.EIO
    assert answer is told
    assert rig.gate.primary_errors == 1


@pytest.mark.parametrize("verb", CHANGES)
def test_one_that_should_have_been_durable_is_told_to_the_copier_too(rig: Rig, verb: str) -> None:
    CHANGES[verb](rig.gate, rig.ended)
    rig.end(errno.EIO)
    assert [what for what, *_ in rig.told] == [verb, "flush", "answer"]


@pytest.mark.parametrize("verb", REQUESTS)
def test_success_is_answered_only(rig: Rig, verb: str) -> None:
    REQUESTS[verb](rig.gate, rig.ended)
    rig.end(0)
    assert rig.told == [("answer", None)]
    assert rig.gate.primary_errors == 0


def test_what_is_not_offered_is_no_failure(rig: Rig) -> None:
    rig.gate.zero(0, EXTENT, rig.ended, fast=True)
    rig.end(errno.EOPNOTSUPP)
    ((_, answer),) = rig.told
    assert isinstance(answer, OSError)
    assert rig.gate.primary_errors == 0


def test_a_flush_is_told_to_the_copier_only(rig: Rig) -> None:
    rig.gate.flush(rig.ended)
    rig.end(errno.EIO)
    assert [what for what, *_ in rig.told] == ["flush", "answer"]
    assert rig.gate.primary_errors == 0


def test_a_gate_that_nobody_listens_to_counts(rig: Rig) -> None:
    rig.gate.on_primary_error = rig.gate.on_flush_error = None
    CHANGES["write"](rig.gate, rig.ended)
    rig.end(errno.EIO)
    assert len(rig.told) == 1
    assert rig.gate.primary_errors == 1
