"""Policies for tests of what no policy can break."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random

from bitmapd.record.hints import Hints


class Forgetful:
    """The part of a policy that has nothing to tell its next session."""

    def hints(self) -> None:
        return None

    def recall(self, hints: Hints) -> bool:
        return False


class MischievousPolicy(Forgetful):
    """Predicts, keeps and gives up extents at random: the gate must be right whatever it says."""

    name = "mischievous"

    def __init__(self, extents: int, rng: Random) -> None:
        self._extents = extents
        self._rng = rng
        self.generous = True

    def wrote(self, first: int, stop: int, now_s: float, hit: bool) -> None:
        assert 0 <= first < stop <= self._extents

    def predict(
        self, first: int, stop: int, now_s: float, limit: int, recorded: int
    ) -> Sequence[tuple[int, int]]:
        start = self._rng.randrange(self._extents)
        return [(start, min(self._extents, start + self._rng.randint(1, 3)))]

    def added(self, first: int, stop: int, now_s: float) -> None:
        assert 0 <= first < stop <= self._extents

    def dropped(self, extents: Iterable[int], now_s: float) -> None:
        assert all(0 <= extent < self._extents for extent in extents)

    def wants(self, extent: int, now_s: float) -> bool:
        return self.generous and self._rng.random() < 0.3

    def expired(self, now_s: float) -> Sequence[int]:
        return [extent for extent in range(self._extents) if self._rng.random() < 0.5]

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        # Unclean ones too, against the rules: the gate has to look for itself.
        return self._rng.sample(range(self._extents), min(count, self._extents))


class KeepNothing(Forgetful):
    """Predicts nothing and lets every extent go as soon as it is clean."""

    name = "keep-nothing"

    def wrote(self, first: int, stop: int, now_s: float, hit: bool) -> None:
        """Nothing is learnt."""

    def predict(
        self, first: int, stop: int, now_s: float, limit: int, recorded: int
    ) -> Sequence[tuple[int, int]]:
        return ()

    def added(self, first: int, stop: int, now_s: float) -> None:
        """Nothing is learnt."""

    def dropped(self, extents: Iterable[int], now_s: float) -> None:
        """Nothing is learnt."""

    def wants(self, extent: int, now_s: float) -> bool:
        return False

    def expired(self, now_s: float) -> Sequence[int]:
        return ()

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        return ()
