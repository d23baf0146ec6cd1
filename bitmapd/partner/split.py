"""What two nodes that both went on alone may have done to one another (pure).

A proof of death was false: both wrote one primary, and neither knew of the other.  There is one
medium, so there are no two versions to choose from; what can be said is where both may have
written.  Each node notes what it has owned since it went alone, and says so to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitarray import bitarray

from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import bits_of, runs_of

MOST_SHOWN = 200  # runs, so that a status stays a line


@dataclass(frozen=True, slots=True)
class Conflicts:
    """Extents that this node, the other, and both may have written without the other."""

    own_extents: int
    partner_extents: int
    both_extents: int
    both: Runs

    def to_json(self) -> dict[str, Any]:
        """`both`: [first, count] of the first `MOST_SHOWN` runs."""
        return {
            "own_extents": self.own_extents,
            "partner_extents": self.partner_extents,
            "both_extents": self.both_extents,
            "both": [[first, stop - first] for first, stop in self.both[:MOST_SHOWN]],
        }


def conflicts(mine: bitarray, theirs: Runs) -> Conflicts:
    """Of what either owned alone."""
    other = bits_of(theirs, len(mine))
    both = mine & other
    return Conflicts(mine.count(), other.count(), both.count(), runs_of(both))
