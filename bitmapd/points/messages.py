"""What a sender of consistent points and its receiver say to one another: values only (pure).

A *point* is the content of a volume at one cut.  The sender reads what changed since the last one,
and sends it as entries; the receiver has the point when it says so, and not before.

| message | from | says |
| --- | --- | --- |
| `Hello2` | both | who I am, of what generation, and how far |
| `Begin` | sender | point `point` follows `base`; entries of it come from now on |
| `Data` | sender | content of blocks |
| `End` | sender | that was the point: so many entries, with this digest |
| `Committed` | receiver | the point is durable here |
| `Applied` | receiver | the point is in the image |
| `Received` | receiver | entries up to this stamp are in memory |
| `Have` | receiver | these stamps of the open point are here |
| `Need` | receiver | these blocks have to be sent once more |
| `Map` | receiver | these extents may differ from what you have |
| `Handover`, `Taken` | sender, receiver | serve from now on; done |
| `ApplyUpTo` | sender | a group may be applied up to this number |
| `Verify`, `Sums` | sender, receiver | tell me the sums of these blocks; here they are |
| `Compare`, `Pieces` | sender, receiver | the same of the pieces of these blocks |
| `Credit` | receiver | the journal has so much more room |
| `Ping`, `Pong` | both | I am alive; so am I |
| `Bye`, `Error` | both | the connection ends: in which way; because you are wrong |

1. The connection begins with the HELLO2 of the sender, then that of the receiver, then one or more
   `Have`, the last of which says so.  With `Have` the receiver names what it has of the open point
   of this incarnation: point 0 and no runs if there is none.  What another incarnation has left is
   dropped, durably, before any of it.
2. The receiver answers a HELLO2 only when no commit is under way, and with what its medium says.
   So a `committed` that has grown since this sender process first heard it is this sender's own.
3. `Have` comes, too, instead of COMMITTED when an END does not fit what is there.
4. Stamps grow by one with each entry of an incarnation.  Of several entries of a block in an open
   point the one with the largest stamp counts alone: its mask names every piece that may differ
   from the point before.  A point is committed only if sender and receiver mean the same entries:
   that is what count and digest of END are for.
5. `Begin` comes before the first `Data` or `End` of a connection, and once more at the cut: the
   latest one counts, since time, label and group are those of the cut.
6. `Data` costs credit: `cost_bytes`.  `Hello2.credit_bytes` is what may be sent on this connection
   before there is more; `Credit` adds to it.
7. Before point 1 the receiver has nothing that it would lose, and may write entries to the image at
   once.

UUIDs and ids are 16 raw bytes, nil: none.  Runs are half-open: (first, stop), sorted, not touching;
of blocks, but for the extents of `Map`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from bitmapd.peer.payloads import Runs
from bitmapd.peer.words import Bye, Error, Pong

NIL = bytes(16)


class Role(enum.IntEnum):
    SENDER = 1
    RECEIVER = 2
    PROMOTED = 3  # was a receiver, and serves hosts
    DEMOTED = 4  # was a sender, and waits for the other to be promoted


class Feature(enum.IntFlag):
    """Unknown ones stay as they came, and are not used."""

    ZSTD = 1
    PIECES = 2  # answers `Compare`, for where the sender does not know what differs
    GROUP = 4
    CATCH_UP = 8  # a receiver that may be asked for IN_PLACE
    IN_PLACE = 16  # of a sender: there is no room for the open point, may it go into the image?
    # Of a receiver: it goes there, and so nothing has to fit.


class Encoding(enum.IntEnum):
    """Of the masked pieces of an entry, one behind the other."""

    RAW = 0
    ZSTD = 1  # one frame, shorter than the pieces
    ZEROS = 2  # no payload


@dataclass(frozen=True, slots=True)
class Hello2:
    """`generations`: four, current first, padded with nil.  `committed`: of a receiver the newest
    point that is durable there, of a sender the newest one that it knows to be; 0: none.  Sizes of
    blocks and extents are both 0 where none are known yet."""

    volume: bytes
    incarnation: bytes  # of the process
    generations: tuple[bytes, ...]
    size_bytes: int
    block_bytes: int
    extent_bytes: int
    committed: int
    applied: int
    oldest_kept: int
    role: Role
    features: Feature
    credit_bytes: int
    term: int
    name: str
    program: str


@dataclass(frozen=True, slots=True)
class Begin:
    """`wall_ns`: Unix time of the cut in nanoseconds, for people; 0 before it.  `group`: number of
    the point of a group, 0: of none.  `label`: what an administrator called the point, or empty."""

    point: int
    incarnation: bytes
    base: int
    wall_ns: int
    group: int
    size_bytes: int
    label: str


@dataclass(frozen=True, slots=True)
class Entry:
    """Pieces of a block: bit n of `mask` is piece n of 4 KiB.  `sum64` is `pieces.piece_sum`."""

    block: int
    stamp: int
    mask: int
    encoding: Encoding
    sum64: int
    payload: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Data:
    """1 to 62 entries of the open point; blocks and stamps ascend."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class End:
    """`entries`: how many blocks the point has; `digest16` is `pieces.digest` of them."""

    point: int
    incarnation: bytes
    entries: int
    digest16: bytes


@dataclass(frozen=True, slots=True)
class Committed:
    point: int
    incarnation: bytes


@dataclass(frozen=True, slots=True)
class Applied:
    point: int


@dataclass(frozen=True, slots=True)
class Received:
    stamp: int


@dataclass(frozen=True, slots=True)
class Have:
    """`runs`: (first block, count, first stamp); stamps of a run grow by one with the blocks.
    At most 50,000 of them; `last`: no other `Have` belongs to this answer."""

    point: int
    incarnation: bytes
    runs: tuple[tuple[int, int, int], ...]
    last: bool


@dataclass(frozen=True, slots=True)
class Need:
    runs: Runs


@dataclass(frozen=True, slots=True)
class Map:
    runs: Runs  # of extents


@dataclass(frozen=True, slots=True)
class Handover:
    term: int


@dataclass(frozen=True, slots=True)
class Taken:
    term: int


@dataclass(frozen=True, slots=True)
class ApplyUpTo:
    group: int


@dataclass(frozen=True, slots=True)
class Verify:
    runs: Runs


@dataclass(frozen=True, slots=True)
class Sums:
    """xxh3-64 of whole blocks from `first` on; none, if the image cannot be read there.  One for
    each run of a `Verify`, in that order."""

    first: int
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Compare:
    """`salt`: of the sums, as the sender likes; one answer for all of the runs."""

    salt: int
    runs: Runs


@dataclass(frozen=True, slots=True)
class Pieces:
    """`sums.piece_sums` of the runs of a `Compare`, one behind the other, `first` being its first
    block; none, if the image cannot be read there."""

    first: int
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Credit:
    bytes: int


@dataclass(frozen=True, slots=True)
class Ping:
    time_us: int  # the sender's monotonic clock


Message = (
    Hello2
    | Begin
    | Data
    | End
    | Committed
    | Applied
    | Received
    | Have
    | Need
    | Map
    | Handover
    | Taken
    | ApplyUpTo
    | Verify
    | Sums
    | Compare
    | Pieces
    | Credit
    | Ping
    | Pong
    | Bye
    | Error
)
