"""Which of two nodes is the lead: the one that takes what belongs to nobody (pure).

It is node 1 at first.  A node that goes on alone leads from then on, so does one that takes over as
planned, and one that is told to; it stays so when the two meet again, as long as the process lives.

Each claim has a number above all that its node knows of, and the higher one counts.  Both nodes
come to the same answer: LEAD tells the number, HELLO whether there is a claim at all, and where two
are alike it is node 1.

A crash ends the claim of a node.
"""

from __future__ import annotations


class Lead:
    """Of the node with this number, 1 or 2."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.claim = 0
        self._claim_there = 0

    @property
    def is_claimed(self) -> bool:
        return self.claim > self._claim_there

    @property
    def is_here(self) -> bool:
        return self.is_claimed or (self.claim == self._claim_there and self._number == 1)

    def take(self) -> None:
        self.claim = max(self.claim, self._claim_there) + 1

    def heard(self, claim: int) -> None:
        self._claim_there = claim

    def met(self, *, claimed: bool, claimed_there: bool) -> None:
        """The two have come together, and said this before."""
        self.claim, self._claim_there = int(claimed), int(claimed_there)
