"""What a record says about consistent points: how far the receiver is, nothing by halves."""

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
from bitmapd.record.points_state import (
    NO_STATE,
    STATE_BYTES,
    PointsFlag,
    PointsState,
    decode_points,
    encode_points,
)
from bitmapd.record.superblock import (
    SUPERBLOCK_BYTES,
    Incompatible,
    decode_superblock,
    encode_superblock,
)
from tests.unit.record.test_superblock import RAW, make, patched

RECEIVER = UUID("0000000a-0000-4000-8000-00000000000b")
FULL = PointsState(
    term=0x1122334455667788,
    committed=0x99,
    receiver=RECEIVER,
    flags=PointsFlag.DEMOTED,
    cut_s=0x6955B900,
)
STATE_AT = 848

u64 = st.integers(0, (1 << 64) - 1)
states = st.builds(
    PointsState,
    term=u64,
    committed=u64,
    receiver=st.none() | st.builds(UUID, int=st.integers(1, (1 << 128) - 1)),
    flags=st.integers(0, 1).map(PointsFlag),
    cut_s=st.integers(0, (1 << 32) - 1),
)


@given(states)
def test_a_state_comes_back_by_itself_and_in_a_superblock(points: PointsState) -> None:
    raw = encode_points(points)
    assert len(raw) == STATE_BYTES
    assert decode_points(raw) == points
    superblock = make().with_points(points)
    assert decode_superblock(encode_superblock(superblock)) == superblock


def test_fields_stand_where_the_format_says() -> None:
    raw = encode_superblock(make().with_points(FULL))
    fields = {
        (24, "<Q"): 4,
        (848, "<Q"): 0x1122334455667788,
        (856, "<Q"): 0x99,
        (864, "16s"): RECEIVER.bytes,
        (880, "<I"): 1,
        (884, "<I"): 0x6955B900,
    }
    for (at, layout), value in fields.items():
        assert struct.unpack_from(layout, raw, at) == (value,), at
    assert raw[888:-4] == bytes(SUPERBLOCK_BYTES - 892)


def test_a_volume_without_points_has_nothing_of_them() -> None:
    assert encode_points(None) == NO_STATE == RAW[STATE_AT : STATE_AT + STATE_BYTES]
    assert encode_superblock(make().with_points(FULL).with_points(None)) == RAW
    paused = make(incompatible=int(Incompatible.PAUSED))
    both = paused.with_points(PointsState())
    assert (both.paused, both.incompatible) == (True, 5)
    assert both.with_points(None) == paused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"receiver": UUID(int=0)}, "nil UUID"),
        ({"flags": PointsFlag(2)}, "flags 0x2"),
        ({"term": 1 << 64}, "term"),
        ({"committed": -1}, "committed point -1"),
        ({"cut_s": 1 << 32}, "time of its cut 4294967296"),
    ],
)
def test_what_contradicts_itself_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(FULL, **changes)


def test_a_state_goes_with_its_feature() -> None:
    for changes in ({"points": FULL}, {"incompatible": int(Incompatible.POINTS)}):
        with pytest.raises(UsageError, match="goes with the feature"):
            make(**changes)


POINTS = encode_superblock(make().with_points(FULL))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (patched(POINTS, 24, "<Q", 0), "a state of points without any"),
        (patched(RAW, 887, "B", 1), "a state of points without any"),
        (patched(POINTS, 880, "<I", 2), "flags 0x2"),
    ],
)
def test_a_contradiction_with_a_valid_checksum_is_damage(raw: bytes, message: str) -> None:
    with pytest.raises(RecordDamagedError, match=message):
        decode_superblock(raw)


@given(at=st.integers(STATE_AT - 16, STATE_AT + STATE_BYTES), values=st.binary(min_size=1))
def test_nonsense_with_a_valid_checksum_never_escapes(at: int, values: bytes) -> None:
    raw = patched(POINTS, at, f"{len(values)}s", values)
    try:
        superblock = decode_superblock(raw)
    except RecordDamagedError:
        return
    assert decode_superblock(encode_superblock(superblock)) == superblock


def test_a_program_that_knows_of_no_points_refuses_the_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would clear extents that the last committed point lacks."""
    monkeypatch.setattr(module, "KNOWN_INCOMPATIBLE", 3)
    with pytest.raises(FormatTooNewError, match="features 0x4 that this program"):
        decode_superblock(POINTS)


def test_who_has_given_its_role_away() -> None:
    assert make().with_points(FULL).demoted
    assert not make().with_points(PointsState()).demoted
    assert not make().demoted


def test_a_state_for_programs() -> None:
    assert FULL.to_json() == {
        "term": 0x1122334455667788,
        "committed": 0x99,
        "cut_s": 0x6955B900,
        "receiver_uuid": str(RECEIVER),
        "demoted": True,
    }
    assert PointsState().to_json()["receiver_uuid"] is None
