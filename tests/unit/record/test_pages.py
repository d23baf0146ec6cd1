"""Pages of the record: every way in which a slot can be torn, rotten, lost or misplaced."""

from __future__ import annotations

from itertools import pairwise
from uuid import UUID

import pytest
from bitarray import bitarray
from crc32c import crc32c
from hypothesis import example, given
from hypothesis import strategies as st

from bitmapd.record import pages
from bitmapd.record.pages import (
    EXTENTS_PER_PAGE,
    HEAL_JUMP,
    MAX_SEQUENCE,
    ONES_PAGE,
    PAGE_BYTES,
    PAGE_PAYLOAD_BYTES,
    RETRY_WINDOW,
    SECTOR_BYTES,
    PageChoice,
    Verdict,
    choose,
    decode_slot,
    encode_page,
    encode_page_into,
    page_bits,
    page_count,
    page_offset,
    record_size_bytes,
)

VOLUME = UUID("11111111-2222-3333-4444-555555555555").bytes
OTHER = UUID("99999999-2222-3333-4444-555555555555").bytes
INDEX = 3
ZEROS = bytes(PAGE_PAYLOAD_BYTES)

payloads = st.binary(min_size=PAGE_PAYLOAD_BYTES, max_size=PAGE_PAYLOAD_BYTES)
volumes = st.binary(min_size=16, max_size=16)


def page(sequence: int, previous: int, bits: bytes = ZEROS, index: int = INDEX) -> bytes:
    return encode_page(VOLUME, index, sequence, previous, bits)


def read(slot0: bytes | None, slot1: bytes | None) -> PageChoice:
    return choose(slot0, slot1, VOLUME, INDEX)


def torn(before: bytes, after: bytes, landed: int) -> bytes:
    """`before` with those sectors of `after` whose bit in `landed` is set."""
    image = bytearray(before)
    for sector in range(8):
        if landed >> sector & 1:
            at = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
            image[at] = after[at]
    return bytes(image)


def spoil(raw: bytes, sector: int) -> bytes:
    image = bytearray(raw)
    image[sector * SECTOR_BYTES + 100] ^= 0x10
    return bytes(image)


def reseal(raw: bytes, volume: bytes = VOLUME, index: int = INDEX) -> bytes:
    """Give changed sectors valid checksums again."""
    image = bytearray(raw)
    seed = pages.page_seed(volume, index)
    for start in range(0, PAGE_BYTES, SECTOR_BYTES):
        end = start + SECTOR_BYTES - 4
        image[end : end + 4] = crc32c(image[start:end], seed).to_bytes(4, "little")
    return bytes(image)


def is_ones(choice: PageChoice) -> bool:
    return choice.state.damaged and choice.bits == ONES_PAGE and choice.state.sequence == 0


# -- places and sizes ---------------------------------------------------------------------------


def test_the_largest_volume_has_2132_pages() -> None:
    assert EXTENTS_PER_PAGE == 31488
    assert page_count(1 << 26) == 2132
    assert record_size_bytes(1 << 26) == 17_596_416


def test_pages_lie_behind_one_another() -> None:
    assert [page_count(n) for n in (1, EXTENTS_PER_PAGE, EXTENTS_PER_PAGE + 1)] == [1, 1, 2]
    offsets = [page_offset(index, slot) for index in range(3) for slot in (0, 1)]
    assert offsets[0] == 131072
    assert all(later - earlier == PAGE_BYTES for earlier, later in pairwise(offsets))
    assert record_size_bytes(1) == 131072 + 2 * PAGE_BYTES


def test_bits_of_a_page_are_cut_from_the_volume_and_padded() -> None:
    bits = bitarray(EXTENTS_PER_PAGE + 3, endian="little")
    bits[0] = bits[EXTENTS_PER_PAGE] = bits[EXTENTS_PER_PAGE + 2] = True
    assert page_bits(bits, 0) == b"\x01" + ZEROS[1:]
    assert page_bits(bits, 1) == b"\x05"
    padded = read(page(2, 1, page_bits(bits, 1)), page(1, 0))
    assert padded.bits == b"\x05" + ZEROS[1:]


# -- encoding -----------------------------------------------------------------------------------


