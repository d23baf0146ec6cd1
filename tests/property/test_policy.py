"""The protocol of calls of a policy, in any order of events, as the gate makes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bitmapd.predict.lru import LruPolicy
from bitmapd.predict.policy import Policy
from bitmapd.predict.stays import BULK_EXTENTS
from bitmapd.predict.superset import Options, SupersetPolicy
from bitmapd.record.geometry import MIB, Geometry
from bitmapd.record.hints import decode_hints, encode_hints
from tests.support.machines import machine_settings

EXTENTS = BULK_EXTENTS + 176
SMALL = Options(stays=12, past=6, trail=9, watched=7)

# Most extents lie close together, so that streams, neighbours and repetitions come about.
extents = st.one_of(st.integers(0, 40), st.integers(0, EXTENTS - 1))


class Protocol(RuleBasedStateMachine):
    """`recorded` and `dirty` are what the gate would know."""

    policy: Policy

    def __init__(self, make: Callable[[bool], Policy]) -> None:
        super().__init__()
        self.make = make
        self.recorded: set[int] = set()
        self.dirty: set[int] = set()
        self.named: set[int] = set()  # since when neither written nor entered again
        self.now_s = 1000.0

    @initialize(small=st.booleans())
    def start(self, small: bool) -> None:
        self.policy = self.make(small)

    def drop(self, extents: list[int]) -> None:
        self.recorded.difference_update(extents)
        self.policy.dropped(extents, self.now_s)

    def enter(self, first: int, stop: int) -> None:
        self.named.difference_update(range(first, stop))
        self.recorded.update(range(first, stop))
        self.policy.added(first, stop, self.now_s)

    def write(self, first: int, stop: int, limit: int, record_fails: bool) -> None:
        span = range(first, stop)
        hit = self.recorded.issuperset(span)
        self.policy.wrote(first, stop, self.now_s, hit)
        self.named.difference_update(span)
        if not hit:
            needed = len(self.recorded.union(span))
            extra = list(self.policy.predict(first, stop, self.now_s, limit, needed))
            assert all(0 <= low < high <= EXTENTS for low, high in extra)
            assert sum(high - low for low, high in extra) <= max(limit - needed, 0) + limit // 4
            if record_fails:
                return
            self.enter(first, stop)
            for low, high in extra:
                self.enter(low, high)
        self.dirty.update(span)

    @rule(
        first=extents,
        length=st.integers(1, 4),
        limit=st.integers(0, 300),
        record_fails=st.booleans(),
    )
    def write_some(self, first: int, length: int, limit: int, record_fails: bool) -> None:
        self.write(first, min(first + length, EXTENTS), limit, record_fails)

    @rule(first=extents, length=st.integers(2, 12), direction=st.sampled_from([1, -1]))
    def write_stream(self, first: int, length: int, direction: int) -> None:
        for step in range(length):
            extent = first + direction * step
            if 0 <= extent < EXTENTS:
                self.write(extent, extent + 1, 100, False)

    @rule()
    def write_all(self) -> None:
        self.write(0, EXTENTS, 100, False)

    @rule(first=extents, length=st.integers(1, EXTENTS))
    def enter_unasked(self, first: int, length: int) -> None:
        """Recovery, a resize, an initial sync."""
        stop = min(first + length, EXTENTS)
        self.enter(first, stop)
        self.dirty.update(range(first, stop))

    @rule(seconds=st.sampled_from([0.0, 0.2, 1.0, 7.0, 29.0, 31.0, 100.0, 400.0, 5000.0]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(keep=st.integers(0, 6))
    def copy(self, keep: int) -> None:
        """All but a few extents become clean."""
        for extent in sorted(self.dirty)[keep:]:
            self.dirty.discard(extent)
            if not self.policy.wants(extent, self.now_s):
                self.drop([extent])

    @rule()
    def expire(self) -> None:
        named = list(self.policy.expired(self.now_s))
        assert len(set(named)) == len(named)
        assert self.recorded.issuperset(named)
        assert self.named.isdisjoint(named)
        self.named.update(named)
        self.drop([extent for extent in named if extent not in self.dirty])

    @precondition(lambda self: self.recorded)
    @rule(count=st.integers(0, 50))
    def evict(self, count: int) -> None:
        victims = list(self.policy.victims(count, lambda e: e not in self.dirty, self.now_s))
        assert len(set(victims)) == len(victims) <= count
        assert set(victims) <= self.recorded - self.dirty
        self.drop(victims)

    @rule()
    def remember(self) -> None:
        """What is learnt may be carried over at any time, and is bounded."""
        if isinstance(self.policy, SupersetPolicy):
            learnt = self.policy.hints()
            read = decode_hints(encode_hints(learnt), EXTENTS)
            assert read is not None
            for hints in (learnt, read):
                other = SupersetPolicy(Geometry(EXTENTS * MIB))
                assert other.recall(hints)
                assert other.hints() == hints

    @rule(which=st.lists(extents, max_size=5))
    def drop_anything_clean(self, which: list[int]) -> None:
        self.drop([e for e in which if e in self.recorded and e not in self.dirty])

    @rule()
    def rest(self) -> None:
        """At rest every extent is named or, once clean, not wanted: the record gets empty."""
        for _ in range(60):
            self.now_s += 1.0
            self.expire()
        self.copy(0)
        assert not self.recorded

    @invariant()
    def memory_is_bounded(self) -> None:
        policy = getattr(self, "policy", None)
        if isinstance(policy, SupersetPolicy):
            sizes = policy._options
            assert len(policy._stays) <= sizes.stays
            assert len(policy._past) <= sizes.past
            assert len(policy._nearby.trail) <= sizes.trail
            assert len(policy._odds) <= sizes.watched
            assert len(policy._offered) <= 64
            assert all(len(gone) <= sizes.stays for gone in policy._gone)
            assert len(policy._fresh) <= sizes.stays
            assert 0 < policy._share <= 0.5
        elif isinstance(policy, LruPolicy):
            assert len(policy._stays) <= policy._stays.capacity


def superset(small: bool) -> Policy:
    return SupersetPolicy(Geometry(EXTENTS * MIB), SMALL if small else None)


def lru(small: bool) -> Policy:
    return LruPolicy(Geometry(EXTENTS * MIB), *((12,) if small else ()))


@pytest.mark.parametrize("make", [superset, lru])
def test_any_order_of_events(make: Callable[[bool], Policy]) -> None:
    run_state_machine_as_test(lambda: Protocol(make), settings=machine_settings(150, 40))
