"""What was read and has not been sent: in memory, and beyond it (pure).

1. It has each block once: what is read later takes the place of what was read before.
2. Blocks leave memory in the order in which they came first.
3. `held_bytes` is what memory holds; who fills it sees to the limit.  What went further
   (`overflow`) counts as here, and comes back before it is sent.

A crash loses it: the record names all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Spooled:
    """`raw`: the pieces of the mask, one behind the other."""

    block: int
    mask: int
    raw: bytes


class Beyond(Protocol):
    """What has blocks that memory has no room for."""

    held_bytes: int

    def __len__(self) -> int: ...

    def forget(self, block: int) -> None:
        """Newer content of it has come."""


class Spool:
    """See the module docstring."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.beyond: Beyond | None = None
        self.held_bytes = 0
        self._blocks: dict[int, Spooled] = {}

    @property
    def ahead_bytes(self) -> int:
        """To which it is filled by what nobody waits for; the rest is for what hosts wait for."""
        return self.limit_bytes // 2

    def __len__(self) -> int:
        return len(self._blocks) + (0 if self.beyond is None else len(self.beyond))

    @property
    def all_bytes(self) -> int:
        return self.held_bytes + (0 if self.beyond is None else self.beyond.held_bytes)

    def put(self, block: int, mask: int, raw: bytes) -> None:
        if self.beyond is not None:
            self.beyond.forget(block)
        before = self._blocks.get(block)
        if before is not None:
            self.held_bytes -= len(before.raw)
        self._blocks[block] = Spooled(block, mask, raw)
        self.held_bytes += len(raw)

    def first(self, most_bytes: int, most_blocks: int) -> list[Spooled]:
        """What leaves next: one block, or several that have at most so many bytes; none, if all of
        them are beyond memory."""
        return _up_to(most_bytes, islice(self._blocks.values(), most_blocks))

    def last(self, most_bytes: int) -> list[Spooled]:
        """What leaves last, likewise."""
        return _up_to(most_bytes, reversed(self._blocks.values()))

    def holds(self, spooled: Spooled) -> bool:
        """Whether memory has this content of its block."""
        return self._blocks.get(spooled.block) is spooled

    def forget(self, block: int) -> None:
        """It is read anew, whether it is here or not."""
        if self.beyond is not None:
            self.beyond.forget(block)
        if block in self._blocks:
            self.drop(block)

    def drop(self, block: int) -> None:
        """It was sent, or is elsewhere."""
        self.held_bytes -= len(self._blocks.pop(block).raw)


def _up_to(most_bytes: int, blocks: Iterable[Spooled]) -> list[Spooled]:
    """One of them, or as many as have at most so many bytes."""
    found: list[Spooled] = []
    size = 0
    for spooled in blocks:
        size += len(spooled.raw)
        if found and size > most_bytes:
            break
        found.append(spooled)
    return found