@given(
    volume=volumes,
    index=st.integers(0, (1 << 32) - 1),
    previous=st.integers(0, MAX_SEQUENCE - 1),
    step=st.integers(1, 1 << 40),
    bits=payloads,
)
def test_a_page_comes_back(
    volume: bytes, index: int, previous: int, step: int, bits: bytes
) -> None:
    sequence = min(previous + step, MAX_SEQUENCE)
    slot = decode_slot(encode_page(volume, index, sequence, previous, bits), volume, index)
    assert slot.whole
    assert (slot.sequence, slot.previous, slot.bits) == (sequence, previous, bits)


@given(payloads)
def test_encoding_leaves_nothing_of_the_old_content(bits: bytes) -> None:
    buffer = bytearray(b"\xa5" * PAGE_BYTES)
    encode_page_into(memoryview(buffer), VOLUME, INDEX, 7, 6, bits)
    assert buffer == page(7, 6, bits)


def test_too_many_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="3936 bytes of bits, not 3937"):
        page(1, 0, ZEROS + b"\0")


# -- ordinary lives -----------------------------------------------------------------------------


def test_a_new_page_is_whole_with_slot_0_newest() -> None:
    choice = read(page(2, 1), page(1, 0))
    assert choice.state.verdict is Verdict.WHOLE
    assert (choice.state.newest_slot, choice.state.sequence, choice.state.highest) == (0, 2, 2)
    assert choice.state.message == ""
    assert not choice.state.damaged


@pytest.mark.parametrize("newest", [0, 1])
def test_the_newer_slot_counts(newest: int) -> None:
    slots = [page(8, 7, b"\x01"), page(8, 7, b"\x01")]
    slots[newest] = page(9, 8, b"\x02")
    choice = read(*slots)
    assert choice.state.newest_slot == newest
    assert choice.state.sequence == 9
    assert choice.bits[:1] == b"\x02"


def test_a_write_after_failed_ones_may_skip_sequences() -> None:
    choice = read(page(8, 7), page(12, 8, b"\x02"))
    assert choice.state.verdict is Verdict.WHOLE
    assert (choice.state.newest_slot, choice.state.highest) == (1, 12)


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("old", [1, 2, 77])
def test_every_mixture_of_a_torn_write_gives_the_content_before(slot: int, old: int) -> None:
    kept = page(old + 1, old, b"\xf0")
    before, after = page(old, old - 1, b"\xff"), page(old + 2, old + 1, b"\x0f")
    for landed in range(256):
        mixed = torn(before, after, landed)
        choice = read(*((mixed, kept) if slot == 0 else (kept, mixed)))
        if landed == 255:
            assert choice.bits[:1] == b"\x0f"
            assert choice.state.verdict is Verdict.WHOLE
            continue
        assert choice.bits[:1] == b"\xf0"
        assert choice.state.newest_slot == 1 - slot
        assert choice.state.sequence == old + 1
        if landed:
            assert choice.state.verdict is Verdict.TORN
            assert choice.state.highest == old + 2
            assert f"slot {slot} was cut short" in choice.state.message
        else:
            assert choice.state.verdict is Verdict.WHOLE


def test_two_torn_attempts_never_pass_for_one_whole_page() -> None:
    """The first attempt drops an extent; after the crash that extent is relied upon again."""
    kept, before = page(6, 5, b"\xff" * PAGE_PAYLOAD_BYTES), page(5, 4)
    first = torn(before, page(7, 6), 0b00001111)
    state = read(first, kept).state
    second = encode_page(VOLUME, INDEX, state.highest + 1, state.sequence, ONES_PAGE)
    for landed in range(255):
        assert read(torn(first, second, landed), kept).bits == ONES_PAGE


# -- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", [0, 1])
def test_every_single_bit_flip_counts_as_ones(slot: int) -> None:
    slots = [bytearray(page(9, 8, b"\x55" * 3936)), bytearray(page(8, 7, b"\xaa" * 3936))]
    for at in range(PAGE_BYTES):
        for bit in range(8):
            slots[slot][at] ^= 1 << bit
            assert is_ones(choose(slots[0], slots[1], VOLUME, INDEX)), (at, bit)
            slots[slot][at] ^= 1 << bit
    assert not is_ones(choose(slots[0], slots[1], VOLUME, INDEX))


WHOLE9, WHOLE8 = page(9, 8), page(8, 7)


