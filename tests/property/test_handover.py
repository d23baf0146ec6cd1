"""A receiver is handed its volume, with a power cut after each effect of it.

H1 Whatever is lost, the other site finds out which it is: NOT_TAKEN, and the same again carries it
   out; or TAKEN, for good.
H2 Whoever is let in meanwhile is nobody; a handover that does not fit, or comes to nothing, leaves
   the receiver that it was.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count

import pytest

from bitmapd.peer.words import Error
from bitmapd.points.messages import Handover, Hello2, Role, Taken
from bitmapd.points.switchover import Outlook, outlook
from bitmapd.receiver.promotion import has_new_generation, undo
from bitmapd.receiver.receiver import State
from bitmapd.receiver.steps import run
from tests.property.test_promotion import Bench, received
from tests.support.sim import drain
from tests.support.simreceiver import GEOMETRY, Machine, Script, SimWire, exchange, fresh, small


@pytest.fixture(autouse=True)
def few_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)


def demoted(script: Script, machine: Machine) -> Hello2:
    committed = machine.receiver.journal.page.committed
    return script.hello(committed=committed, role=Role.DEMOTED)


def greeted(machine: Machine, hello: Hello2) -> tuple[SimWire, list[object]]:
    """A connection of a demoted site, and what it was told."""
    wire = SimWire(machine)
    machine.receiver.connected(wire)
    wire.say(hello)
    return wire, said(machine, wire)


def said(machine: Machine, wire: SimWire) -> list[object]:
    told: list[object] = []
    while True:
        machine.settle()
        moved = wire.deliver()
        while (message := wire.answer()) is not None:
            told.append(message)
            if isinstance(message, Hello2):
                wire._sender_decoder.set_geometry(GEOMETRY)
        if not moved:
            return told


def test_a_power_cut_after_each_effect_and_the_same_again_hands_it_over() -> None:
    ends = set()
    for effects in count():
        rng = random.Random(effects)
        machine, content = received(rng, queued=False)
        script = Script(rng)
        terms: list[int] = []
        machine.receiver._on_handover = terms.append
        hello = demoted(script, machine)
        wire, told = greeted(machine, hello)
        assert isinstance(told[0], Hello2)
        assert outlook(hello, told[0]) is Outlook.NOT_TAKEN
        wire.say(Handover(1))
        said(machine, wire)
        assert terms == [1]
        bench = Bench(*machine.disks)  # what the owner does then
        whole = bench.go(effects=effects) is not None
        again = Bench(*bench.cut(rng))
        ends.add(has_new_generation(again.journal))
        if has_new_generation(again.journal):
            assert again.go() is not None
        else:
            run(undo(again.journal, again.line), lambda error, _: None)
            drain(again.loop, *again.disks)
            second = Machine(*again.disks)
            second.receiver._on_handover = terms.append
            wire, told = greeted(second, hello)
            assert isinstance(told[0], Hello2)
            assert outlook(hello, told[0]) is Outlook.NOT_TAKEN  # H1
            wire.say(Handover(1))
            said(second, wire)
            assert terms == [1, 1]
            again = Bench(*second.disks)
            assert again.go() is not None
        assert again.image == content
        greeting = Machine(*again.disks).receiver._greeting()
        assert outlook(hello, greeting) is Outlook.TAKEN  # H1
        if whole:
            break
    assert ends == {False, True}


def test_nobody_is_let_in_while_it_is_handed_over_and_kept_ends_that() -> None:
    machine, _ = received(random.Random(1), queued=False)
    script = Script(random.Random(2))
    wire, _ = greeted(machine, demoted(script, machine))
    wire.say(Handover(1))
    said(machine, wire)
    assert machine.receiver.state is State.HANDING
    other = SimWire(machine)
    machine.receiver.connected(other)
    assert not other.is_open
    machine.receiver.taken(1)
    assert said(machine, wire) == [Taken(1)]
    machine.receiver.kept("no room")
    assert wire.error is not None
    assert wire.error.text == "no room"
    _, told = greeted(machine, demoted(script, machine))  # H2
    assert isinstance(told[0], Hello2)
    assert told[0].role is Role.RECEIVER


def test_who_hands_over_may_go_away_before_it_has_come_to_nothing() -> None:
    machine, _ = received(random.Random(1), queued=False)
    script = Script(random.Random(2))
    wire, _ = greeted(machine, demoted(script, machine))
    wire.say(Handover(1))
    said(machine, wire)
    wire.cut()
    assert machine.receiver.state is State.HANDING
    machine.receiver.kept("no room")
    script.connect(machine)
    exchange(script, machine)
    assert script.ready


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    machine, _ = received(random.Random(1), queued=False)
    script = Script(random.Random(2))
    hello = demoted(script, machine)
    for changed, term in (
        (replace(hello, role=Role.SENDER), 1),
        (hello, 2),
        (replace(hello, committed=hello.committed - 1), 1),
    ):
        wire, _ = greeted(machine, changed)
        wire.say(Handover(term))
        said(machine, wire)
        assert wire.error is not None
        assert machine.receiver.state is State.WAITING
    assert not [e for e, _ in machine.events if e == "handover-error"]


def test_a_receiver_that_makes_a_copy_of_its_point_asks_to_wait() -> None:
    machine, _ = received(random.Random(1), queued=False)
    applier = machine.receiver.applier
    assert applier is not None
    wire, _ = greeted(machine, demoted(Script(random.Random(2)), machine))
    applier.is_at_work = True
    wire.say(Handover(1))
    said(machine, wire)
    assert wire.error is not None
    assert "copy" in wire.error.text
    assert machine.receiver.state is State.WAITING


def test_a_receiver_without_a_point_is_nothing_to_hand_over_to() -> None:
    machine, script = fresh(), Script(random.Random(1))
    wire, told = greeted(machine, script.hello(committed=0, role=Role.DEMOTED))
    assert not [message for message in told if not isinstance(message, Error)]
    assert wire.error is not None
