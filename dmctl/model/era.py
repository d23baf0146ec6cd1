"""Reader of dm-era's on-disk metadata: which blocks were written in which eras (pure).

The kernel keeps, in blocks of 4 KiB: a superblock; a B-tree from era to *writeset*, a bitset with
one bit a block; and the *era array*, one 32-bit era a block.  A worker in the kernel *digests*
writesets into the array, oldest first, and then removes them from the tree.  Bitsets and array are
B-trees from an index to array blocks full of 64-bit words or 32-bit eras.  `take_metadata_snap`
ends the current era and keeps a copy of the superblock whose trees do not change until
`drop_metadata_snap`.  All numbers are little-endian.

1. Never fewer blocks than were written.  Every block proves its type (salted crc32c), its place
   (its own number) and its part in the whole (keys, counts, sizes), and every era that was asked
   for is found in the tree or is older than all that are in the tree, that is digested.  Whatever
   does not fit raises `EraDamagedError`; the caller then treats all of the record as dirty.
2. More blocks than were written is possible, only with digested eras and an end before the newest:
   the array knows the last era of a block alone, so a block that was written later counts too.
3. A block of the array that is being digested into may hold marks of the oldest writeset of the
   tree.  They say what that writeset says.
4. The current era is not over; its bitset changes and is never read.  A device that was suspended
   has archived its current era, which then counts as over: its bitset has no root of its own.
   Of a snapshot's copy of the superblock, the two tree roots, the counts and the era are used.
5. The superblock of a live device changes while it is read.  Who reads a live device gives
   `snapshot` the root that the status line shows, and the live superblock is not needed.

Cost: a block is checked and merged at C speed, runs are found by searching for bits, and blocks of
a bitset or array are asked for in batches through `read_blocks`.  The array is read only if an
era that was asked for is digested: it is 32 times the size of a writeset.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from bitarray import bitarray

from bitmapd.crc import crc32c
from bitmapd.errors import BitmapdError, UsageError, WrongStateError

BLOCK_BYTES: Final = 4096
SECTOR_BYTES: Final = 512
NO_BLOCK: Final = 0  # the superblock's own number stands for "none" in root fields

SUPERBLOCK_MAGIC: Final = 2126579579
SUPERBLOCK_SALT: Final = 146538381
NODE_SALT: Final = 121107
ARRAY_SALT: Final = 595846735

# crc, flags, own number, uuid, magic, version | space map root: blocks, of these used, two roots |
# block size, metadata block size (sectors), blocks, era | current writeset: bits, root |
# writeset tree, era array, snapshot
SUPERBLOCK: Final = struct.Struct("<IIQ16sQI QQ112x IIII IQ QQQ")
NODE_HEADER: Final = struct.Struct("<IIQIIII")  # crc, flags, own number, entries, max, value size
ARRAY_HEADER: Final = struct.Struct("<IIIIQ")  # crc, max, entries, value size, own number
WRITESET: Final = struct.Struct("<IQ")  # bits, root of the bitset
ROOT: Final = struct.Struct("<Q")

INTERNAL, LEAF = 1, 2
MAX_DEPTH: Final = 16
MAX_ERA: Final = 1 << 31  # the kernel would need centuries; keeps the sign bit of a lane free
WORD_BITS: Final = 64
BATCH_BLOCKS: Final = 256

_CRC: Final = struct.Struct("<I")
_ZEROS: Final = bytes(BLOCK_BYTES)
_HIGH_BIT: Final = bytes(128) + bytes([1]) * 128

Buffer = bytes | bytearray | memoryview
ReadBlock = Callable[[int], Buffer]
ReadBlocks = Callable[[Sequence[int]], Sequence[Buffer]]


class EraDamagedError(BitmapdError):
    """The metadata of a dm-era device cannot be relied upon."""

    code = "era-damaged"


def _damaged(what: str) -> EraDamagedError:
    return EraDamagedError(
        f"metadata of the era device: {what}",
        "take everything that is in the record for dirty and make the era device anew",
    )


@dataclass(frozen=True, slots=True)
class Writeset:
    """The bitset of one era."""

    era: int
    bits: int
    root: int


@dataclass(frozen=True, slots=True)
class Superblock:
    """The live superblock, or the copy of it that a metadata snapshot keeps."""

    location: int
    block_bytes: int  # of the volume
    blocks: int  # of the volume
    current_era: int
    current_writeset: Writeset
    writeset_tree_root: int
    era_array_root: int
    snapshot_root: int  # NO_BLOCK if no snapshot is held
    used: int  # metadata blocks, when this was committed
    total: int


def _sealed(block: Buffer, location: int, salt: int, number_at: int, what: str) -> memoryview:
    """The block if it is whole, of the type that `salt` stands for, and where it belongs."""
    view = memoryview(block).cast("B")
    if len(view) != BLOCK_BYTES:
        raise _damaged(f"{what} {location} is {len(view)} bytes long, not {BLOCK_BYTES}")
    if crc32c(view[4:]) ^ 0xFFFFFFFF ^ salt != _CRC.unpack_from(view)[0]:
        raise _damaged(f"{what} {location} has a wrong checksum")
    if (number := ROOT.unpack_from(view, number_at)[0]) != location:
        raise _damaged(f"{what} {location} says that it is block {number}")
    return view


def read_superblock(block: Buffer, location: int = 0) -> Superblock:
    """Decode and check one; `location` is the number of the metadata block it was read from."""
    view = _sealed(block, location, SUPERBLOCK_SALT, 8, "superblock")
    fields = SUPERBLOCK.unpack_from(view)
    magic, version, total, used, block_sectors, metadata_sectors = fields[4:10]
    blocks, era, writeset_bits, writeset_root, tree, array, snapshot = fields[10:]
    if magic != SUPERBLOCK_MAGIC:
        raise _damaged(f"superblock {location} has the magic number {magic}")
    if version != 1:
        raise _damaged(f"superblock {location} is of version {version}, known is 1")
    if metadata_sectors * SECTOR_BYTES != BLOCK_BYTES:
        raise _damaged(f"superblock {location}: metadata blocks of {metadata_sectors} sectors")
    if not block_sectors:
        raise _damaged(f"superblock {location}: blocks of no size")
    if era >= MAX_ERA:
        raise _damaged(f"superblock {location}: era {era} is out of range")
    if not used <= total:
        raise _damaged(f"superblock {location}: {used} of {total} metadata blocks are used")
    for root, name in ((tree, "writeset tree"), (array, "era array")):
        if not NO_BLOCK < root < total:
            raise _damaged(f"superblock {location}: {name} at block {root} of {total}")
    if snapshot >= total:
        raise _damaged(f"superblock {location}: snapshot at block {snapshot} of {total}")
    return Superblock(
        location=location,
        block_bytes=block_sectors * SECTOR_BYTES,
        blocks=blocks,
        current_era=era,
        current_writeset=Writeset(era, writeset_bits, writeset_root),
        writeset_tree_root=tree,
        era_array_root=array,
        snapshot_root=snapshot,
        used=used,
        total=total,
    )


def runs(bits: bitarray) -> Iterator[tuple[int, int]]:
    """The maximal runs [first, stop) of set bits, in order."""
    find, stop = bits.find, 0
    while (first := find(1, stop)) >= 0:
        stop = find(0, first)
        if stop < 0:
            stop = len(bits)
        yield first, stop


class View:
    """One consistent state: what one superblock leads to."""

    def __init__(self, superblock: Superblock, read_blocks: ReadBlocks) -> None:
        self.superblock = superblock
        self._read_blocks = read_blocks
        archived = superblock.current_writeset.root == NO_BLOCK
        self.newest_era = superblock.current_era - (not archived)  # of those that are over
        self.writesets = self._find_writesets()

    def blocks_written(
        self, since_era: int, to_era: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Runs [first, stop) of the blocks written in eras since_era..to_era, both included.

        `to_era` is by default the newest era that is over.  See invariant 2 for older ones.
        """
        return runs(self.bits_written(since_era, to_era))

    def bits_written(self, since_era: int, to_era: int | None = None) -> bitarray:
        """The same, one bit for each block of the volume."""
        if to_era is None:
            to_era = self.newest_era
        if not 1 <= since_era <= to_era + 1:
            raise UsageError(f"eras {since_era} to {to_era} are no range of eras")
        if to_era > self.newest_era:
            raise UsageError(
                f"era {to_era} is not over: the newest one that is, is {self.newest_era}",
                "roll the era over by taking a metadata snapshot, then read that",
            )
        written = self._no_blocks()
        for era, writeset in self.writesets.items():
            if since_era <= era <= to_era:
                self._merge_bitset(writeset, written)
        if since_era < min(self._oldest, to_era + 1):
            self._merge_digested(since_era, written)
        return written

    def writeset_bits(self, era: int) -> bitarray:
        """What the bitset of one era of the tree says."""
        written = self._no_blocks()
        self._merge_bitset(self.writesets[era], written)
        return written

    def digested_bits(self, since_era: int) -> bitarray:
        """The blocks whose entry of the era array is `since_era` or later."""
        written = self._no_blocks()
        self._merge_digested(since_era, written)
        return written

    def _no_blocks(self) -> bitarray:
        return bitarray(self.superblock.blocks, endian="little")

    # -- the tree of writesets --------------------------------------------------------------
    def _find_writesets(self) -> Mapping[int, Writeset]:
        found = {}
        root = self.superblock.writeset_tree_root
        for era, value in self._leaves(root, WRITESET.size, "writeset tree"):
            bits, bitset = WRITESET.unpack(value)
            if not 1 <= era <= self.newest_era:
                raise _damaged(f"a writeset of era {era}, the newest is {self.newest_era}")
            if bits > self.superblock.blocks:
                raise _damaged(
                    f"writeset {era} has {bits} blocks, the volume {self.superblock.blocks}"
                )
            found[era] = Writeset(era, bits, bitset)
        newest = max(found, default=self.newest_era)
        self._oldest = min(found, default=newest + 1)
        complete = len(found) == newest + 1 - self._oldest
        if not complete or newest < self.superblock.current_era - 1:
            raise _damaged(
                f"of eras {self._oldest} to {self.newest_era} only {len(found)} have a writeset"
            )
        return MappingProxyType(found)

    # -- B-trees ------------------------------------------------------------------------------
    def _checked(
        self, numbers: Sequence[int], salt: int, number_at: int, what: str
    ) -> Iterator[memoryview]:
        total = self.superblock.total
        for start in range(0, len(numbers), BATCH_BLOCKS):
            batch = numbers[start : start + BATCH_BLOCKS]
            for number in batch:
                if not NO_BLOCK < number < total:
                    raise _damaged(f"{what} leads to block {number} of {total}")
            for number, block in zip(batch, self._read_blocks(batch), strict=True):
                yield _sealed(block, number, salt, number_at, what)

    def _leaves(self, root: int, value_bytes: int, what: str) -> Iterator[tuple[int, memoryview]]:
        """All keys, ascending, with their values; one level of the tree is read at a time."""
        level = [(root, 0, 1 << 64)]  # block, first key that it may hold, end of these keys
        for _ in range(MAX_DEPTH):
            below: list[tuple[int, int, int]] = []
            kinds = set()
            numbers = [number for number, _, _ in level]
            blocks = self._checked(numbers, NODE_SALT, 8, what)
            for (number, lowest, end), node in zip(level, blocks, strict=True):
                _, kind, _, entries, room, size, _ = NODE_HEADER.unpack_from(node)
                kinds.add(kind)
                if (kind, size) not in ((INTERNAL, ROOT.size), (LEAF, value_bytes)):
                    raise _damaged(f"{what}: node {number} is of kind {kind}, values of {size} B")
                values_at = NODE_HEADER.size + room * ROOT.size
                if values_at + room * size > BLOCK_BYTES or entries > room:
                    raise _damaged(f"{what}: node {number} has {entries} of {room} entries")
                if not entries and (kind, number) != (LEAF, root):
                    raise _damaged(f"{what}: node {number} is empty")
                keys = struct.unpack_from(f"<{entries}Q", node, NODE_HEADER.size)
                if any(a >= b for a, b in pairwise((lowest - 1, *keys, end))):
                    raise _damaged(f"{what}: keys of node {number} are out of order")
                if kind == LEAF:
                    for at, key in zip(range(values_at, BLOCK_BYTES, size), keys, strict=False):
                        yield key, node[at : at + size]
                else:
                    children = struct.unpack_from(f"<{entries}Q", node, values_at)
                    below.extend(zip(children, keys, (*keys[1:], end), strict=True))
            if len(kinds) != 1:
                raise _damaged(f"{what} has leaves at different depths")
            if not below:
                return
            level = below
        raise _damaged(f"{what} is deeper than {MAX_DEPTH} levels")

    # -- arrays -------------------------------------------------------------------------------
    def _array(
        self, root: int, entries: int, entry_bytes: int, what: str
    ) -> Iterator[tuple[int, bytes]]:
        """Pieces of an array of `entries`: the index of the first one, and the packed values."""
        room = (BLOCK_BYTES - ARRAY_HEADER.size) // entry_bytes
        wanted = -(-entries // room)
        keys, roots = [], []
        for key, value in self._leaves(root, ROOT.size, what):
            keys.append(key)
            roots.append(ROOT.unpack(value)[0])
        if keys != list(range(wanted)):
            raise _damaged(f"{what} at {root} has {len(keys)} blocks, not {wanted} in a row")
        for index, block in enumerate(self._checked(roots, ARRAY_SALT, 16, what)):
            _, maximum, count, size, _ = ARRAY_HEADER.unpack_from(block)
            first = index * room
            expected = min(room, entries - first)
            if (maximum, count, size) != (room, expected, entry_bytes):
                raise _damaged(
                    f"{what}: block {roots[index]} has {count} of {maximum} values of {size} B,"
                    f" not {expected} of {room} of {entry_bytes} B"
                )
            yield first, bytes(block[ARRAY_HEADER.size : ARRAY_HEADER.size + expected * size])

    def _merge_bitset(self, writeset: Writeset, into: bitarray) -> None:
        what = f"writeset of era {writeset.era}"
        words = -(-writeset.bits // WORD_BITS)
        for word, piece in self._array(writeset.root, words, WORD_BITS // 8, what):
            if _ZEROS.startswith(piece):
                continue
            first = word * WORD_BITS
            bits = bitarray(endian="little")
            bits.frombytes(piece)
            room = writeset.bits - first
            if len(bits) > room:
                if bits.find(1, room) >= 0:
                    raise _damaged(f"{what} marks blocks beyond its {writeset.bits}")
                del bits[room:]
            into[first : first + len(bits)] |= bits

    def _merge_digested(self, since_era: int, into: bitarray) -> None:
        """Two comparisons of all values of a piece at once: the piece is taken for one large
        integer with a lane of 32 bits for each value.  Values are below 2**31, so adding
        2**31 - limit sets the top bit of a lane exactly if its value is at least the limit, and
        nothing is carried into the next one."""
        lane = _CRC.size
        for first, piece in self._array(
            self.superblock.era_array_root, self.superblock.blocks, lane, "era array"
        ):
            if _ZEROS.startswith(piece):
                continue
            values = int.from_bytes(piece, "little")
            count = len(piece) // lane

            def at_least(limit: int, values: int = values, count: int = count) -> bitarray:
                limits = int.from_bytes(_CRC.pack(MAX_ERA - limit) * count, "little")
                tops = (values + limits).to_bytes(count * lane, "little")[lane - 1 :: lane]
                found = bitarray(endian="little")
                found.pack(tops.translate(_HIGH_BIT))
                return found

            if max(piece[lane - 1 :: lane]) > 127 or at_least(self.newest_era + 1).any():
                raise _damaged(
                    f"era array: one of the blocks {first} to {first + count - 1} was written"
                    f" in an era later than {self.newest_era}"
                )
            into[first : first + count] |= at_least(since_era)


class Metadata:
    """The metadata of one era device, read block by block; errors of the device pass through."""

    def __init__(self, read_block: ReadBlock, read_blocks: ReadBlocks | None = None) -> None:
        """`read_blocks` answers a list of block numbers with as many blocks, in this order.

        A block is looked at before the next call only, so that buffers may be used again.
        """
        self._read_block = read_block
        self._read_blocks = read_blocks or (lambda numbers: [read_block(n) for n in numbers])

    def live(self) -> View:
        """The state of the last commit; for metadata that nobody changes (invariant 5)."""
        return self._view(NO_BLOCK)

    def snapshot(self, root: int | None = None) -> View:
        """The metadata snapshot, at `root` if that is known, else where the superblock says."""
        if root is None:
            root = read_superblock(self._read_block(NO_BLOCK)).snapshot_root
        if root == NO_BLOCK:
            raise WrongStateError(
                "the era device holds no metadata snapshot", "send it take_metadata_snap first"
            )
        return self._view(root)

    def _view(self, location: int) -> View:
        superblock = read_superblock(self._read_block(location), location)
        return View(superblock, self._read_blocks)
