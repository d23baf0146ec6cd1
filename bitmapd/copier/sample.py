"""Finds out a secondary that forgets what it was sent.

A server with temporary or copy-on-write storage confirms flushes, and has lost what it confirmed
when it is started again; so has a disk that was put back to a snapshot.  Nothing in the protocol
says so, and the record, which was cleared on its word, does not name what it lost.  So whenever a
secondary comes back, and at the start, some blocks that were copied lately are compared.

1. A block is compared only while the gate says that it cannot differ, as `Verify` does it: what is
   waiting to be copied or suspect proves nothing.
2. Bounded: at most `SAMPLES` blocks and `SAMPLE_BYTES`, for at most `CHECK_S` and the answers that
   are under way then.  Copying goes on meanwhile; the volume is not in sync before it is over.
3. Equal blocks prove nothing about others.  One that differs means that anything may be gone.
4. A difference is the secondary's only where the primary is known not to have changed.  Else what
   is done about it would destroy the last good copy after a primary was overwritten.  So at the
   start nothing is compared unless the primary was found as the last stop left it.
5. What was given away is compared no more, not even by a comparison that is under way.

What was copied lately is in memory here; the volume keeps some of it from session to session
(`lately`).  A crash loses what came since; a secondary that forgot only that is not found out.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence

from bitmapd.copier.comparing import BothRead
from bitmapd.copier.verify import Verify, VerifyResult
from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Device, Scheduler, Target
from bitmapd.media.buffers import BufferPool
from bitmapd.record.geometry import Geometry

SAMPLES = 64
SAMPLE_BYTES = 16 << 20
REMEMBERED = 1024
CHECK_S = 5.0


class Samples:
    """See the module docstring.  `ended` tells where they differ, (offset, length) in bytes."""

    def __init__(
        self,
        geometry: Geometry,
        gate: Gate,
        primary: Device,
        secondary: Target,
        scheduler: Scheduler,
        pool: BufferPool,
        ended: Callable[[Sequence[tuple[int, int]]], None],
    ) -> None:
        self._geometry = geometry
        self._gate = gate
        self._primary = primary
        self._secondary = secondary
        self._scheduler = scheduler
        self._pool = pool
        self._ended = ended
        self._recent: dict[int, None] = {}  # blocks, the newest last
        self._most = max(1, min(SAMPLES, SAMPLE_BYTES // geometry.block_bytes))
        self._verify: Verify | None = None

    @property
    def checking(self) -> bool:
        return self._verify is not None

    def copied(self, first: int) -> None:
        """A run of blocks that begins with this one is on the secondary."""
        self._recent.pop(first, None)
        self._recent[first] = None
        if len(self._recent) > REMEMBERED:
            del self._recent[next(iter(self._recent))]

    def remember(self, blocks: Iterable[int]) -> None:
        """What `lately` was in an earlier session."""
        for block in blocks:
            if 0 <= block < self._geometry.blocks:
                self.copied(block)

    @property
    def lately(self) -> list[int]:
        """The newest of them, which are most likely to be lost, and some of the older ones."""
        blocks = list(self._recent)
        newest = self._most - self._most // 2
        older = blocks[:-newest]
        step = max(1, len(older) // max(1, self._most // 2))
        return older[::step][: self._most // 2] + blocks[-newest:]

    def given(self, gone: BlockSet) -> None:
        """Somebody else writes these from now on."""
        for block in [block for block in self._recent if gone.any(block, block + 1)]:
            del self._recent[block]
        if self._verify is not None:
            self._verify.leave_out(gone)

    def grow(self, geometry: Geometry) -> None:
        self._geometry = geometry

    def check(self) -> None:
        """Compare them now.  Called only while none of this is under way."""
        blocks = [block for block in self.lately if not self._gate.may_differ(block, block + 1)]
        if not blocks:
            return
        self._verify = Verify(
            self._geometry,
            self._gate,
            BothRead(self._geometry, self._primary, self._secondary, self._pool),
            self._scheduler,
            repair=False,
            done=self._compared,
            only=blocks,
        )
        self._verify.start()
        self._scheduler.call_later(
            CHECK_S, self._verify.cancel, OSError(errno.ECANCELED, "took too long")
        )

    def _compared(self, _error: OSError | None, result: VerifyResult) -> None:
        # An error says nothing against the blocks that were compared before it.
        self._verify = None
        self._ended(result.unexpected)
