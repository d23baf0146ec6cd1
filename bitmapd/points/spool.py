"""What was read and has not been sent, in memory (pure).

1. It has each block once: what is read later takes the place of what was read before.
2. Blocks leave in the order in which they came first.
3. `held_bytes` is what it holds; who fills it sees to the limit.

A crash loses it: the record names all of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spooled:
    """`raw`: the pieces of the mask, one behind the other."""

    block: int
    mask: int
    raw: bytes


class Spool:
    """See the module docstring."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._blocks: dict[int, Spooled] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def put(self, block: int, mask: int, raw: bytes) -> None:
        before = self._blocks.get(block)
        if before is not None:
            self.held_bytes -= len(before.raw)
        self._blocks[block] = Spooled(block, mask, raw)
        self.held_bytes += len(raw)

    def first(self, most_bytes: int, most_blocks: int) -> list[Spooled]:
        """What leaves next: one block, or several that have at most so many bytes."""
        found: list[Spooled] = []
        size = 0
        for spooled in self._blocks.values():
            size += len(spooled.raw)
            if len(found) == most_blocks or (found and size > most_bytes):
                break
            found.append(spooled)
        return found

    def drop(self, block: int) -> None:
        """It was sent, or need not be."""
        self.held_bytes -= len(self._blocks.pop(block).raw)
