"""What the other node's stored record says to a survivor that knows nothing (pure).

A process that has met nobody cannot know what the other wrote; after the proof that it writes no
more, the union of both stored records is what the two would have agreed on if both had come back
(`share`).  So a survivor that reaches the other's record device (`partner_record`) need not compare
everything.

Invariants:
1. It is read after the proof, and never written.
2. It counts only if it is the other node's of this pair, of the same size, of a history that the
   two have in common, and does not say that it lacks something (VOLATILE).
"""

from __future__ import annotations

from bitmapd.partner.greeting import NIL
from bitmapd.partner.states import Lasting
from bitmapd.record.geometry import Geometry
from bitmapd.record.pair_state import PairFlag
from bitmapd.record.superblock import Superblock, as_ids


def why_not(found: Superblock, mine: Lasting, node: int, geometry: Geometry) -> str | None:
    """Why what it names cannot be relied on; None if it can.  `node`: this one."""
    pair = found.pair
    if pair is None:
        return f"it is the record of volume '{found.name}', which is of no pair"
    if pair.node == node:
        return f"it is the record of a node {node}, as this one is"
    if pair.volume is None or pair.volume.bytes != mine.volume:
        return f"it is the record of another pair ('{found.name}')"
    if found.geometry != geometry:
        theirs, ours = found.geometry.size_bytes, geometry.size_bytes
        return f"it is of a volume of {theirs} bytes, and here are {ours}"
    if not set(as_ids(found.generations)) & set(mine.generations) - {NIL}:
        return "it is of another history of the pair: a copy from long ago, or made anew"
    if PairFlag.VOLATILE in pair.flags:
        return "it says that places may have been in the memory of the nodes only"
    return None
