"""Make dm-era metadata in memory: any shape, also those that the kernel and its tools never make.

Written from the layout alone and with nothing of the reader, so that the two can disagree.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from bitarray import bitarray
from crc32c import crc32c

SUPERBLOCK, NODE, ARRAY = 146538381, 121107, 595846735
INTERNAL, LEAF = 1, 2
MAGIC = 2126579579


def room_of_node(size: int) -> int:
    """Entries of a node; era_check wants a multiple of three."""
    return 4064 // (8 + size) // 3 * 3


def seal(block: bytearray | bytes, salt: int) -> bytes:
    """The block with the checksum that it should have."""
    return struct.pack("<I", crc32c(bytes(block[4:])) ^ 0xFFFFFFFF ^ salt) + bytes(block[4:])


@dataclass
class Image:
    """Metadata blocks by number; block 0 is written last, by `superblock`."""

    fanout: int | None = None  # entries per node of a tree; None: as many as there is room for
    blocks: dict[int, bytes] = field(default_factory=dict)
    salts: dict[int, int] = field(default_factory=dict)

    def put(self, body: bytes, salt: int, number_at: int, at: int | None = None) -> int:
        number = len(self.blocks) + 1 if at is None else at
        block = bytearray(body.ljust(4096, b"\0"))
        struct.pack_into("<Q", block, number_at, number)
        self.salts[number] = salt
        self.blocks[number] = seal(block, salt)
        return number

    def patch(self, number: int, offset: int, data: bytes) -> None:
        """Change bytes and make the checksum right again."""
        block = bytearray(self.blocks[number])
        block[offset : offset + len(data)] = data
        self.blocks[number] = seal(block, self.salts[number])

    def node(self, kind: int, size: int, entries: Sequence[tuple[int, bytes]]) -> int:
        room = room_of_node(size)
        body = struct.pack("<IIQIIII", 0, kind, 0, len(entries), room, size, 0)
        body += b"".join(struct.pack("<Q", key) for key, _ in entries)
        body = body.ljust(32 + 8 * room, b"\0") + b"".join(value for _, value in entries)
        return self.put(body, NODE, 8)

    def tree(self, size: int, entries: Sequence[tuple[int, bytes]]) -> int:
        kind = LEAF
        while True:
            per_node = self.fanout or room_of_node(size)
            nodes = [
                (entries[i][0], struct.pack("<Q", self.node(kind, size, entries[i : i + per_node])))
                for i in range(0, len(entries), per_node)
            ] or [(0, struct.pack("<Q", self.node(kind, size, [])))]
            if len(nodes) == 1:
                return int(struct.unpack("<Q", nodes[0][1])[0])
            entries, kind, size = nodes, INTERNAL, 8

    def array(self, size: int, packed: bytes) -> int:
        room = 4072 // size
        entries = []
        for index, at in enumerate(range(0, len(packed), room * size)):
            piece = packed[at : at + room * size]
            body = struct.pack("<IIIIQ", 0, room, len(piece) // size, size, 0) + piece
            entries.append((index, struct.pack("<Q", self.put(body, ARRAY, 16))))
        return self.tree(8, entries)

    def bitset(self, bits: bitarray) -> int:
        padded = bitarray(bits, endian="little")
        padded.extend([0] * (-len(bits) % 64))
        return self.array(8, padded.tobytes())

    def superblock(
        self,
        *,
        blocks: int,
        current_era: int,
        tree: int,
        array: int,
        current: tuple[int, int] = (0, 0),
        snapshot: int = 0,
        at: int | None = 0,
        total: int | None = None,
    ) -> int:
        used = len(self.blocks) + 1
        body = struct.pack(
            "<IIQ16sQIQQ112xIIIIIQQQQ",
            *(0, 0, 0, b"", MAGIC, 1, used + 1 if total is None else total, used),
            *(128, 8, blocks, current_era, *current, tree, array, snapshot),
        )
        return self.put(body, SUPERBLOCK, 8, at)

    def read(self, number: int) -> bytes:
        return self.blocks[number]

    def to_bytes(self, size_blocks: int) -> bytes:
        return b"".join(self.blocks.get(n, bytes(4096)) for n in range(size_blocks))


def marks(blocks: int, marked: Collection[int]) -> bitarray:
    bits = bitarray(blocks, endian="little")
    for block in marked:
        bits[block] = 1
    return bits


def image(
    blocks: int,
    writesets: Mapping[int, Collection[int]],
    digested: Sequence[int],
    current_era: int,
    *,
    fanout: int | None = None,
    snapshot: bool = False,
) -> Image:
    """Metadata of a volume of `blocks` with these marks; `digested` is the era array."""
    made = Image(fanout)
    entries = [
        (era, struct.pack("<IQ", blocks, made.bitset(marks(blocks, marked))))
        for era, marked in sorted(writesets.items())
    ]
    tree = made.tree(12, entries)
    array = made.array(4, struct.pack(f"<{blocks}I", *digested))
    current = (blocks, made.bitset(marks(blocks, ())))
    copy = 0
    if snapshot:
        copy = made.superblock(
            blocks=blocks, current_era=current_era, tree=tree, array=array, current=current, at=None
        )
        # The live trees of a device that went on have nothing to say about the snapshot.
        tree, array, current_era = made.tree(12, []), made.array(4, bytes(4 * blocks)), 1000
    made.superblock(
        blocks=blocks,
        current_era=current_era,
        tree=tree,
        array=array,
        current=current,
        snapshot=copy,
    )
    return made
