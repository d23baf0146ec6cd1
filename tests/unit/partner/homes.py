"""One node's rights on their own: what they say and what they ask of the appliance, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bitmapd.media.base import Done
from bitmapd.partner.messages import Add, Grant, Message
from bitmapd.partner.rights import Home, Rights, Stance
from bitmapd.partner.share import Shares
from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import each, joined
from bitmapd.record.geometry import Geometry
from tests.support.sim import SimLoop

EXTENTS = 8
PER_EXTENT = 2
GEOMETRY = Geometry(EXTENTS * PER_EXTENT * 4096, PER_EXTENT * 4096, 4096)


class Desk(Home):
    """A `Home` that writes down what it is asked for."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.calls: list[tuple[str, object]] = []
        self.landing: list[Callable[[], None]] = []
        self.dirt: dict[int, Runs] = {}  # of blocks, by extent
        self.copying: set[int] = set()
        self.storing: list[tuple[Runs, Done]] = []
        self.store_waits = True
        self.clean: set[int] = set()
        self.drop: Callable[[list[int]], object] = lambda extents: None

    def send(self, message: Message) -> int:
        self.sent.append(message)
        return len(self.sent)

    def when_landed(self, call: Callable[[], None]) -> None:
        self.landing.append(call)

    def when_left(self, extents: Sequence[int], call: Callable[[], None]) -> None:
        self.landing.append(call)

    def keep(self, runs: Runs) -> None:
        self.calls.append(("keep", runs))

    def store(self, runs: Runs, done: Done) -> bool:
        self.storing.append((runs, done))
        return self.store_waits

    def unstored(self) -> None:
        self.calls.append(("unstored", None))

    def forget(self, runs: Runs) -> None:
        self.calls.append(("forget", runs))

    def give(self, extents: Sequence[int]) -> tuple[Runs, set[int]]:
        dirt = tuple(run for extent in extents for run in self.dirt.pop(extent, ()))
        return dirt, self.copying.intersection(extents)

    def take_over(self, dirt: Runs, embargoed: Iterable[int]) -> None:
        self.calls.append(("take over", (dirt, set(embargoed))))

    def free(self, extents: Iterable[int]) -> None:
        self.calls.append(("free", list(extents)))

    def free_all(self) -> None:
        self.calls.append(("free all", None))

    def guessed(self, runs: Runs) -> None:
        self.calls.append(("guessed", runs))

    def refused(self, runs: Runs) -> None:
        self.calls.append(("refused", runs))

    def drop_clean(self, extents: Iterable[int]) -> None:
        self.drop([extent for extent in extents if extent in self.clean])

    # -- what was asked -------------------------------------------------------------------------
    def of(self, name: str) -> list[object]:
        return [value for what, value in self.calls if what == name]


class Bench:
    """Rights at a desk.  `state` puts an extent where a test wants it, by messages alone."""

    def __init__(self, node: int = 1, *, up: bool = True) -> None:
        self.loop = SimLoop()
        self.desk = Desk()
        self.rights = Rights(GEOMETRY, node, self.loop, self.desk)
        self.desk.drop = self.rights.drop
        self.rights.most_requests = 64
        self.number = 0  # of the other's latest request
        self.served: list[int] = []
        self.errors: list[OSError] = []
        if up:
            self.pair()

    def pair(self, own: Runs = (), other: Runs = (), dirty: Runs = (), copying: Runs = ()) -> None:
        """An exchange ends like this."""
        size = GEOMETRY.extents
        bits = [self.rights.own.copy() for _ in range(3)]
        for one, runs in zip(bits, (own, other, dirty), strict=True):
            one.setall(False)
            for first, stop in runs:
                one[first:stop] = True
        assert len(bits[0]) == size
        self.rights.freeze()
        self.rights.thaw(Shares(*bits), copying)
        self.turn()

    def turn(self) -> list[Message]:
        """The turn of the loop ends; what was said since the last one."""
        self.loop.run_soon()
        sent, self.desk.sent = self.desk.sent, []
        return sent

    def land(self) -> list[Message]:
        """Every write in flight has landed."""
        landing, self.desk.landing = self.desk.landing, []
        for call in landing:
            call()
        return self.turn()

    # -- this node's ----------------------------------------------------------------------------
    def write(self, extent: int, *, submitted: bool = True) -> None:
        """A host's write waits for it."""

        def waiter(error: OSError | None) -> bool:
            if error is None:
                self.served.append(extent)
            else:
                self.errors.append(error)
            return submitted

        self.rights.want(extent, waiter)

    def read(self, first: int, stop: int) -> list[OSError | None]:
        """A host's read waits for them; what comes of it."""
        ended: list[OSError | None] = []
        self.rights.ask(first, stop, ended.append)
        return ended

    # -- the other's ----------------------------------------------------------------------------
    def add(self, needed: Runs = (), predicted: Runs = (), removed: Runs = ()) -> list[Message]:
        self.number += 1
        self.rights.added(Add(self.number, needed, predicted, removed))
        return self.turn()

    def grant(
        self,
        request: int,
        granted: Runs,
        refused: Runs = (),
        *,
        embargo: Runs = (),
        dirt: Runs = (),
        last: bool = True,
        sequence: int = 7,
    ) -> list[Message]:
        self.rights.granted(Grant(request, granted, refused, embargo, dirt, last), sequence)
        return self.turn()

    # -- states of 7.4 --------------------------------------------------------------------------
    def own(self, *extents: int) -> None:
        for run in joined(extents):
            self.grant(0, (run,))
        assert all(self.rights.held[extent] for extent in extents)
        self.desk.calls.clear()

    def giving(self, extent: int) -> None:
        self.own(extent)
        self.rights.hand_over([extent])
        assert self.rights.own[extent]
        assert not self.rights.held[extent]

    def others(self, *extents: int) -> None:
        self.add(joined(extents))
        assert all(self.rights.other[extent] for extent in extents)
        self.desk.calls.clear()

    def owed(self, extent: int) -> None:
        self.giving(extent)
        self.land()
        assert self.rights.owed[extent]
        self.desk.calls.clear()

    def state(self, name: str, extent: int) -> None:
        if name != "none":
            {"own": self.own, "giving": self.giving, "other": self.others, "owed": self.owed}[name](
                extent
            )

    def state_of(self, extent: int) -> str:
        rights = self.rights
        if rights.own[extent]:
            return "own" if rights.held[extent] else "giving"
        if rights.owed[extent]:
            return "owed"
        return "other" if rights.other[extent] else "none"


def extents(runs: Runs) -> list[int]:
    return list(each(runs))


__all__ = ["EXTENTS", "GEOMETRY", "Bench", "Desk", "Stance", "extents"]
