"""The sender of a volume that grows: points keep the size of their cut."""

from __future__ import annotations

from bitmapd.gate.cycle import Void
from bitmapd.points.messages import Begin, Data, Entry, Hello2
from bitmapd.points.pieces import raw_bytes
from bitmapd.points.sender import Phase
from bitmapd.points.spool import Spool
from bitmapd.record.geometry import Geometry
from tests.support.mirror import BLOCK, EXTENT
from tests.unit.points.homes import EXTENTS, OURS, Home, begun

SIZE = EXTENTS * EXTENT
LARGER = Geometry(SIZE + EXTENT, EXTENT, BLOCK)


def grow(home: Home, geometry: Geometry) -> None:
    """As `volume.resize.take_up`."""
    home.primary.resize(geometry.size_bytes, b"\5")
    home.store.grow(geometry, ())
    home.sender.grow(geometry)
    home.gate.grow(geometry)
    home.geometry = geometry


def sizes(told: list[object]) -> list[int]:
    return [message.size_bytes for message in told if isinstance(message, Begin)]


def entries(told: list[object]) -> list[Entry]:
    return [entry for m in told if isinstance(m, Data) for entry in m.entries]


def test_a_cut_that_is_being_sent_is_given_up_and_nothing_of_it_is_lost() -> None:
    home = begun(interval_s=1.0)
    home.put(1)
    home.wire.has_room = False
    home.run(1.0)
    assert home.sender.phase is Phase.SENDING
    grow(home, LARGER)
    assert home.sender.phase is Phase.OPEN
    assert home.sender.voids[Void.ASKED] == 1
    home.wire.has_room = True
    home.run(3.0)
    told = list(home.told())
    assert set(sizes(told)) == {LARGER.size_bytes}
    assert sorted(e.block for e in entries(told)) == [1, *range(4 * EXTENTS, 4 * EXTENTS + 4)]
    assert home.sender.phase is Phase.ENDED


def test_a_point_that_was_ended_keeps_its_size_over_connections() -> None:
    home = begun(interval_s=1.0)
    home.put(1)
    home.run(1.0)
    assert home.sender.phase is Phase.ENDED
    (entry,) = entries(list(home.told()))
    grow(home, LARGER)
    assert home.wire.geometry == LARGER
    home.lose()
    home.greet([(1, 1, entry.stamp)], point=1)
    home.run()
    assert sizes(list(home.told())) == [SIZE]
    home.commit(1)
    home.run(3.0)
    assert sizes(list(home.told())) == [LARGER.size_bytes, LARGER.size_bytes]


def test_one_of_which_the_receiver_lost_some_has_the_larger_size() -> None:
    """Over the same connection, whose last BEGIN said the smaller one."""
    home = begun(interval_s=1.0)
    home.put(1)
    home.run(1.0)
    assert home.sender.phase is Phase.ENDED
    grow(home, LARGER)
    home.lose()
    home.greet()
    home.run(3.0)
    told = list(home.told())
    assert sizes(told)[-1] == LARGER.size_bytes
    assert {e.block for e in entries(told)} == {1, *range(4 * EXTENTS, 4 * EXTENTS + 4)}


def test_a_last_block_that_was_short_comes_again_as_a_whole() -> None:
    """Also if it waits in the spool, or is being read."""
    short = Geometry(SIZE + 512, EXTENT, BLOCK)
    home = begun(interval_s=1.0)
    home.wire.has_room = False
    grow(home, short)
    home.run(1.0)
    assert [s.block for s in home.sender.spool.first(1 << 20, 9)] == [4 * EXTENTS]
    grow(home, LARGER)
    assert len(home.sender.spool) == 0
    home.wire.has_room = True
    home.run(3.0)
    sent = entries(list(home.told()))
    assert {e.block for e in sent} == set(range(4 * EXTENTS, 4 * EXTENTS + 4))
    assert all(e.mask == 1 and raw_bytes(LARGER, e.block, e.mask) == BLOCK for e in sent)
    home.commit(1)
    assert home.sender.in_sync


def test_what_was_being_read_of_it_does_not_count() -> None:
    short = Geometry(SIZE + 512, EXTENT, BLOCK)
    home = begun(interval_s=1.0)
    grow(home, short)
    home.loop.advance(1.0)
    assert [op.kind for op in home.primary.pending] == ["read"]
    grow(home, LARGER)
    home.finish("read")
    assert len(home.sender.spool) == 0
    home.run(3.0)
    assert all(len(e.payload) != 512 for e in entries(list(home.told())))
    home.commit(1)
    assert home.sender.in_sync


def test_the_larger_size_is_offered_by_the_next_greeting_until_it_is_taken_up() -> None:
    home = begun()
    uplink = home.sender.uplink

    def said() -> int:
        home.connect()
        (hello,) = home.told()
        assert isinstance(hello, Hello2)
        return hello.size_bytes

    uplink.offer(LARGER.size_bytes)
    assert said() == LARGER.size_bytes
    uplink.offer(0)
    assert said() == SIZE
    uplink.offer(LARGER.size_bytes + EXTENT)
    grow(home, LARGER)
    assert said() == LARGER.size_bytes
    assert home.wire.geometry is None, "not greeted yet"
    assert uplink.hello().incarnation == OURS


def test_what_the_spool_forgets_is_gone_wherever_it_was() -> None:
    class Further:
        held_bytes = 0
        forgotten: list[int] = []  # noqa: RUF012

        def __len__(self) -> int:
            return 0

        def forget(self, block: int) -> None:
            self.forgotten.append(block)

    spool = Spool(100)
    spool.put(1, 1, b"one")
    spool.forget(1)
    spool.forget(2)
    assert (len(spool), spool.held_bytes) == (0, 0)
    spool.beyond = further = Further()
    spool.forget(3)
    assert further.forgotten == [3]