@pytest.mark.parametrize(
    ("slot0", "slot1", "message"),
    [
        (None, WHOLE8, "slot 0 cannot be read; it counts as all ones"),
        (WHOLE9, None, "slot 1 cannot be read"),
        (None, None, "slot 0 cannot be read; slot 1 cannot be read"),
        (WHOLE9[:-1], WHOLE8, "slot 0 is cut short after 4095 bytes"),
        (WHOLE9, b"", "slot 1 is cut short after 0 bytes"),
        (bytes(PAGE_BYTES), WHOLE8, "slot 0 is blank"),
        (bytes(PAGE_BYTES), bytes(PAGE_BYTES), "slot 0 is blank; slot 1 is blank"),
        (b"\xff" * PAGE_BYTES, WHOLE8, "slot 0 has damaged sectors: 0, 1, 2, 3, 4, 5, 6, 7"),
        (spoil(spoil(WHOLE9, 2), 5), WHOLE8, "slot 0 has damaged sectors: 2, 5"),
        (WHOLE9, spoil(WHOLE8, 7), "slot 1 has damaged sectors: 7"),
        (WHOLE9, page(8, 7, index=4), "slot 1 holds page 4 of volume 11111111-2222-3333"),
        (WHOLE9, encode_page(OTHER, INDEX, 8, 7, ZEROS), "slot 1 holds page 3 of volume 99999999"),
        (WHOLE9, WHOLE9, "sequences 9 and 9, which do not follow"),
        (WHOLE9, page(7, 6), "sequences 9 and 7, which do not follow"),
        (page(12, 11), WHOLE9, "sequences 12 and 9, which do not follow"),
        (torn(page(7, 6), WHOLE9, 1), torn(page(6, 5), WHOLE8, 1), "slot 0 is torn; slot 1 is"),
        (torn(page(6, 5), page(10, 9), 1), WHOLE8, "the sectors of slot 0 do not follow those of"),
        (WHOLE9, torn(page(3, 2), page(4, 3), 1), "the sectors of slot 1 do not follow those of"),
        (
            torn(page(7, 6), page(8 + RETRY_WINDOW, 8), 1),
            WHOLE8,
            "the sectors of slot 0 do not follow those of",
        ),
    ],
)
def test_what_cannot_be_told_counts_as_ones(
    slot0: bytes | None, slot1: bytes | None, message: str
) -> None:
    choice = read(slot0, slot1)
    assert is_ones(choice)
    assert message in choice.state.message
    assert f"page {INDEX} (extents from {INDEX * EXTENTS_PER_PAGE})" in choice.state.message


def test_the_last_sequence_of_the_retry_window_is_a_torn_write() -> None:
    mixed = torn(page(7, 6), page(8 + RETRY_WINDOW - 1, 8), 1)
    assert read(mixed, WHOLE8).state.verdict is Verdict.TORN


def test_the_highest_sequence_counts_sectors_of_damaged_slots() -> None:
    assert read(spoil(page(900, 8), 1), WHOLE8).state.highest == 900
    assert read(None, None).state.highest == 0


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"bmpg"),  # magic
        (4, (INDEX + 1).to_bytes(4, "little")),  # index
        (8, OTHER),  # volume
        (24, (9).to_bytes(8, "little")),  # a predecessor that is not older
        (496, bytes(8)),  # sequence 0
        (496, (MAX_SEQUENCE + 1).to_bytes(8, "little")),  # a sequence without successors
        (512 + 504, (0).to_bytes(4, "little")),  # sector 1 says that it is sector 0
    ],
)
def test_a_valid_checksum_does_not_excuse_wrong_content(at: int, value: bytes) -> None:
    changed = bytearray(WHOLE9)
    changed[at : at + len(value)] = value
    assert is_ones(read(reseal(changed), WHOLE8))


def test_sectors_of_one_page_in_the_wrong_places_are_damage() -> None:
    swapped = WHOLE9[512:1024] + WHOLE9[:512] + WHOLE9[1024:]
    assert is_ones(read(swapped, WHOLE8))


@given(st.binary(max_size=2 * PAGE_BYTES), st.binary(max_size=2 * PAGE_BYTES))
@example(bytes(PAGE_BYTES), b"\xff" * PAGE_BYTES)
def test_garbage_counts_as_ones(slot0: bytes, slot1: bytes) -> None:
    assert is_ones(read(slot0, slot1))


