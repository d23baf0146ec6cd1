"""A receiver on disks that forget, tear and reorder: whatever happens, it has the last point.

After every step a power cut of both disks is looked at, with a recovery that may itself be cut
short.

I1 The image after a recovery is, byte for byte, the point that the commit page names.
I2 That point is not older than the last one that the sender was told of.
I3 With all faults over, one more point comes through.
"""

from __future__ import annotations

import os
import random

import pytest

from bitmapd.receiver.commit import NEVER
from tests.support.machines import sim_seeds
from tests.support.simreceiver import (
    GEOMETRY,
    Machine,
    Script,
    exchange,
    fresh,
    point,
    small,
)

RUNS = int(os.environ.get("RECEIVER_RUNS", "12"))
STEPS = int(os.environ.get("RECEIVER_STEPS", "250"))


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.machine = fresh()
        self.script = Script(self.rng)
        self.crashes = self.links = 0

    def step(self) -> None:
        rng, script = self.rng, self.script
        x = rng.random()
        if x < 0.46:
            self.machine.finish_one(rng)
        elif x < 0.52:
            if len(script.dirty) < 3 or x < 0.47:
                script.write()
        elif x < 0.66:
            if script.wire is None:
                script.connect(self.machine)
            else:
                script.wire.deliver()
        elif x < 0.78:
            script.take()
        elif x < 0.89:
            script.send(rng.choice((1, 2, 5)))
        elif x < 0.984:
            script.end()
        elif x < 0.989:
            if script.wire is not None:
                script.wire.cut()
                self.links += 1
        elif x < 0.991:
            if script.wire is not None:
                script.wire.cut()
            script.restart()
        elif x < 0.997:
            self.crash(power=x < 0.995)
        else:
            self.machine.loop.advance(11)

    def crash(self, power: bool) -> None:
        self.crashes += 1
        if self.script.wire is not None:
            self.script.wire.cut()
        machine = self.machine
        self.machine = machine.crash(self.rng) if power else machine.kill(self.rng)

    def check(self) -> None:
        machine = self.machine.recovered(self.rng, cut_short=self.rng.random() < 0.3)
        self.holds(machine)

    def holds(self, machine: Machine) -> None:
        page = machine.receiver.journal.page
        assert page.committed >= self.script.seen, "I2 points went back"
        assert page.applied == page.committed, "I1 something was left in the queue"
        if not page.committed:
            assert page.inconsistent_until == NEVER
            return
        assert page.inconsistent_until == 0
        wanted = [
            content
            for (_, number), content in self.script.points.items()
            if number == page.committed
        ]
        by = self.script.committed_by.get(page.committed)
        if by is not None:
            wanted = [self.script.points[by, page.committed]]
        image = bytes(machine.image.visible[: GEOMETRY.size_bytes])
        assert image in wanted, f"I1 the image is not point {page.committed}"


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_whatever_happens_the_receiver_has_the_last_point(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    world = World(seed)
    for _ in range(STEPS):
        world.step()
        world.check()
    script = world.script
    for _ in range(3):  # all faults are over
        exchange(script, world.machine)
        if script.wire is None:
            script.connect(world.machine)
    script.write()
    if script.ended:
        exchange(script, world.machine)
    point(script, world.machine)
    world.holds(world.machine)
    assert bytes(world.machine.image.visible[: GEOMETRY.size_bytes]) == bytes(script.content)
    assert not world.machine.failures
