"""What predictions are worth: the odds of each kind, learnt from what became of them (pure).

A *kind* is a small number for all that is known of a candidate when it is considered: how far it
is, in which direction, whether it was ever written (`predict/nearby.py` gives the numbers).  Its
odds are the share of such candidates that were written within `LIFE_S`.

1. Candidates are watched whether or not they were predicted, so a kind that is never predicted is
   judged as fairly as the others, and comes back when it has become worth it.
2. While few are watched, the candidates of the next miss are, so that a quiet volume learns soon.
   In a burst those of one miss in `WATCH_EVERY` are enough, and it keeps a miss short.  At most
   `capacity` are watched at a time.
3. The odds are an average over the latest `MEMORY` outcomes; before the first they are `PRIOR`,
   which weighs as much as `PRIOR_WEIGHT` outcomes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

LIFE_S = 5.0
WATCH_EVERY = 4
FEW = 64
CAPACITY = 4096
SAMPLE = 4
PRIOR = 0.25
PRIOR_WEIGHT = 2
MEMORY = 256


class Odds:
    """Odds of each kind, and the candidates whose outcome is not known yet."""

    def __init__(self, kinds: int, capacity: int = CAPACITY) -> None:
        self.of = [PRIOR] * kinds
        self._weight = [PRIOR_WEIGHT] * kinds
        self._capacity = capacity
        # By extent: kind, since when; the oldest first.
        self._watched: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self._misses = 0

    def __len__(self) -> int:
        """How many candidates are watched."""
        return len(self._watched)

    def due(self) -> bool:
        """Called once a miss: whether its candidates are to be watched."""
        self._misses += 1
        return len(self._watched) < FEW or self._misses % WATCH_EVERY == 0

    def watch(self, extents: Sequence[int], kind: int, now_s: float) -> None:
        """Candidates of one miss: some of them, evenly spread, stand for all."""
        watched = self._watched
        for extent in extents[:: 1 + len(extents) // SAMPLE]:
            if len(watched) >= self._capacity:
                return
            if extent not in watched:
                watched[extent] = (kind, now_s)

    def written(self, extent: int) -> None:
        """A write came to an extent that was not recorded, or not written since it was."""
        found = self._watched.pop(extent, None)
        if found is not None:
            self._learn(found[0], came_true=True)

    def settle(self, now_s: float) -> None:
        """Candidates whose time is over have failed."""
        watched = self._watched
        while watched:
            kind, since_s = next(iter(watched.values()))
            if now_s - since_s <= LIFE_S:
                return
            watched.popitem(last=False)
            self._learn(kind, came_true=False)

    def _learn(self, kind: int, *, came_true: bool) -> None:
        weight = min(self._weight[kind] + 1, MEMORY)
        self._weight[kind] = weight
        self.of[kind] += (came_true - self.of[kind]) / weight

    def restore(self, odds: Sequence[float]) -> None:
        """Begin with what was learnt before a restart; ignored if it does not fit."""
        if len(odds) == len(self.of):
            self.of = [min(max(value, 0.0), 1.0) for value in odds]
            self._weight = [MEMORY // 4] * len(self.of)