# -- the whole protocol against a model ---------------------------------------------------------
#
# A page whose content is a set of eight extents, one in each sector.  `relied` is what the store
# takes for durably recorded.  Whatever happens, what is read after a crash holds all of it.


def content(members: int) -> bytes:
    bits = bytearray(PAGE_PAYLOAD_BYTES)
    for sector, (_, _, _, first, _) in enumerate(pages._PIECES):
        bits[first] = members >> sector & 1
    return bytes(bits)


def members(bits: bytes) -> int:
    return sum(
        (bits[first] & 1) << sector for sector, (_, _, _, first, _) in enumerate(pages._PIECES)
    )


class Medium:
    """Two slots, and the store's side of the protocol."""

    def __init__(self) -> None:
        self.slots = [page(2, 1), page(1, 0)]
        self.newest, self.sequence, self.highest, self.relied = 0, 2, 2, 0

    def submit(self, wanted: int, landed: int) -> None:
        """A write of which these sectors reach the medium."""
        self.highest += 1
        self.relied &= wanted
        slot = 1 - self.newest
        after = page(self.highest, self.sequence, content(wanted))
        self.slots[slot] = torn(self.slots[slot], after, landed)

    def write(self, wanted: int) -> None:
        self.submit(wanted, 255)
        self.newest, self.sequence, self.relied = 1 - self.newest, self.highest, wanted

    def rot(self, slot: int, sector: int) -> None:
        self.slots[slot] = spoil(self.slots[slot], sector)

    def load(self, hidden: int, heal_landed: list[int]) -> None:
        """Start again; slots in `hidden` cannot be read this time.  A damaged page is healed, and
        each entry of `heal_landed` cuts the power in the middle of that."""
        for landed in [*heal_landed, None]:
            seen = [None if hidden >> slot & 1 else raw for slot, raw in enumerate(self.slots)]
            choice = read(*seen)
            assert not self.relied & ~members(choice.bits), choice.state
            state = choice.state
            if not state.damaged:
                self.newest, self.sequence, self.highest = (
                    state.newest_slot,
                    state.sequence,
                    state.highest,
                )
                self.relied = members(choice.bits)
                return
            # As `Loaded.heal_sequence`, which takes the highest of all pages: this page's slots
            # are hidden only for a while, and other pages stand for what they hold.
            highest = max(decode_slot(raw, VOLUME, INDEX).sequence for raw in self.slots)
            base = highest + HEAL_JUMP
            heals = [page(base, 0, ONES_PAGE), page(base + 1, base, ONES_PAGE)]
            if landed is not None:
                self.slots[0] = torn(self.slots[0], heals[0], landed & 255)
                if landed & 255 == 255:
                    self.slots[1] = torn(self.slots[1], heals[1], landed >> 8)
                hidden = 0
                continue
            self.slots = heals
            self.newest, self.sequence, self.highest, self.relied = 1, base + 1, base + 1, 255
            return


sectors = st.integers(0, 255)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), sectors),
        st.tuples(st.just("fail"), sectors, sectors),
        st.tuples(st.just("rot"), st.integers(0, 1), st.integers(0, 7)),
        st.tuples(st.just("crash"), sectors, sectors),
        st.tuples(st.just("load"), st.integers(0, 3), st.lists(st.integers(0, 0xFFFF), max_size=3)),
    ),
    max_size=25,
)


@given(steps)
@example([("write", 255), ("crash", 0, 15), ("crash", 255, 240)])
@example([("write", 1), ("fail", 0, 255), ("fail", 1, 15), ("load", 0, [])])
@example([("write", 2), ("crash", 0, 138), ("fail", 2, 117)])
@example([("write", 0), ("write", 1), ("load", 1, [1])])
@example([("write", 255), ("rot", 1, 0), ("load", 0, [1]), ("load", 0, [])])
def test_no_sequence_of_faults_loses_what_is_relied_upon(script: list[tuple]) -> None:
    medium = Medium()
    for name, *arguments in script:
        if name == "write":
            medium.write(arguments[0])
        elif name == "rot":
            medium.rot(*arguments)
        elif name == "load":
            medium.load(*arguments)
        else:
            medium.submit(*arguments)
            if name == "crash":
                medium.load(0, [])
    medium.load(0, [])
