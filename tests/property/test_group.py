"""Two volumes of a group over real gates, records, senders and receivers (see simpoints), cut by a
leader whose words come late, or not at all, and who may be replaced at any moment.  Hosts write
through the gate, or past it (see simdmpoints).

A host writes number n to A, and when that is answered n to B.  Looked at after every step:

G1 The newest point that both receivers have committed has one instant: B <= A <= B + 1.
G2 Both can produce it after a power cut, and it never is an older one than before.
G3 No answer is withheld for longer than the patience.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from bitmapd.gate.cycle import Void
from bitmapd.gate.withheld import Withheld
from bitmapd.media.base import Done
from bitmapd.media.buffers import aligned
from bitmapd.points import group
from bitmapd.points.group import FIRST, Act, Member, Order, decide
from bitmapd.receiver import applier
from bitmapd.receiver.commit import CommitPage
from tests.support import simpoints
from tests.support.machines import sim_seeds
from tests.support.simdmpoints import DmWorld
from tests.support.simpoints import SECTOR, PrimaryDisk, World, Wrong
from tests.support.simreceiver import BLOCK

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def small(monkeypatch: Patch) -> None:
    simpoints.small(monkeypatch)


class Gated(World):
    """One volume of the two."""

    name = "?"
    member: Member
    on_boot: Callable[[], None] = staticmethod(lambda: None)

    def boot(self, primary: bytes, record: bytes, ledger: bytes) -> None:
        super().boot(primary, record, ledger)
        self.join()
        self.on_boot()

    def join(self) -> None:
        sender = self.site.sender
        sender.uplink.in_group = True
        self.member = sender.member = Member(self.name, sender, self.site.gate, self.site.loop)

    def host_writes(self, number: int, done: Done) -> None:
        buffer = aligned(SECTOR)
        buffer[:8] = number.to_bytes(8, "big")
        self.site.gate.write(0, buffer, done, True)

    def page(self) -> CommitPage:
        """What a power cut of the receiver leaves."""
        return self.machine.recovered(self.rng, cut_short=False).receiver.journal.page


class Direct(DmWorld, Gated):
    """Its kernel keeps what hosts wait for when bitmapd dies."""

    def _begin(self, disk: PrimaryDisk, record: bytes, ledger: bytes) -> None:
        super()._begin(disk, record, ledger)
        self.join()

    def host_writes(self, number: int, done: Done) -> None:
        self.change("write", 0, number.to_bytes(8, "big") + bytes(SECTOR - 8), done)


class Group:
    """Both, their host and their leader."""

    early = False  # the leader releases when one has been cut

    def __init__(self, seed: int, kinds: Sequence[type[Gated]] = (Gated, Gated)) -> None:
        self.rng = random.Random(seed)
        self.worlds = a, b = kinds[0](seed), kinds[1](seed + 1_000_000)
        a.name, b.name = "a", "b"
        self.count: Counter[str] = Counter()
        self.numbers: dict[tuple[str, int], int] = {}  # what a point has: (name, number) -> n
        self.common = 0
        self.next_number = FIRST
        self.leader: Iterator[None] | None = None
        self.at, self.n, self.turn = 0, 1, 0
        for world in self.worlds:
            world.on_boot = self.begin_again
            self.begin_again()

    # -- the host -----------------------------------------------------------------------------
    def begin_again(self) -> None:
        """After a crash: the same number on A, then on B."""
        self.turn += 1
        self.at = 0
        self.busy = False

    def host(self) -> None:
        if self.busy:
            return
        self.busy, turn = True, self.turn

        def done(error: OSError | None) -> None:
            if turn != self.turn:
                return
            self.busy = False
            self.count["answers"] += 1
            self.n, self.at = self.n + self.at, 1 - self.at

        self.worlds[self.at].host_writes(self.n, done)

    def noise(self) -> None:
        world = self.rng.choice(self.worlds)
        block = self.rng.randrange(1, 8)
        data = self.rng.randbytes(8) * (SECTOR // 8)
        world.change("write", block * BLOCK, data, lambda error: None)

    # -- the leader ---------------------------------------------------------------------------
    def lead(self) -> None:
        """One of its steps: it looks, or one of its words arrives."""
        if self.leader is None:
            self.leader = self._words()
        if next(self.leader, "over") == "over":
            self.leader = None

    def _words(self) -> Iterator[None]:
        there = [world for world in self.worlds if self.rng.random() > 0.02]
        absent = [world.name for world in self.worlds if world not in there]
        decision = decide([world.member.seen() for world in there], absent)
        for world in self.worlds:
            world.member.hear(decision.waits_for)
        for order in decision.orders:
            yield
            if order.act is not Act.CUT:
                yield from self._tell(order)
                continue
            self.next_number += 1
            cut, well = Order(Act.CUT, self.next_number, order.label), True
            worlds = self.rng.sample(self.worlds, 2)
            for world in worlds:
                came = self.rng.random() > 0.03 and world.member.obey(cut, 1)
                if came:
                    content = int.from_bytes(world.cut[:8], "big")
                    self.numbers[world.name, cut.number] = content
                well = well and came
                yield
                if self.early:
                    yield from self._tell(Order(Act.RELEASE, cut.number))
            yield from self._tell(Order(Act.RELEASE if well else Act.VOID, cut.number))

    def _tell(self, order: Order) -> Iterator[None]:
        for world in self.rng.sample(self.worlds, 2):
            if self.rng.random() > 0.02 and world.name not in order.later:
                world.member.obey(order)
                self.count[order.act.value] += 1
            yield

    # -- one thing at a time --------------------------------------------------------------------
    def step(self, *, faults: bool = True) -> None:
        rng, world = self.rng, self.rng.choice(self.worlds)
        may: list[tuple[float, Callable[[], object]]] = [
            (1.0, self.time_passes), (4.0, self.host), (2.0, self.lead),
        ]  # fmt: skip
        busy = [disk for disk in world.disks if disk.pending]
        if busy:
            disk = rng.choice(busy)
            may.append((8.0, lambda: world.finish(disk, rng.randrange(len(disk.pending)))))
        if world.link is None:
            may.append((1.0, world.connect))
        else:
            may += [(4.0, world.to_receiver), (4.0, world.to_sender)]
        may += world.beside(faults=False)
        if faults:
            may += [(0.3, self.noise), (0.05, lambda: self.fault(world))]
        ((_, action),) = rng.choices(may, [weight for weight, _ in may])
        action()
        for one in self.worlds:
            one.run_soon()

    def fault(self, world: Gated) -> None:
        x = self.rng.random()
        self.count["faults"] += 1
        if x < 0.3:
            world.cut_link()
        elif x < 0.5:
            self.leader = None
        elif x < 0.7:
            world.crash_receiver()
        elif x < 0.8:
            world.crash_sender(power=False)
        else:
            world.site.sender.cut("label")

    def time_passes(self) -> None:
        seconds = self.rng.choice((0.001, 0.005, 0.02, 0.02, 0.5))
        for world in self.worlds:
            world.advance(seconds)

    # -- looking --------------------------------------------------------------------------------
    def check(self) -> None:
        pages = [world.page() for world in self.worlds]
        newest = group.newest_of_all([page.groups for page in pages])
        for world in self.worlds:
            gate, member = world.site.gate, world.member
            if gate.answers.is_on and world.site.loop.time() > member._held_since_s + 0.5 + 0.05:
                raise Wrong("G3 answers are withheld for too long")
        durable = [world.machine.receiver.journal.page.groups for world in self.worlds]
        self.common = max(self.common, group.newest_of_all(durable))
        if newest < self.common:
            raise Wrong(f"G2 both had {self.common}, and the newest that both have is {newest}")
        if not newest:
            return
        a, b = (self.numbers[name, newest] for name in ("a", "b"))
        if not b <= a <= b + 1:
            raise Wrong(f"G1 A has {a}, B has {b}")

    def run(self, steps: int, until: Callable[[], object] = lambda: True) -> None:
        """At least so many steps, and as many more as it takes."""
        try:
            self._run(steps, until)
        finally:
            for world in self.worlds:
                if isinstance(world, DmWorld):
                    world.end()

    def _run(self, steps: int, until: Callable[[], object]) -> None:
        for number in range(10 * steps):
            if number >= steps and until():
                break
            self.step()
            if number % 3 == 0:
                self.check()
        before = self.common
        for number in range(20_000):  # points go on once the faults are over
            self.step(faults=False)
            if number % 20 == 0:
                self.check()
                if self.common != before and self.count["apply"]:
                    return
        raise Wrong(f"no point of the group came any more: {self.worlds[0].member.seen()}")


@pytest.mark.parametrize("seed", sim_seeds(8))
def test_the_newest_point_that_both_have_has_one_instant(seed: int) -> None:
    found = Group(seed)
    found.run(1500)
    assert found.count["release"]
    assert found.count["apply"]
    assert found.worlds[0].machine.receiver.journal.page.applied


@pytest.mark.parametrize("seed", sim_seeds(3))
@pytest.mark.parametrize("other", [Direct, Gated])
def test_so_it_has_where_hosts_write_past_the_gate(other: type[Gated], seed: int) -> None:
    found = Group(seed, (Direct, other))
    found.run(1500, until=lambda: found.worlds[0].count["direct"])
    assert found.count["release"]
    assert found.worlds[0].count["direct"]


@pytest.mark.walk
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("dying", ["a", "b", "leader"])
def test_who_dies_between_cut_and_release_costs_that_point_only(dying: str, power: bool) -> None:
    """`points/26`."""
    found = Group(3)
    while not found.common or any(not world.member.seen().is_ready for world in found.worlds):
        found.step(faults=False)
        found.check()
    found.leader = None
    before, found.next_number = found.common, found.next_number + 1
    cut = Order(Act.CUT, found.next_number)
    for world in found.worlds:
        assert world.member.obey(cut, 1)
        found.numbers[world.name, cut.number] = int.from_bytes(world.cut[:8], "big")
    left = []
    for world in found.worlds:
        if world.name == dying:
            world.crash_sender(power=power)
        else:
            left.append(world)
    answered: list[str] = []
    for world in left:
        data = aligned(SECTOR)
        world.site.gate.write(BLOCK, data, lambda error, w=world: answered.append(w.name), True)
        world.settle()
    assert not answered
    for world in left:
        world.advance(world.member.patience_s)
        world.settle()
        assert world.site.sender.voids[Void.GROUP]
    assert answered == [world.name for world in left]
    for world in found.worlds:
        assert not world.member.obey(Order(Act.RELEASE, cut.number)), "it is too late for that"
        assert cut.number not in [queued.group for queued in world.page().queue]
    found.check()
    assert found.common == before
    for _ in range(20_000):
        found.step(faults=False)
        found.check()
        if found.common > cut.number:
            return
    raise Wrong("no point of the group came any more")


def run_many() -> None:
    for seed in range(60):
        Group(seed).run(1500)


# -- mistakes -----------------------------------------------------------------------------------


def not_withheld(patch: Patch) -> None:
    patch.setattr(Withheld, "of", lambda self, done: done)


def released_early(patch: Patch) -> None:
    patch.setattr(Group, "early", True)


def applied_before_all_have_it(patch: Patch) -> None:
    patch.setattr(applier, "may_be_applied", lambda queue, up_to: queue)


def too_late_and_not_given_up(patch: Patch) -> None:
    patch.setattr(Member, "_too_late", lambda self: self._release())


@pytest.mark.walk
@pytest.mark.parametrize(
    "mistake",
    [
        not_withheld,
        released_early,
        applied_before_all_have_it,
        too_late_and_not_given_up,
    ],
)
def test_a_mistake_is_found(mistake: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mistake(monkeypatch)
    with pytest.raises(Wrong):
        run_many()
