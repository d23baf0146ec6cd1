"""claims: who may have a medium open at the same time; real processes on real media."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import BitmapdError, BusyError
from bitmapd.media import claims
from bitmapd.media.aio import AioEngine
from bitmapd.media.buffers import aligned
from bitmapd.media.claims import NODES, Claim, holder_of
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import completion
from tests.support.claimant import answer, claimant
from tests.support.loops import loop_device, memory_folder, sparse_file

MIB = 1 << 20
X, Y = UUID("5eed0000-0000-4000-8000-000000000001"), UUID("c0de0000-0000-4000-8000-000000000002")
VOLUME = Claim()
X1, X2, Y1, Y2 = Claim(1, X), Claim(2, X), Claim(1, Y), Claim(2, Y)
JOINING = Claim(2)
ALL = [VOLUME, X1, X2, Y1, Y2, JOINING]

# -- the regions ------------------------------------------------------------------------------

uuids = st.sampled_from([X, Y, UUID(int=0), UUID(int=1 << 67), UUID(int=(1 << 128) - 1)])
claim_values = st.one_of(
    st.just(VOLUME), st.just(JOINING), st.builds(Claim, st.sampled_from([1, 2]), uuids | st.uuids())
)


def admitted(one: Claim, other: Claim) -> bool:
    """The rule, beside the arithmetic that keeps it."""
    partners = {one.node, other.node} == {1, 2}
    return partners and (None in (one.pair, other.pair) or slot(one) == slot(other))


def slot(claim: Claim) -> int:
    assert claim.pair is not None
    return claim.pair.int >> 68


def conflict(one: Claim, other: Claim) -> bool:
    """As the kernel judges locks of two descriptions."""
    return any(
        fcntl.F_WRLCK in (kind, other_kind)
        and first < (other_first + other_count if other_count else 1 << 63)
        and other_first < (first + count if count else 1 << 63)
        for kind, first, count in one.locks()
        for other_kind, other_first, other_count in other.locks()
    )


@given(claim_values, claim_values)
def test_only_the_two_nodes_of_one_pair_share_a_medium(one: Claim, other: Claim) -> None:
    assert conflict(one, other) is not admitted(one, other)


@given(claim_values)
def test_a_claim_is_far_behind_all_data_and_overlaps_nothing_of_itself(claim: Claim) -> None:
    """Locks of one description replace one another where they overlap."""
    spans = sorted(
        (first, first + count if count else 1 << 63) for _, first, count in claim.locks()
    )
    assert spans[0][0] >= NODES
    assert spans[-1][1] <= 1 << 63
    assert all(stop <= first for (_, stop), (first, _) in itertools.pairwise(spans))
    assert all(first < stop for first, stop in spans)


@given(st.uuids())
def test_who_joins_keeps_what_it_has(pair: UUID) -> None:
    assert set(JOINING.locks()) <= set(Claim(2, pair).locks())


# -- real media -------------------------------------------------------------------------------


@pytest.fixture(params=["file", "file in memory", "block device"])
def medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield str(sparse_file(tmp_path / "disk", 16 * MIB))
    elif request.param == "file in memory":
        with memory_folder() as folder:
            yield str(sparse_file(folder / "disk", 16 * MIB))
    else:
        with block_device(tmp_path) as name:
            yield name


def block_device(folder: Path) -> AbstractContextManager[str]:
    return loop_device(sparse_file(folder / "backing", 16 * MIB))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def engine(loop: asyncio.AbstractEventLoop) -> Iterator[AioEngine]:
    engine = AioEngine(loop, depth=32)
    yield engine
    engine.close()


@pytest.mark.parametrize("first", ALL, ids=str)
def test_a_process_is_admitted_or_told_who_is_there(
    medium: str, engine: AioEngine, first: Claim
) -> None:
    who = "a volume" if first.node is None else f"node {first.node} of a pair"
    with claimant(medium, first) as process:
        assert answer(process) == "up"
        for other in ALL:
            if admitted(first, other):
                KernelDevice(medium, engine, claim=other).close()
                continue
            with pytest.raises(BusyError, match=f"is in use by {who}$") as caught:
                KernelDevice(medium, engine, claim=other)
            assert caught.value.hint is not None
            assert f"fuser -v {medium}" in caught.value.hint
    for other in ALL:
        KernelDevice(medium, engine, claim=other).close()


@pytest.mark.parametrize("claim", [VOLUME, X1, JOINING], ids=str)
def test_who_is_killed_with_writes_in_flight_leaves_nothing_behind(
    medium: str, engine: AioEngine, claim: Claim
) -> None:
    for _ in range(3):
        with claimant(medium, claim, "write") as process:
            assert answer(process) == "up"
            with pytest.raises(BusyError):
                KernelDevice(medium, engine, claim=claim)
        KernelDevice(medium, engine, claim=claim).close()
        assert holder_of(medium) is None


@pytest.mark.parametrize("aside", [False, True], ids=["primary", "secondary"])
@pytest.mark.parametrize("claim", [VOLUME, X1, JOINING], ids=str)
def test_who_opens_again_is_not_in_its_own_way(
    medium: str, loop: asyncio.AbstractEventLoop, engine: AioEngine, claim: Claim, aside: bool
) -> None:
    device = KernelDevice(medium, engine, claim=claim, aside=aside)
    buffer = aligned(MIB)

    async def test() -> None:
        for turn in range(10):
            await asyncio.gather(
                *(completion(lambda done: device.write(0, buffer, done)) for _ in range(8))
            )
            if turn % 2:
                device.close()
            await completion(device.open)
            stranger = holder_of(medium)
            assert stranger is not None
            assert stranger.nodes == (() if claim.node is None else (claim.node,))

    loop.run_until_complete(test())
    device.close()
    closed = asyncio.Event()
    engine.when_idle(closed.set)
    loop.run_until_complete(closed.wait())
    KernelDevice(medium, engine, claim=VOLUME).close()


@pytest.mark.parametrize("claim", [VOLUME, X1], ids=str)
def test_who_opens_again_waits_until_the_kernel_has_let_go(
    medium: str, loop: asyncio.AbstractEventLoop, engine: AioEngine, claim: Claim
) -> None:
    """Of the file a reference is left, as of a transfer that was reported a moment ago."""
    device = KernelDevice(medium, engine, claim=claim)
    left = os.dup(device.fd)
    loop.call_later(0.02, os.close, left)
    loop.run_until_complete(completion(device.open))
    stranger = holder_of(medium)
    assert stranger is not None
    assert stranger.nodes == (() if claim.node is None else (claim.node,))
    device.close()


def test_who_opens_again_and_finds_somebody_else_hears_who_it_is(
    medium: str, loop: asyncio.AbstractEventLoop, engine: AioEngine
) -> None:
    device = KernelDevice(medium, engine, claim=X1)
    device.close()
    with claimant(medium, VOLUME) as process:
        assert answer(process) == "up"
        with pytest.raises(OSError, match="is in use by a volume"):
            loop.run_until_complete(completion(device.open))


def test_who_has_joined_excludes_other_pairs_also_when_it_opens_again(
    medium: str, loop: asyncio.AbstractEventLoop, engine: AioEngine
) -> None:
    device = KernelDevice(medium, engine, claim=JOINING)
    KernelDevice(medium, engine, claim=Y1).close()
    loop.run_until_complete(device.joined(X2))
    for _ in range(2):
        with pytest.raises(BusyError, match="node 2 of a pair"):
            KernelDevice(medium, engine, claim=Y1)
        KernelDevice(medium, engine, claim=X1).close()
        loop.run_until_complete(completion(device.open))
    device.close()


def test_who_joins_one_pair_on_the_medium_of_another_is_refused(
    medium: str, loop: asyncio.AbstractEventLoop, engine: AioEngine
) -> None:
    with claimant(medium, Y1) as process:
        assert answer(process) == "up"
        device = KernelDevice(medium, engine, claim=JOINING)
        with pytest.raises(BusyError, match="is in use by node 1 of a pair"):
            loop.run_until_complete(device.joined(X2))
        device.close()


def test_a_device_that_claims_nothing_claims_nothing_when_it_has_joined(
    medium: str, loop: asyncio.AbstractEventLoop, engine: AioEngine
) -> None:
    device = KernelDevice(medium, engine)
    loop.run_until_complete(device.joined(X2))
    assert holder_of(medium) is None
    device.close()


# -- block devices and mounts -----------------------------------------------------------------


def test_a_pair_keeps_mounts_off_its_block_device(tmp_path: Path, engine: AioEngine) -> None:
    with block_device(tmp_path) as name:
        one = KernelDevice(name, engine, claim=X1)
        two = KernelDevice(name, engine, claim=X2)
        with pytest.raises(OSError, match="busy") as caught:
            os.open(name, os.O_RDONLY | os.O_EXCL)  # as mount(2) does
        assert caught.value.errno == errno.EBUSY
        two.close()
        one.close()
        os.close(os.open(name, os.O_RDONLY | os.O_EXCL))


@pytest.mark.parametrize("claim", [VOLUME, X1, JOINING], ids=str)
def test_a_block_device_that_something_else_has_is_refused(
    tmp_path: Path, engine: AioEngine, claim: Claim
) -> None:
    with block_device(tmp_path) as name:
        held = os.open(name, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(BusyError, match="is in use by something else"):
                KernelDevice(name, engine, claim=claim)
            assert holder_of(name) is None, "what was locked is free again"
        finally:
            os.close(held)


# -- others who lock --------------------------------------------------------------------------


def test_a_program_that_locks_the_whole_file_is_named(tmp_path: Path, engine: AioEngine) -> None:
    path = str(sparse_file(tmp_path / "disk", MIB))
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('up', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert answer(process) == "up"
        with pytest.raises(BusyError, match=f"process {process.pid}, which has locked it"):
            KernelDevice(path, engine, claim=X1)
        process.communicate()
    stranger = os.open(path, os.O_RDWR)
    claims.set_lock(stranger, fcntl.F_WRLCK, 0, 0)
    with pytest.raises(BusyError, match="another program, which has locked it"):
        KernelDevice(path, engine, claim=X1)
    os.close(stranger)


def test_both_nodes_are_named(tmp_path: Path, engine: AioEngine) -> None:
    path = str(sparse_file(tmp_path / "disk", MIB))
    nodes = [KernelDevice(path, engine, claim=claim) for claim in (X1, X2)]
    with pytest.raises(BusyError, match="is in use by nodes 1 and 2 of a pair"):
        KernelDevice(path, engine, claim=VOLUME)
    for node in nodes:
        node.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_there_are_no_locks_nothing_is_claimed(
    tmp_path: Path, engine: AioEngine, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = str(sparse_file(tmp_path / "disk", MIB))

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(claims.fcntl, "fcntl", refuse)
    KernelDevice(path, engine, claim=VOLUME).close()
    assert holder_of(path) is None


def test_a_lock_that_fails_otherwise_is_an_error(
    tmp_path: Path, engine: AioEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(sparse_file(tmp_path / "disk", MIB))

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(claims.fcntl, "fcntl", refuse)
    with pytest.raises(BitmapdError, match=f"cannot lock {path}"):
        KernelDevice(path, engine, claim=VOLUME)
