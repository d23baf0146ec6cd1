"""A flush that fails is reported once: whoever asks first must tell everybody."""

from __future__ import annotations

import errno

import pytest

from tests.support.mirror import BLOCK, Mirror


@pytest.fixture
def copied() -> Mirror:
    """One block was written and copied; both flushes of the settle are pending."""
    mirror = Mirror()
    mirror.copier.start()
    mirror.put(0)
    mirror.loop.advance(1.0)
    mirror.finish(mirror.primary)  # the copier's read
    mirror.finish(mirror.secondary)  # its write
    assert [op.kind for op in mirror.primary.pending] == ["flush"]
    assert [op.kind for op in mirror.secondary.pending] == ["flush"]
    return mirror


def test_a_flush_of_the_host_that_fails_spoils_the_settle(copied: Mirror) -> None:
    answers: list[OSError | None] = []
    copied.gate.flush(answers.append)
    copied.primary.fail_next = {"flush": [errno.EIO]}
    copied.finish(copied.primary, 1)  # the host's comes first and takes the error with it
    assert answers[0] is not None
    copied.finish(copied.primary)
    copied.finish(copied.secondary)
    assert copied.recorded() == {0}
    assert list(copied.gate.taken.runs()) == [(0, 4)]
    copied.run(10.0)
    assert copied.gate.in_sync
    assert copied.recorded() == set()
    assert copied.primary.visible == copied.secondary.durable


@pytest.mark.parametrize("kind", ["write", "zero", "trim"])
def test_a_fua_that_fails_spoils_it_too(copied: Mirror, kind: str) -> None:
    copied.primary.fail_next = {"write": [errno.EIO]}
    answers: list[OSError | None] = []
    if kind == "write":
        answers = copied.write(1, fua=True)
    else:
        getattr(copied.gate, kind)(BLOCK, BLOCK, answers.append, fua=True)
    copied.finish(copied.primary, 1)
    assert answers[0] is not None
    copied.finish(copied.primary)
    copied.finish(copied.secondary)
    assert copied.recorded() == {0}
    assert copied.gate.taken.any(0, 1)


def test_a_pass_is_not_done_with_what_has_to_be_copied_again() -> None:
    mirror = Mirror()
    mirror.put(0)
    done: list[int] = []
    mirror.copier.passes.on_done = lambda: done.append(1)
    mirror.gate.take_recorded()
    mirror.copier.begin_pass(compare=False)
    mirror.copier.start()
    mirror.secondary.fail_next = {"flush": [errno.EIO]}
    mirror.loop.advance(1.0)
    while mirror.told("link-down") == []:
        for disk in mirror.disks:
            if disk.pending:
                mirror.finish(disk)
        mirror.turn()
    mirror.run()
    assert not done
    assert mirror.copier.passes.remaining_bytes
    mirror.run(10.0)
    mirror.run(10.0)
    assert done == [1]
    assert mirror.gate.in_sync


def test_a_flush_of_the_copier_that_fails_is_a_loss_for_hosts(copied: Mirror) -> None:
    """The kernel has told the copier, and tells nobody again."""
    host = copied.gate.lost_writes.listener()
    copied.fail(copied.primary, errno.EIO)
    answers: list[OSError | None] = []
    copied.gate.flush(answers.append)
    copied.run()
    assert answers == [None]
    told = host.answer(answers[0])
    assert told is not None
    assert told.errno == errno.EIO


def test_a_refusal_of_what_is_not_offered_loses_nothing(copied: Mirror) -> None:
    host = copied.gate.lost_writes.listener()
    answers: list[OSError | None] = []
    copied.gate.zero(BLOCK, BLOCK, answers.append, fua=True, fast=True)
    copied.primary.fail_next = {"write": [errno.EOPNOTSUPP]}
    copied.finish(copied.primary, 1)
    assert answers[0] is not None
    assert host.answer(None) is None
    copied.finish(copied.primary)
    copied.finish(copied.secondary)
    assert copied.told("copy-error") == []
