"""What a record says about a pair: which node it is, what it did alone, nothing by halves."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import FormatTooNewError, RecordDamagedError, UsageError
from bitmapd.record import superblock as module
from bitmapd.record.pair_state import (
    NO_STATE,
    STATE_BYTES,
    PairFlag,
    PairState,
    PartnerAck,
    RecordOn,
    decode_pair,
    encode_pair,
)
from bitmapd.record.superblock import (
    SUPERBLOCK_BYTES,
    Incompatible,
    decode_superblock,
    encode_superblock,
)
from tests.unit.record.test_superblock import RAW, make, patched

VOLUME = make().volume_uuid
OTHER = UUID("0000000a-0000-4000-8000-00000000000b")
JOINING = PairState(node=2, volume=None, flags=PairFlag.NEVER_PAIRED)
FULL = PairState(
    node=2,
    volume=OTHER,
    flags=PairFlag.VOLATILE | PairFlag.GONE_ON,
    record_on=RecordOn.LOCAL,
    partner_ack=PartnerAck.STORED,
    term=0x1122334455667788,
    machine=bytes(range(16)),
    partner_session=0x99,
)
STATE_AT = 792

u64 = st.integers(0, (1 << 64) - 1)
uuids = st.builds(UUID, int=st.integers(1, (1 << 128) - 1))
flags = st.integers(0, 15).map(PairFlag)
rest: dict[str, st.SearchStrategy[Any]] = {
    "record_on": st.sampled_from(RecordOn),
    "partner_ack": st.sampled_from(PartnerAck),
    "term": u64,
    "machine": st.binary(min_size=16, max_size=16),
    "partner_session": u64,
}
states = st.one_of(
    st.builds(PairState, node=st.just(1), volume=st.just(VOLUME), flags=flags, **rest),
    st.builds(PairState, node=st.just(2), volume=uuids, flags=flags, **rest),
    st.builds(
        PairState,
        node=st.just(2),
        volume=st.none(),
        flags=flags.map(lambda some: some | PairFlag.NEVER_PAIRED),
        **rest,
    ),
)


@given(states)
def test_a_state_comes_back_by_itself_and_in_a_superblock(pair: PairState) -> None:
    raw = encode_pair(pair)
    assert len(raw) == STATE_BYTES
    assert decode_pair(raw) == pair
    superblock = make().with_pair(pair)
    assert decode_superblock(encode_superblock(superblock)) == superblock


def test_fields_stand_where_the_format_says() -> None:
    raw = encode_superblock(make().with_pair(FULL))
    fields = {
        (24, "<Q"): 2,
        (792, "16s"): OTHER.bytes,
        (808, "B"): 2,
        (809, "B"): 5,
        (810, "B"): 2,
        (811, "B"): 1,
        (812, "4s"): bytes(4),
        (816, "<Q"): 0x1122334455667788,
        (824, "16s"): bytes(range(16)),
        (840, "<Q"): 0x99,
    }
    for (at, layout), value in fields.items():
        assert struct.unpack_from(layout, raw, at) == (value,), at
    assert raw[848:-4] == bytes(SUPERBLOCK_BYTES - 852)


def test_a_volume_of_one_node_has_nothing_of_a_pair() -> None:
    assert encode_pair(None) == NO_STATE == RAW[STATE_AT : STATE_AT + STATE_BYTES]
    assert encode_superblock(make().with_pair(FULL).with_pair(None)) == RAW


def test_other_features_stay_when_a_volume_becomes_a_pair() -> None:
    paused = make(incompatible=int(Incompatible.PAUSED))
    both = paused.with_pair(JOINING)
    assert both.paused
    assert both.incompatible == 3
    assert both.with_pair(None) == paused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node": 0}, "node 0 of a pair"),
        ({"node": 3}, "node 3 of a pair"),
        ({"volume": UUID(int=0)}, "nil UUID"),
        ({"volume": None}, "node 2 has no UUID of the pair"),
        ({"volume": None, "node": 1}, "node 1 has no UUID of the pair"),
        ({"flags": PairFlag(32)}, "flags 0x20"),
        ({"machine": bytes(15)}, "machine id has 15 bytes"),
        ({"term": 1 << 64}, "term"),
        ({"partner_session": -1}, "partner's session -1"),
    ],
)
def test_what_contradicts_itself_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(FULL, **changes)


def test_a_state_goes_with_its_feature() -> None:
    with pytest.raises(UsageError, match="goes with the feature"):
        make(pair=FULL)
    with pytest.raises(UsageError, match="goes with the feature"):
        make(incompatible=int(Incompatible.PAIR))


PAIR = encode_superblock(make().with_pair(FULL))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (patched(RAW, 24, "<Q", 2), "node 0 of a pair"),
        (patched(PAIR, 24, "<Q", 0), "a pair's state without a pair"),
        (patched(RAW, 847, "B", 1), "a pair's state without a pair"),
        (patched(PAIR, 808, "B", 3), "node 3 of a pair"),
        (patched(PAIR, 792, "16s", b""), "node 2 has no UUID"),
        (patched(PAIR, 809, "B", 32), "flags 0x20"),
        (patched(PAIR, 810, "B", 3), "RecordOn"),
        (patched(PAIR, 811, "B", 2), "PartnerAck"),
        (patched(PAIR, 815, "B", 1), "have to be zero"),
    ],
)
def test_a_contradiction_with_a_valid_checksum_is_damage(raw: bytes, message: str) -> None:
    with pytest.raises(RecordDamagedError, match=message):
        decode_superblock(raw)


def test_every_single_bit_flip_in_a_state_is_noticed() -> None:
    image = bytearray(PAIR)
    for at in range(STATE_AT, STATE_AT + STATE_BYTES):
        for bit in range(8):
            image[at] ^= 1 << bit
            with pytest.raises(RecordDamagedError):
                decode_superblock(image)
            image[at] ^= 1 << bit


@given(at=st.integers(STATE_AT - 16, STATE_AT + STATE_BYTES), values=st.binary(min_size=1))
def test_nonsense_with_a_valid_checksum_never_escapes(at: int, values: bytes) -> None:
    raw = patched(PAIR, at, f"{len(values)}s", values)
    try:
        superblock = decode_superblock(raw)
    except RecordDamagedError:
        return
    assert decode_superblock(encode_superblock(superblock)) == superblock


def test_a_program_that_knows_of_no_pairs_refuses_the_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "KNOWN_INCOMPATIBLE", int(Incompatible.PAUSED))
    with pytest.raises(FormatTooNewError, match="features 0x2 that this program"):
        decode_superblock(PAIR)


def test_a_state_for_programs() -> None:
    assert FULL.to_json() == {
        "node": 2,
        "volume_uuid": str(OTHER),
        "volatile": True,
        "alone": False,
        "gone_on": True,
        "never_paired": False,
        "kept": False,
        "record_on": "local",
        "partner_ack": "stored",
        "term": 0x1122334455667788,
        "machine": "000102030405060708090a0b0c0d0e0f",
        "partner_session": 0x99,
    }
    joining = JOINING.to_json()
    assert joining["volume_uuid"] is None
    assert joining["machine"] is None
    assert joining["never_paired"]
    assert JOINING.never_paired
    assert not FULL.never_paired
