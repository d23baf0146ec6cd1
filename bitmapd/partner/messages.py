"""What two nodes of a volume say to one another (pure): values only, `codec` has the bytes.

| message | says | answer |
| --- | --- | --- |
| `Hello` | who I am, and of what generation | `Hello` |
| `Record` | what I own, have given away, had stored, and still copy | `Ready` |
| `Ready` | digest of what both own now | |
| `Add` | I want these extents (guesses beside them); these I own no longer | `Grant`, several |
| `Grant` | they are yours, with this dirt; those you guessed and do not get | `Got` |
| `Got` | I have processed your grants up to this frame | |
| `Remove` | I own these extents no longer | |
| `Free` | no copy of mine is under way there any more | |
| `Ask` | I am going to read these blocks | `Status`, several |
| `Status` | read them; these extents I give up besides | |
| `Ping` | I am alive, and how I am | `Pong` |
| `Take` | stop serving, give me everything | `Taken` |
| `Resize` | grow, in three steps | `Resized` |
| `Lead` | I take what belongs to nobody from now on | |
| `Bye` | the connection ends, and in which way | |
| `Error` | the connection ends: you are wrong | |

Runs are half-open: (first, stop), sorted, not touching, inside the volume; of extents, but for the
blocks of `Grant.dirt` and `Ask`.  UUIDs and ids are 16 raw bytes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from bitmapd.peer.payloads import Runs
from bitmapd.peer.words import Bye, Error, Pong


class Role(enum.IntEnum):
    PAIR = 0
    KEEPER = 1  # holds a record, serves no host


class HelloFlag(enum.IntFlag):
    """Unknown ones stay as they came: features say what has to be understood."""

    FRESH = 1  # has finished no exchange since its process began; owns nothing
    ALONE = 2  # goes on without the other, which was proven dead
    VOLATILE = 4  # something was recorded in the partner's memory only
    SERVES = 8  # hosts
    LEAD = 16  # takes what belongs to nobody
    GO_ON = 32  # would take new places in a cut
    GONE_ON = 64  # has done so since the last pairing
    RELIES = 128  # on the other's copy of its record, while the link is up
    STORED = 256  # what is granted to it has to be in the other's stored record by then
    UNSTORED = 512  # its own record cannot be written
    DIRECT = 1024  # its kernel writes for hosts, and goes on when the process has ended
    ON_PROMOTE = 2048  # lets hosts in after a takeover only


@dataclass(frozen=True, slots=True)
class Hello:
    """`generations`: four, current first, padded with nil.  `last_paired`: the incarnation of the
    other that this process was last paired with, 0: none."""

    volume: bytes  # nil: wants to join
    node: int  # 1 or 2
    lowest: int  # protocol versions
    highest: int
    role: Role
    flags: HelloFlag
    required: int  # features of the other
    offered: int
    term: int
    incarnation: int  # not 0
    session: int
    boot: bytes
    generations: tuple[bytes, ...]
    size_bytes: int
    extent_bytes: int
    block_bytes: int
    last_paired: int
    machine: bytes
    timeout_ms: int
    most_requests: int  # that are taken at a time: 1 to 1,024
    name: str
    primary: str
    secondary: str
    program: str


@dataclass(frozen=True, slots=True)
class Record:
    """`copying`: extents not own where a copy of the sender's is under way."""

    own: Runs
    owed: Runs
    stored: Runs
    copying: Runs


@dataclass(frozen=True, slots=True)
class Ready:
    digest: int


@dataclass(frozen=True, slots=True)
class Add:
    request: int
    needed: Runs
    predicted: Runs
    removed: Runs


@dataclass(frozen=True, slots=True)
class Grant:
    """`request` 0: given unasked.  `last`: no other answer to the request comes."""

    request: int
    granted: Runs
    refused: Runs
    embargo: Runs
    dirt: Runs  # of blocks
    last: bool


@dataclass(frozen=True, slots=True)
class Got:
    sequence: int


@dataclass(frozen=True, slots=True)
class Remove:
    runs: Runs


@dataclass(frozen=True, slots=True)
class Free:
    runs: Runs


@dataclass(frozen=True, slots=True)
class Ask:
    request: int
    blocks: Runs


@dataclass(frozen=True, slots=True)
class Status:
    """`at_rest`: 0 what was in flight has landed, 1 the sender never wrote there."""

    request: int
    at_rest: int
    given_up: Runs
    last: bool


IDLE: Final = 3  # added to `Ping.secondary` by a node that lets no host in


@dataclass(frozen=True, slots=True)
class Ping:
    time_us: int  # the sender's monotonic clock
    lag_us: int  # of its loop
    dirty_bytes: int
    age_ms: int  # of its oldest dirt
    secondary: int  # 0 up, 1 down, 2 paused; or these and IDLE
    copied_bytes: int


@dataclass(frozen=True, slots=True)
class Take:
    force: bool


@dataclass(frozen=True, slots=True)
class Taken:
    code: int  # 0: done
    text: str


@dataclass(frozen=True, slots=True)
class Resize:
    size_bytes: int
    step: int  # 1 can you, 2 do, 3 done


@dataclass(frozen=True, slots=True)
class Resized:
    code: int  # 0: done
    text: str


@dataclass(frozen=True, slots=True)
class Lead:
    claim: int  # the higher one counts


Message = (
    Hello
    | Record
    | Ready
    | Add
    | Grant
    | Got
    | Remove
    | Free
    | Ask
    | Status
    | Ping
    | Pong
    | Take
    | Taken
    | Resize
    | Resized
    | Lead
    | Bye
    | Error
)
