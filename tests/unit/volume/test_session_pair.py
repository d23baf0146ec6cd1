"""session of a pair's node: what it stores about the pair, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from bitmapd.errors import (
    BitmapdError,
    ForeignRecordError,
    NotFoundError,
    RecordDamagedError,
    UsageError,
)
from bitmapd.record import tool
from bitmapd.record.layout import SUPERBLOCK_OFFSETS, PairFlag, PairState, PartnerAck, RecordOn
from bitmapd.volume.session import RecordSession
from tests.support.local import LocalVolume

PAIR = UUID("0000000a-0000-4000-8000-00000000000b")
NEWER, OLDER = UUID(int=9), UUID(int=8)
JOINING = PairState(
    node=2,
    volume=None,
    flags=PairFlag.NEVER_PAIRED,
    record_on=RecordOn.LOCAL,
    partner_ack=PartnerAck.STORED,
)

Open = Callable[[int | None], RecordSession]


@pytest.fixture
def local(tmp_path: Path, short_path: Path) -> LocalVolume:
    return LocalVolume(tmp_path, short_path)


@pytest.fixture
def open_as(local: LocalVolume) -> Iterator[Open]:
    sessions = []

    def open_(node: int | None) -> RecordSession:
        session = RecordSession(local.config, local.paths, lambda *_, **__: None, node=node)
        sessions.append(session)
        return session

    yield open_
    for session in sessions:
        session.close()


def formatted(local: LocalVolume, pair: PairState) -> None:
    superblock = local.superblock.with_pair(pair)
    tool.format_record(local.record, superblock, ones=False, force=True)


def test_what_pairing_has_come_to_is_stored_in_one_update(
    local: LocalVolume, open_as: Open
) -> None:
    formatted(local, JOINING)
    session = open_as(2)
    assert session.pair == JOINING
    session.begin()
    before = session.superblock
    session.store_pair(
        PAIR,
        never_paired=False,
        term=3,
        generations=(NEWER, OLDER),
        volatile=True,
        machine=bytes(range(16)),
        partner_session=7,
    )
    stored = local.superblock
    assert stored == session.superblock
    assert stored.sequence == before.sequence + 1
    assert stored.session == before.session
    assert stored.volume_uuid == local.config.uuid, "a record keeps its own UUID"
    assert stored.generations == (NEWER, OLDER)
    assert stored.pair == PairState(
        node=2,
        volume=PAIR,
        flags=PairFlag.VOLATILE,
        record_on=RecordOn.LOCAL,
        partner_ack=PartnerAck.STORED,
        term=3,
        machine=bytes(range(16)),
        partner_session=7,
    )
    session.store_pair(
        PAIR, never_paired=True, term=4, generations=(NEWER,), alone=True, gone_on=True
    )
    pair = local.superblock.pair
    assert pair is not None
    assert pair.flags == PairFlag.NEVER_PAIRED | PairFlag.ALONE | PairFlag.GONE_ON
    assert (pair.term, pair.partner_session) == (4, 7), "what is not named stays"


def test_a_pair_outlives_pauses_sessions_and_a_clean_end(local: LocalVolume, open_as: Open) -> None:
    formatted(local, JOINING)
    session = open_as(2)
    session.begin()
    session.store_pair(PAIR, never_paired=False, term=1, generations=(NEWER,))
    kept = session.pair
    session.finish()
    session.close()
    assert open_as(2).pair == kept


def test_the_partner_may_write_the_media_while_this_node_is_stopped(
    local: LocalVolume, open_as: Open
) -> None:
    formatted(local, PairState(node=1, volume=local.config.uuid))
    session = open_as(1)
    session.begin()
    session.finish()
    session.seal()
    session.close()
    state = json.loads(local.paths.state_file(local.config.uuid).read_text())
    assert "fingerprint" not in state
    # As after a time as a volume of one node, which left a fingerprint.
    state["fingerprint"] = "of other content"
    local.paths.state_file(local.config.uuid).write_text(json.dumps(state))
    assert not open_as(1).primary_is_as_left


@pytest.mark.parametrize(
    ("pair", "node", "message"),
    [
        (JOINING, None, "is node 2's of a pair, but the configuration of 'vol0' names no partner"),
        (JOINING, 1, "is node 2's of a pair, but the configuration of 'vol0' says that this is"),
        (None, 1, "is of a volume without a partner, but the configuration of 'vol0' says that"),
    ],
)
def test_a_record_of_another_node_is_refused(
    local: LocalVolume, open_as: Open, pair: PairState | None, node: int | None, message: str
) -> None:
    if pair is not None:
        formatted(local, pair)
    before = local.record.read_bytes()
    with pytest.raises(ForeignRecordError, match=message) as caught:
        open_as(node)
    assert caught.value.hint is not None
    assert "'node' and 'partner'" in caught.value.hint
    assert local.record.read_bytes() == before


# -- a keeper's host whose record fails ---------------------------------------------------------


def kept(local: LocalVolume, open_as: Open) -> RecordSession:
    """A session of a volume whose record a keeper holds."""
    formatted(local, PairState(node=1, volume=PAIR, flags=PairFlag.KEPT))
    remember(local)
    session = open_as(1)
    session.begin()
    return session


def remember(local: LocalVolume, **more: object) -> None:
    state = json.dumps({"session": 0, **more})
    local.paths.state_file(local.config.uuid).parent.mkdir(parents=True, exist_ok=True)
    local.paths.state_file(local.config.uuid).write_text(state)


def is_volatile(session: RecordSession) -> bool:
    assert session.pair is not None
    return PairFlag.VOLATILE in session.pair.flags


def store(session: RecordSession, *, volatile: bool, term: int = 0, kept: bool = True) -> None:
    generations = session.superblock.generations
    session.store_pair(
        PAIR, never_paired=False, term=term, generations=generations, volatile=volatile, kept=kept
    )


def fail_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BitmapdError("simulated")

    monkeypatch.setattr(tool, "write_superblock_copy", fail)


def test_what_a_failing_record_cannot_say_the_host_remembers(
    local: LocalVolume, open_as: Open
) -> None:
    session = kept(local, open_as)
    assert not is_volatile(session)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fail_writes(monkeypatch)
        store(session, volatile=True)
    session.update(flags=session.superblock.flags)  # as for a pause: it says nothing of this
    session.close()
    again = open_as(1)
    again.begin()
    assert is_volatile(again)
    again.close()
    assert is_volatile(open_as(1)), "and not before the record itself says so"


def test_what_the_host_remembers_goes_with_the_next_superblock_of_the_pair(
    local: LocalVolume, open_as: Open
) -> None:
    session = kept(local, open_as)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fail_writes(monkeypatch)
        store(session, volatile=True)
    store(session, volatile=False)
    session.close()
    again = open_as(1)
    again.begin()
    assert not is_volatile(again)


@pytest.mark.parametrize("wrong", ["term", "no keeper"])
def test_nothing_else_is_remembered_in_the_place_of_a_superblock(
    local: LocalVolume, open_as: Open, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    session = kept(local, open_as)
    if wrong == "no keeper":
        store(session, volatile=False, kept=False)
    fail_writes(monkeypatch)
    with pytest.raises(BitmapdError, match="simulated"):
        store(session, volatile=True, term=int(wrong == "term"), kept=wrong == "term")


@pytest.mark.parametrize("flags", [PairFlag.KEPT, PairFlag(0)])
def test_where_nobody_remembers_a_kept_record_may_lack_something(
    local: LocalVolume, open_as: Open, flags: PairFlag
) -> None:
    formatted(local, PairState(node=1, volume=PAIR, flags=flags))
    session = open_as(1)
    session.begin()
    assert is_volatile(session) is bool(flags)


@pytest.mark.parametrize(
    ("node", "role", "way_on"),
    [
        (None, "pair", "create it anew"),
        (1, "pair", "'dmctl record replace vol0 DEVICE'"),
        (2, "pair", "'dmctl record replace vol0 DEVICE'"),
        (2, "keeper", "'dmctl remove vol0'"),
    ],
)
def test_where_a_record_cannot_be_used_the_way_on_is_that_of_the_node(
    local: LocalVolume, node: int | None, role: str, way_on: str
) -> None:
    config = dataclasses.replace(local.config, node=node, partner_role=role)

    def refused(kind: type[BitmapdError]) -> str | None:
        with pytest.raises(kind) as caught:
            RecordSession(config, local.paths, lambda *_, **__: None, node=node)
        return caught.value.hint

    damaged = bytearray(local.record.read_bytes())
    for offset in SUPERBLOCK_OFFSETS:
        damaged[offset + 100] ^= 1
    local.record.write_bytes(damaged)
    assert way_on in str(refused(RecordDamagedError))
    local.record.write_bytes(bytes(len(damaged)))
    assert way_on.replace(" anew", "") in str(refused(NotFoundError))
    local.record.unlink()
    assert (refused(NotFoundError) is None) is (node is None)


def test_a_volume_of_one_node_has_no_pair_to_store(local: LocalVolume, open_as: Open) -> None:
    session = open_as(None)
    assert session.pair is None
    with pytest.raises(UsageError, match="is of no pair"):
        session.store_pair(PAIR, never_paired=False, term=1, generations=(NEWER,))
