"""volume/status: the state is the most pressing of what is true, and ends with its cause."""

from __future__ import annotations

import errno

import pytest

from bitmapd.control.states import STATES
from bitmapd.volume.status import PRIMARY_ERROR_S, state_of
from tests.support.mirror import BLOCK, Mirror, begun, number, until_reads
from tests.support.sim import drain


@pytest.fixture
def mirror() -> Mirror:
    return begun()


def state(mirror: Mirror) -> str:
    name = state_of(mirror.store, mirror.gate, mirror.copier, in_sync=mirror.copier.in_sync)
    assert name in STATES
    return name


def test_from_copying_to_in_sync(mirror: Mirror) -> None:
    assert state(mirror) == "in-sync"
    mirror.put(0)
    assert state(mirror) == "copying"
    mirror.copier.begin_pass(compare=False)
    assert state(mirror) == "resyncing"
    mirror.copier.pause()
    assert state(mirror) == "paused"
    mirror.copier.resume()
    mirror.run(1.0)
    assert state(mirror) == "in-sync"


@pytest.mark.parametrize("verb", ["read", "write", "flush"])
def test_a_primary_that_fails_is_told_as_long_as_it_does(mirror: Mirror, verb: str) -> None:
    for _ in range(3):
        answers: list[OSError | None] = []
        if verb == "write":
            answers = mirror.write(0)
            drain(mirror.loop, mirror.record)
        elif verb == "read":
            mirror.gate.read(0, mirror.pool.take(BLOCK), answers.append)  # type: ignore[arg-type]
        else:
            mirror.gate.flush(answers.append)
        mirror.fail(mirror.primary, errno.EIO, mirror.pending(mirror.primary).index(verb))
        assert number(answers) == errno.EIO
        assert state(mirror) == "primary-failing"
        mirror.run(PRIMARY_ERROR_S / 2)
        assert state(mirror) == "primary-failing"
    mirror.run(PRIMARY_ERROR_S / 2)
    assert state(mirror) == "in-sync"


def test_a_block_that_cannot_be_read_is_told_until_it_is_copied(mirror: Mirror) -> None:
    mirror.put(0)
    mirror.primary.fail_next = {"read": [errno.EIO] * 9}
    for _ in range(300):
        mirror.run(1.0)
        assert state(mirror) == "primary-failing" or not mirror.primary.fail_next["read"]
    assert state(mirror) == "in-sync"


@pytest.mark.parametrize(
    ("refusal", "name"), [(errno.ENOSPC, "no-space"), (errno.EIO, "secondary-failing")]
)
def test_what_the_secondary_refuses(mirror: Mirror, refusal: int, name: str) -> None:
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, refusal)
    assert state(mirror) == name
    mirror.copier.pause()
    assert state(mirror) == "paused", "nothing is tried"
    mirror.copier.resume()
    mirror.secondary.connected = False
    mirror.run(1.0)
    assert state(mirror) == "link-down", "nobody knows what it would say"
    for _ in range(5):
        mirror.run(1.0)
    assert state(mirror) == "in-sync"
