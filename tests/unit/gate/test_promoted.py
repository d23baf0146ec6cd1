"""gate/promoted: a direct path that comes and goes."""

from __future__ import annotations

from collections.abc import Sequence

from bitmapd.gate.elsewhere import Run
from bitmapd.gate.promoted import PromotedPath
from bitmapd.gate.routes import GROWTH_HITS
from tests.unit.gate.test_direct_path import MARK_S, Bench


def test_without_layers_nobody_writes_elsewhere() -> None:
    path = PromotedPath()
    got: list[Sequence[Run] | None] = []
    called: list[str] = []
    path.cool([1])
    path.warm([1])
    path.gone([1])
    path.gated_hit(1, 2)
    path.when_urgent(lambda: called.append("urgent"))
    path.leave([1], lambda: called.append("left"))
    path.barrier([(0, 5)], got.append)
    assert (path.is_open(1), path.closed(), path.missed(), path.end()) == (False, [], [], [])
    asked = [path.wants_barrier, path.is_urgent, path.written, path.being_written]
    assert asked == [False] * 4
    assert path.marks_s == 0
    assert (path.can_grow, path.held_s) == (False, (0.0, 0.0))
    path.grow([(0, 5)], lambda: called.append("grown"))
    assert called.pop(0) == "left"
    assert (got, called, path.host_load) == ([()], ["grown"], (0, 0))


def promoted(bench: Bench) -> PromotedPath:
    path = PromotedPath()
    path.begin(bench.path)
    return path


def test_with_layers_it_is_their_path() -> None:
    bench = Bench()
    path = promoted(bench)
    urgent: list[str] = []
    path.when_urgent(lambda: urgent.append("urgent"))
    path.gated_hit(1, 2)
    assert path.wants_barrier
    path.barrier([(0, 5)], bench.got.append)
    bench.land((2, 4))
    assert bench.got == [[(2, 4)]]
    assert path.marks_s == 2 * MARK_S
    assert path.is_open(1)
    path.cool([1])
    path.gated_hit(1, 2)
    assert path.missed() == [1]
    path.warm([1])
    assert not path.missed()
    path.gone([1])
    assert path.closed() == []
    assert path.written
    assert path.being_written
    left: list[str] = []
    path.leave([1], lambda: left.append("left"))
    assert (path.is_urgent, urgent, left) == (True, ["urgent"], [])


def test_what_is_open_when_they_go_is_named_and_who_waits_is_told() -> None:
    bench = Bench()
    path = promoted(bench)
    path.gated_hit(1, 2)
    path.barrier([(0, 3)], bench.got.append)
    bench.land()
    left: list[str] = []
    path.leave([1], lambda: left.append("left"))
    assert path.end() == [(0, 3)]
    assert left == ["left"]
    assert (path.is_open(1), path.end()) == (False, [])


def test_the_load_of_hosts_goes_on_where_it_was() -> None:
    bench = Bench()
    path = promoted(bench)
    before = path.host_load
    assert before == bench.path.host_load
    path.end()
    assert path.host_load == before
    path.begin(bench.path)
    assert path.host_load == (2 * before[0], 2 * before[1])


def test_a_barrier_does_not_wait_for_a_partner_that_is_not_there() -> None:
    bench = Bench()
    path = promoted(bench)
    path.gated_hit(1, 2)
    path.is_held_up = lambda: True
    path.barrier([(0, 5)], bench.got.append)
    assert (bench.got, bench.helper.asked) == ([None], [])
    assert [path.wants_barrier, path.is_urgent] == [False, False]
    bench.routes.seal()  # hosts are out: nothing of theirs waits
    path.barrier([(0, 5)], bench.got.append)
    assert len(bench.helper.asked) == 1


def test_the_table_grows_unless_hosts_are_held_up() -> None:
    bench = Bench()
    path = promoted(bench)
    for _ in range(GROWTH_HITS):
        path.gated_hit(1, 2)
    path.is_held_up = lambda: True
    assert not path.can_grow, "it would hold all other writes until its deadline"
    path.is_held_up = lambda: False
    assert path.can_grow
    grown: list[str] = []
    path.grow([(0, 2)], lambda: grown.append("grown"))
    bench.helper.swapped(None, 0.5)
    assert (grown, path.held_s) == (["grown"], (0.5, 0.5))
