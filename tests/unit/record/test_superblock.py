"""The superblock: encoding, refusals, and which of two copies counts."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any
from uuid import UUID

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import FormatTooNewError, RecordDamagedError, UsageError
from bitmapd.record import superblock as module
from bitmapd.record.copies import SUPERBLOCK_BYTES
from bitmapd.record.geometry import Geometry
from bitmapd.record.superblock import (
    MAX_GENERATIONS,
    InitialSync,
    RecordFlag,
    Superblock,
    choose_superblock,
    decode_superblock,
    encode_superblock,
    has_magic,
    require_writable,
)

BLANK = bytes(SUPERBLOCK_BYTES)


def make(**changes: Any) -> Superblock:
    plain = Superblock(
        volume_uuid=UUID("11111111-2222-3333-4444-555555555555"),
        name="vol0",
        geometry=Geometry(100 << 30),
        generations=(UUID(int=7), UUID(int=6)),
        primary="wwid:naa.5000c500a1b2c3d4",
        primary_size_bytes=100 << 30,
        secondary="nbd:backup:10809/vol0",
        secondary_size_bytes=100 << 30,
        created_s=1_700_000_000,
        updated_s=1_700_000_100,
        sequence=4,
        session=2,
    )
    return dataclasses.replace(plain, **changes)


def patched(raw: bytes, at: int, layout: str, value: Any) -> bytes:
    """Overwrite a field and give the block a valid checksum again."""
    image = bytearray(raw)
    struct.pack_into(layout, image, at, value)
    checksum = crc32c(image[:-4], crc32c(b"bitmapd superblock"))
    struct.pack_into("<I", image, SUPERBLOCK_BYTES - 4, checksum)
    return bytes(image)


RAW = encode_superblock(make())

uuids = st.builds(UUID, int=st.integers(1, (1 << 128) - 1))
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
geometries = st.builds(
    Geometry,
    st.integers(1, 1 << 46),
    st.sampled_from([1 << 20, 1 << 22, 1 << 26]),
    st.sampled_from([1 << 12, 1 << 16, 1 << 20]),
)
u63, u64 = st.integers(0, (1 << 63) - 1), st.integers(0, (1 << 64) - 1)
superblocks = st.builds(
    Superblock,
    volume_uuid=uuids,
    name=texts.filter(lambda text: 0 < len(text.encode()) <= 64),
    geometry=geometries,
    generations=st.lists(uuids, min_size=1, max_size=MAX_GENERATIONS).map(tuple),
    primary=texts,
    primary_size_bytes=u63,
    secondary=texts,
    secondary_size_bytes=u63,
    created_s=u63,
    updated_s=u63,
    sequence=st.integers(0, module.MAX_SEQUENCE),
    session=u63,
    flags=st.integers(0, 3).map(RecordFlag),
    initial_sync=st.sampled_from(InitialSync),
    incompatible=st.sampled_from([0, int(module.Incompatible.PAUSED)]),
    compatible_read_only=u64,
    compatible=u64,
)


# -- encoding -----------------------------------------------------------------------------------


@given(superblocks)
def test_a_superblock_comes_back(superblock: Superblock) -> None:
    raw = encode_superblock(superblock)
    assert len(raw) == SUPERBLOCK_BYTES
    assert decode_superblock(raw) == superblock


def test_the_largest_texts_fit() -> None:
    superblock = make(name="é" * 32, primary="p" * 255, secondary="€" * 85)
    assert decode_superblock(encode_superblock(superblock)) == superblock


def test_fields_stand_where_the_format_says() -> None:
    fields = {
        (0, "16s"): b"\x93bitmapd-record\n",
        (16, "<I"): 1,
        (48, "16s"): make().volume_uuid.bytes,
        (64, "<Q"): 4,
        (72, "<Q"): 2,
        (80, "16s"): UUID(int=7).bytes,
        (144, "<Q"): 100 << 30,
        (152, "<I"): 1 << 20,
        (156, "<I"): 1 << 16,
        (160, "<I"): 4,
        (168, "<Q"): 131072,
        (176, "<Q"): 1_700_000_000,
        (192, "<Q"): 100 << 30,
        (208, "B"): 4,
        (216, "4s"): b"vol0",
        (280, "25s"): b"wwid:naa.5000c500a1b2c3d4",
        (536, "21s"): b"nbd:backup:10809/vol0",
    }
    for (at, layout), value in fields.items():
        assert struct.unpack_from(layout, RAW, at) == (value,), at
    assert RAW[792:-4] == bytes(SUPERBLOCK_BYTES - 796)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "no name"),
        ({"name": "n" * 65}, "has 65 bytes; at most 64 fit"),
        ({"name": "a\0b"}, "contains a zero byte"),
        ({"name": "\ud800"}, "is not valid text"),
        ({"primary": "p" * 256}, "identity of the primary"),
        ({"secondary": "€" * 86}, "identity of the secondary"),
        ({"generations": ()}, "0 data generations"),
        ({"generations": tuple(UUID(int=n) for n in range(1, 6))}, "5 data generations"),
        ({"generations": (UUID(int=0),)}, "nil UUID"),
        ({"volume_uuid": UUID(int=0)}, "nil UUID"),
        ({"sequence": -1}, "sequence -1 is outside"),
        ({"sequence": (1 << 62) + 1}, "sequence"),
        ({"session": 1 << 63}, "session"),
        ({"created_s": -1}, "time of creation"),
        ({"incompatible": 1 << 64}, "incompatible features"),
    ],
)
def test_what_could_not_be_stored_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**changes)


def test_an_update_follows_its_predecessor() -> None:
    superblock = make(compatible=0b11, flags=RecordFlag.CLEAN | RecordFlag.SYNC_SKIPPED)
    later = superblock.updated(1_700_000_999, session=3, flags=RecordFlag.SYNC_SKIPPED)
    assert (later.sequence, later.session, later.updated_s) == (5, 3, 1_700_000_999)
    assert superblock.clean
    assert not later.clean
    assert later.compatible == 0
    assert later.created_s == superblock.created_s
    assert later.page_count == 4


# -- refusals -----------------------------------------------------------------------------------


def test_every_single_bit_flip_is_noticed() -> None:
    image = bytearray(RAW)
    for at in range(SUPERBLOCK_BYTES):
        for bit in range(8):
            image[at] ^= 1 << bit
            with pytest.raises(RecordDamagedError):
                decode_superblock(image)
            image[at] ^= 1 << bit


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "cannot be read"),
        (b"", "cut short after 0 bytes"),
        (RAW[:512], "cut short after 512 bytes"),
        (BLANK, "there is no superblock"),
        (b"\xff" * SUPERBLOCK_BYTES, "there is no superblock"),
        (RAW[:512] + BLANK[512:], "checksum is 00000000 and should be"),
        (patched(RAW, 16, "<I", 0), "format version 0"),
        (patched(RAW, 160, "<I", 5), "5 pages at byte 131072, but the volume needs 4"),
        (patched(RAW, 168, "<Q", 4096), "4 pages at byte 4096"),
        (patched(RAW, 164, "<I", 9), "contradicts itself"),
        (patched(RAW, 208, "B", 65), "name of 65 bytes"),
        (patched(RAW, 208, "B", 0), "no name"),
        (patched(RAW, 216, "4s", b"\xff\xff\xff\xff"), "contradicts itself"),
        (patched(RAW, 144, "<Q", 0), "volume size 0"),
        (patched(RAW, 152, "<I", 3), "extent size 3"),
        (patched(RAW, 80, "16s", b""), None),
        (patched(RAW, 48, "16s", b""), "nil UUID"),
        (patched(RAW, 64, "<Q", 1 << 63), "sequence"),
    ],
)
def test_what_is_not_a_superblock_is_refused(raw: bytes | None, message: str | None) -> None:
    if message is None:  # no current generation, but an older one stands: still a generation
        assert decode_superblock(raw).generations == (UUID(int=6),)
        return
    with pytest.raises(RecordDamagedError, match=message):
        decode_superblock(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (patched(RAW, 16, "<I", 2), "format version 2; this program knows 1"),
        (patched(RAW, 24, "<Q", 0b1000), "uses features 0x8"),
        (patched(patched(RAW, 16, "<I", 9), 144, "<Q", 0), "format version 9"),
    ],
)
def test_a_newer_format_is_never_guessed_at(raw: bytes, message: str) -> None:
    with pytest.raises(FormatTooNewError, match=message):
        decode_superblock(raw)
    for copies in ((raw, RAW), (RAW, raw), (raw, raw), (raw, BLANK), (None, raw)):
        with pytest.raises(FormatTooNewError, match=message):
            choose_superblock(*copies)


def test_a_program_that_knows_of_no_pause_refuses_a_paused_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = encode_superblock(make(incompatible=module.Incompatible.PAUSED))
    assert decode_superblock(raw).paused
    assert not decode_superblock(RAW).paused
    monkeypatch.setattr(module, "KNOWN_INCOMPATIBLE", 0)  # as before there were pauses
    with pytest.raises(FormatTooNewError, match="features 0x1 that this program"):
        decode_superblock(raw)


def test_unknown_features_may_allow_reading_only() -> None:
    require_writable(make(compatible=1))
    with pytest.raises(FormatTooNewError, match="features 0x8 that this program"):
        require_writable(make(compatible_read_only=8))


@given(st.binary(max_size=SUPERBLOCK_BYTES + 1))
def test_garbage_is_refused(raw: bytes) -> None:
    with pytest.raises(RecordDamagedError):
        decode_superblock(raw)


@given(at=st.integers(0, 791), values=st.binary(min_size=1, max_size=24))
def test_nonsense_with_a_valid_checksum_never_escapes(at: int, values: bytes) -> None:
    raw = patched(RAW, at, f"{len(values)}s", values)
    try:
        superblock = decode_superblock(raw)
    except (RecordDamagedError, FormatTooNewError):
        return
    assert decode_superblock(encode_superblock(superblock)) == superblock


# -- two copies ---------------------------------------------------------------------------------


def test_two_equal_copies_are_silent() -> None:
    choice = choose_superblock(RAW, RAW)
    assert choice is not None
    assert choice.superblock == make()
    assert choice.warnings == choice.notes == ()
    assert choice.stale_copy == 0


@pytest.mark.parametrize("newer_first", [True, False])
def test_an_interrupted_update_is_a_note(newer_first: bool) -> None:
    newer = encode_superblock(make(sequence=5, session=3))
    choice = choose_superblock(*((newer, RAW) if newer_first else (RAW, newer)))
    assert choice is not None
    assert (choice.superblock.sequence, choice.superblock.session) == (5, 3)
    assert choice.stale_copy == (1 if newer_first else 0)
    assert choice.warnings == ()
    assert choice.notes == (
        "superblock copies are at sequences 5 and 4: an update was interrupted; the newer one is"
        " used",
    )


@pytest.mark.parametrize("bad", [None, BLANK, RAW[:-4] + bytes(4), b"\xff" * SUPERBLOCK_BYTES])
def test_one_bad_copy_is_a_warning(bad: bytes | None) -> None:
    for label, copies in (("A", (bad, RAW)), ("B", (RAW, bad))):
        choice = choose_superblock(*copies)
        assert choice is not None
        assert choice.superblock == make()
        assert len(choice.warnings) == 1
        assert choice.warnings[0].startswith(f"superblock copy {label}: ")
        assert choice.stale_copy == copies.index(bad)


def test_a_place_without_any_trace_holds_no_record() -> None:
    assert choose_superblock(BLANK, BLANK) is None
    assert choose_superblock(b"\xff" * SUPERBLOCK_BYTES, b"") is None


@pytest.mark.parametrize(
    "copies",
    [
        (None, None),
        (None, BLANK),
        (BLANK, None),
        (RAW[:100] + BLANK[100:], BLANK),
        (BLANK, RAW[:-1] + b"\0"),
    ],
)
def test_traces_without_a_valid_copy_are_damage(copies: tuple[bytes | None, bytes | None]) -> None:
    with pytest.raises(RecordDamagedError, match="both copies of the superblock are bad") as caught:
        choose_superblock(*copies)
    assert "full or checksum sync" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volume_uuid": UUID(int=5), "name": "db", "sequence": 9}, "belong to different volumes"),
        ({"flags": RecordFlag.CLEAN}, "differ at the same sequence 4"),
    ],
)
def test_copies_that_contradict_one_another_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecordDamagedError, match=message):
        choose_superblock(RAW, encode_superblock(make(**changes)))


@given(
    before=st.integers(0, 1000),
    cut=st.tuples(st.integers(0, 8), st.integers(0, 8)),
)
def test_an_update_cut_anywhere_gives_the_old_or_the_new(before: int, cut: tuple[int, int]) -> None:
    """Copy B is not begun before copy A is durable; either may be cut at any sector."""
    old = encode_superblock(make(sequence=before))
    new = encode_superblock(make(sequence=before + 1, flags=RecordFlag.CLEAN))
    first = new[: cut[0] * 512] + old[cut[0] * 512 :]
    second = new[: cut[1] * 512] + old[cut[1] * 512 :] if cut[0] == 8 else old
    choice = choose_superblock(first, second)
    assert choice is not None
    assert encode_superblock(choice.superblock) in (old, new)
    if cut == (8, 8):
        assert choice.superblock.clean


def test_magic_is_recognised_in_any_buffer() -> None:
    assert has_magic(RAW)
    assert has_magic(memoryview(RAW))
    assert not has_magic(BLANK)
    assert not has_magic(None)
