"""copier/ages against the time of each block's oldest write that the secondary lacks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bitmapd.copier.ages import Ages
from bitmapd.gate.blockset import BlockSet
from tests.support.machines import examples

BLOCKS = 4


class Model:
    """Three stages; in each, since when a block's content may be missing."""

    def __init__(self) -> None:
        self.ages = Ages()
        self.taken = BlockSet()
        self.now_s = 0.0
        self.waits: dict[int, float] = {}
        self.copied: dict[int, float] = {}
        self.settling: dict[int, float] = {}

    def join(self, first: int, stop: int) -> None:
        self.taken.add(first, stop)
        for block in range(first, stop):
            self.waits.setdefault(block, self.now_s)
        self.ages.joined(self.taken, self.now_s)

    def copy(self, block: int) -> None:
        if block not in self.waits:
            return
        self.taken.discard(block, block + 1)
        self.copied[block] = min(self.waits.pop(block), self.copied.get(block, self.now_s))
        self.ages.copied(block, block + 1, self.taken)

    def again(self, stage: dict[int, float]) -> None:
        for block, since_s in stage.items():
            self.taken.add(block, block + 1)
            self.waits[block] = min(since_s, self.waits.get(block, since_s))
        stage.clear()

    @property
    def oldest_s(self) -> float | None:
        stages = (self.waits, self.copied, self.settling)
        return min((since_s for stage in stages for since_s in stage.values()), default=None)


@settings(max_examples=examples(1000))
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["join", "copy", "copy", "begin", "settled", "failed", "forgotten"]),
            st.integers(0, BLOCKS - 1),
            st.integers(1, 2),
        ),
        max_size=60,
    )
)
def test_no_content_is_older_than_told(steps: list[tuple[str, int, int]]) -> None:
    model = Model()
    ages = model.ages
    under_way = False
    for what, where, much in steps:
        model.now_s += 1.0
        if what == "join":
            model.join(where, where + much)
        elif what == "copy":
            model.copy(where)
        elif what == "forgotten":
            model.again(model.copied)
            ages.forgotten(model.taken)
        elif what == "begin":
            if not under_way:
                under_way = True
                model.settling, model.copied = model.copied, {}
                ages.settle_began()
        elif under_way:
            under_way = False
            if what == "settled":
                model.settling.clear()
                ages.settled()
            else:
                model.again(model.settling)
                ages.settle_failed(model.taken)
        oldest_s = model.oldest_s
        if oldest_s is None:
            assert ages.oldest_s is None
        else:
            assert ages.oldest_s is not None
            assert ages.oldest_s <= oldest_s


def test_a_block_that_comes_back_is_older_than_the_snapshot_that_it_is_in() -> None:
    model = Model()
    for now_s in (1.0, 2.0):
        model.now_s = now_s
        model.join(1, 2)
        if now_s == 1.0:
            model.copy(1)
    model.again(model.copied)
    model.ages.forgotten(model.taken)
    model.copy(1)
    assert model.ages.oldest_s == 1.0


def test_the_age_under_a_load_that_never_pauses_is_at_most_two_snapshots() -> None:
    """Every second all blocks are written and one is copied: each waits for BLOCKS seconds."""
    model = Model()
    for second in range(20 * BLOCKS):
        model.now_s = float(second)
        model.join(0, BLOCKS)
        model.copy(second % BLOCKS)
        model.ages.settle_began()
        model.ages.settled()
        model.copied.clear()
        oldest_s = model.ages.oldest_s
        assert oldest_s is not None
        assert second - oldest_s <= 2 * BLOCKS
