"""The planner and the executor against a simulated kernel: any state, any death, any refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmapd.errors import BitmapdError, BusyError, ExistsError, WrongStateError
from dmctl.kernel.execute import execute, reach
from dmctl.model.names import Layer, device_path
from dmctl.model.plan import plan
from dmctl.model.stack import (
    Goal,
    Nbd,
    Observed,
    Primary,
    Segment,
    Volume,
    Wanted,
    era_table,
    segments_of,
    top_table,
    write_table,
)
from dmctl.model.steps import RAM, MakeRam
from dmctl.model.targets import Other, Table, parse, render, table_bytes
from tests.support.machines import examples
from tests.support.simdm import MIB, Died, SimDm

UUID = "0123456789abcdef0123456789abcdef"
BLOCK = 64 << 10
PRIMARY = Primary(
    path="/dev/sda",
    number="8:0",
    size_bytes=256 * MIB,
    logical_block_bytes=512,
    physical_block_bytes=4096,
    discard_max_bytes=1 << 30,
    discard_granularity_bytes=512,
)
VOLUME = Volume("vol-0", UUID, "/dev/sda", 64 * MIB, 512, BLOCK)
GRANULARITIES = (0, 512, 4096, BLOCK, 1 << 20)


def kernel(granularity_bytes: int = 512) -> SimDm:
    primary = replace(PRIMARY, discard_granularity_bytes=granularity_bytes)
    if not granularity_bytes:
        primary = replace(primary, discard_max_bytes=0)
    return SimDm(VOLUME, primary)


def connect(dm: SimDm, size_bytes: int | None = None) -> None:
    """As bitmapd does before it attaches: another device each time."""
    dm.minors += 1
    size = size_bytes or dm.volume.size_bytes
    dm.nbd = Nbd(f"/dev/nbd{dm.minors}", f"43:{dm.minors}", size, 512)


def go(dm: SimDm, goal: Goal, segments: Sequence[Segment] = ()) -> Observed:
    wanted = Wanted(dm.volume, goal, tuple(segments))
    return reach(wanted, dm.observe, dm, busy_s=0)


def go_dying(
    dm: SimDm,
    goal: Goal,
    life: int | None,
    fault: str = "die",
    segments: Sequence[Segment] = (),
) -> bool:
    """Whether it lived; whatever it raised otherwise is one of the expected ends."""
    dm.life, dm.fault = life, fault
    try:
        go(dm, goal, segments)
    except Died:
        return False
    except BitmapdError:
        return False
    finally:
        dm.life = None
    return True


def check(dm: SimDm, goal: Goal) -> None:
    """What the goal promises, looked at by other means than the planner's."""
    volume, observed = dm.volume, dm.observe()
    layers = {layer: observed.layer(volume, layer) for layer in Layer}
    assert not any(device and device.suspended for device in layers.values())
    assert not any(device and device.inactive for device in layers.values())
    era, write, top = (layers[layer] for layer in (Layer.ERA, Layer.WRITE, Layer.TOP))
    if goal in {Goal.GONE, Goal.SEVERED}:
        assert not any(layers.values())
        assert dm.nbd is None
        assert not observed.rams
    if goal is Goal.CLOSED:
        assert top is None
    if goal in {Goal.TRACKED, Goal.ATTACHED}:
        assert era is not None
        (ram,) = observed.rams
        assert era.table == era_table(volume, ram=ram.number, primary="8:0")
        granularity = dm.primary.discard_granularity_bytes
        assert era.has_node
        assert era.discard_max_bytes <= (0 if granularity > BLOCK else BLOCK)
    if goal is Goal.ATTACHED:
        assert era
        assert write
        assert top
        assert dm.nbd
        segments = segments_of(write.lines, era=era.number, nbd=dm.nbd.number)
        assert write.has_node
        assert top.has_node
        assert segments is not None
        assert segments[-1][1] == volume.size_bytes
        assert top.table == top_table(volume, primary="8:0", write=write.number)


# -- from whatever state ------------------------------------------------------------------------
def suspend(dm: SimDm, draw: st.DataObject) -> None:
    for device in dm.devices.values():
        device.suspended |= draw.draw(st.booleans())


def load(dm: SimDm, draw: st.DataObject) -> None:
    """A barrier that died after it loaded a table."""
    write = dm.devices.get(VOLUME.device(Layer.WRITE))
    if write is not None and write.table is not None:
        write.inactive = write.table


def swap_error(dm: SimDm, draw: st.DataObject) -> None:
    """Somebody has put another table in force."""
    for layer in (Layer.WRITE, Layer.TOP):
        device = dm.devices.get(VOLUME.device(layer))
        if device is not None and device.table and draw.draw(st.booleans()):
            (first, *_) = device.table
            length = table_bytes(device.table)
            device.table = (replace(first, length_bytes=length, target=Other("error", "")),)


def lose_nbd(dm: SimDm, draw: st.DataObject) -> None:
    """An administrator gave up; tables keep the number of the device that was."""
    dm.nbd = None


def drop_ram(dm: SimDm, draw: st.DataObject) -> None:
    dm.make_ram(VOLUME.ram_bytes, VOLUME.stamp)


def lift_limit(dm: SimDm, draw: st.DataObject) -> None:
    era = dm.devices.get(VOLUME.device(Layer.ERA))
    if era is not None and not dm.open_count(era):
        era.discard_max_bytes = dm.primary.discard_max_bytes


def grow(dm: SimDm, draw: st.DataObject) -> None:
    """The volume's size is larger from now on; so is bitmapd's export."""
    if dm.volume.size_bytes < 192 * MIB:
        dm.volume = replace(dm.volume, size_bytes=dm.volume.size_bytes + 32 * MIB)
        if dm.nbd is not None:
            dm.nbd = replace(dm.nbd, size_bytes=dm.volume.size_bytes)


MISCHIEF = (suspend, load, swap_error, lose_nbd, drop_ram, lift_limit, grow)


@settings(max_examples=examples(300), deadline=None)
@given(st.data())
def test_every_goal_is_reached_from_every_state(data: st.DataObject) -> None:
    dm = kernel(data.draw(st.sampled_from(GRANULARITIES)))
    for _ in range(data.draw(st.integers(0, 4))):
        if dm.nbd is None:
            connect(dm)
        life = data.draw(st.none() | st.integers(0, 25))
        fault = data.draw(st.sampled_from(("die", "refuse")))
        half = dm.volume.size_bytes // 2
        segments = data.draw(
            st.sampled_from(((), ((0, half, "direct"), (half, dm.volume.size_bytes, "gate"))))
        )
        go_dying(dm, data.draw(st.sampled_from(Goal)), life, fault, segments)
        for _ in range(data.draw(st.integers(0, 2))):
            data.draw(st.sampled_from(MISCHIEF))(dm, data)
    if dm.nbd is None:
        connect(dm)
    goal = data.draw(st.sampled_from(Goal))
    go(dm, goal)
    check(dm, goal)
    assert plan(dm.observe(), Wanted(dm.volume, goal)) == []


@pytest.mark.parametrize(
    "goal", [Goal.TRACKED, Goal.ATTACHED, Goal.GONE, Goal.CLOSED, Goal.SEVERED]
)
def test_a_death_after_every_effect(goal: Goal) -> None:
    def fresh() -> SimDm:
        dm = kernel()
        connect(dm)
        if goal in {Goal.GONE, Goal.CLOSED, Goal.SEVERED}:
            go(dm, Goal.ATTACHED)
        return dm

    life = 0
    while True:
        dm = fresh()
        lived = go_dying(dm, goal, life)
        if dm.nbd is None and goal is Goal.ATTACHED:
            connect(dm)
        go(dm, goal)
        check(dm, goal)
        if lived:
            break
        life += 1
    assert life >= 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_building_that_is_refused_leaves_nothing(granularity: int) -> None:
    life = 0
    while True:
        dm = kernel(granularity)
        connect(dm)
        before = dm.state()
        if go_dying(dm, Goal.ATTACHED, life, "refuse"):
            break
        assert dm.state() == before, f"refused at effect {life}"
        life += 1
    assert life > 9


def test_undoing_stops_at_what_cannot_be_undone() -> None:
    """A wrong era device is gone with its RAM before the new one fails: nothing is half built."""
    for life in range(3, 12):
        dm = kernel()
        go(dm, Goal.TRACKED)
        grow(dm, None)  # type: ignore[arg-type]
        if go_dying(dm, Goal.TRACKED, life, "refuse"):
            break
        assert not dm.devices
        assert not dm.rams
    else:
        pytest.fail("it was never done")


@settings(max_examples=examples(100), deadline=None)
@given(st.data())
def test_every_inverse_brings_back_what_was(data: st.DataObject) -> None:
    dm = kernel()
    connect(dm)
    goals = (Goal.TRACKED, Goal.ATTACHED)
    go(dm, data.draw(st.sampled_from((*goals, Goal.GONE))))
    if dm.nbd is None:
        connect(dm)
    for _ in range(data.draw(st.integers(0, 2))):
        data.draw(st.sampled_from((swap_error, drop_ram)))(dm, data)
    if dm.nbd is None:
        connect(dm)
    wanted = Wanted(dm.volume, data.draw(st.sampled_from((*goals, Goal.CLOSED))))
    steps = plan(dm.observe(), wanted)
    states = [dm.state()]
    ram = RAM
    inverses = []
    for step in steps:
        paths = set(dm.rams)
        execute([step], _Bound(dm, ram), undo=False)
        if isinstance(step, MakeRam):
            (ram,) = set(dm.rams) - paths
        states.append(dm.state())
        inverses.append(step.inverse)
    for step, inverse, before in zip(steps[::-1], inverses[::-1], states[-2::-1], strict=True):
        if inverse is None:
            break
        execute([inverse], _Bound(dm, ram), undo=False)
        assert dm.state() == before, step


class _Bound:
    """The actor of one step, which knows the RAM device that an earlier step made."""

    def __init__(self, dm: SimDm, ram: str) -> None:
        self._dm, self._ram = dm, ram

    def __getattr__(self, name: str) -> object:
        def act(*arguments: object) -> object:
            return getattr(self._dm, name)(*map(self._filled, arguments))

        return act

    def _filled(self, value: object) -> object:
        if value == RAM:
            return self._ram
        if isinstance(value, tuple):
            return tuple(parse(render(value).replace(RAM, self._ram)))
        return value


# -- segments -----------------------------------------------------------------------------------
@st.composite
def cuts(draw: st.DrawFn) -> list[Segment]:
    size = VOLUME.size_bytes // 512
    ends = sorted(draw(st.sets(st.integers(1, size - 1), max_size=20)) | {size})
    routes = draw(
        st.lists(st.sampled_from(("direct", "gate")), min_size=len(ends), max_size=len(ends))
    )
    starts = [0, *ends[:-1]]
    return [
        (first * 512, end * 512, route)
        for first, end, route in zip(starts, ends, routes, strict=True)
    ]


@given(cuts())
def test_segments_cover_the_volume_once(segments: list[Segment]) -> None:
    table = write_table(VOLUME, segments, era="253:1", nbd="43:0")
    back = segments_of(parse(render(table)), era="253:1", nbd="43:0")
    assert back is not None
    end = 0
    for first, stop, route in back:
        assert first == end
        end = stop
        assert all(
            wanted == route for begin, over, wanted in segments if begin < stop and over > first
        )
    assert end == VOLUME.size_bytes
    assert all(one[2] != other[2] for one, other in pairwise(back))


@given(cuts())
def test_a_live_table_keeps_its_segments(segments: list[Segment]) -> None:
    dm = kernel()
    connect(dm)
    go(dm, Goal.ATTACHED, segments)
    before = _write_table_of(dm)
    go(dm, Goal.ATTACHED)
    assert _write_table_of(dm) == before
    assert dm.nbd
    grow(dm, None)  # type: ignore[arg-type]
    era = dm.devices[VOLUME.device(Layer.ERA)]
    if dm.open_count(era):  # the caller routes everything to the gate before it grows a volume
        dm.devices[VOLUME.device(Layer.TOP)].opens += 1
        with pytest.raises(BusyError, match="cannot be made anew"):
            go(dm, Goal.ATTACHED)


def _write_table_of(dm: SimDm) -> Table | None:
    return dm.devices[VOLUME.device(Layer.WRITE)].table


def test_growing_while_hosts_have_it_open() -> None:
    dm = kernel()
    connect(dm)
    go(dm, Goal.ATTACHED)
    top = dm.devices[VOLUME.name]
    top.opens = 1
    grow(dm, None)  # type: ignore[arg-type]
    go(dm, Goal.ATTACHED)
    check(dm, Goal.ATTACHED)
    assert dm.devices[VOLUME.name] is top


def test_a_device_that_hosts_have_open_is_taken_from_them() -> None:
    """Whichever effect is the last before a death; nothing of the volume can be written then."""
    lived, life = False, 0
    while not lived:
        dm = kernel()
        connect(dm)
        go(dm, Goal.ATTACHED)
        top = dm.devices[VOLUME.name]
        top.opens = 1
        lived = go_dying(dm, Goal.SEVERED, life)
        go(dm, Goal.SEVERED)
        assert dm.devices == {VOLUME.name: top}
        assert render(top.table or ()) == f"0 {VOLUME.size_bytes // 512} error"
        assert (dm.nbd, dm.observe().rams) == (None, ())
        assert plan(dm.observe(), Wanted(dm.volume, Goal.SEVERED)) == []
        with pytest.raises(BusyError):
            go(dm, Goal.CLOSED)
        top.opens = 0
        go(dm, Goal.SEVERED)
        check(dm, Goal.SEVERED)
        life += 1
    assert life > 4


# -- what is not ours, and what is in use ---------------------------------------------------------
@pytest.mark.parametrize("layer", list(Layer))
def test_foreign_devices_are_refused_and_left_alone(layer: Layer) -> None:
    dm = kernel()
    connect(dm)
    foreign = dm.add(VOLUME.device(layer), "LVM-something")
    for goal in (Goal.TRACKED, Goal.ATTACHED):
        with pytest.raises(ExistsError, match="does not belong to volume"):
            go(dm, goal)
    for goal in (Goal.AWAKE, Goal.CLOSED, Goal.GONE):
        go(dm, goal)
        check(dm, goal)
    assert dm.devices == {foreign.name: foreign}


def test_a_renamed_layer_is_refused_but_can_be_removed() -> None:
    dm = kernel()
    connect(dm)
    go(dm, Goal.ATTACHED)
    device = dm.devices.pop(VOLUME.name)
    device.name = "other"
    dm.devices["other"] = device
    with pytest.raises(WrongStateError, match="under another name") as caught:
        go(dm, Goal.ATTACHED)
    assert caught.value.hint == "dmsetup rename other vol-0"
    go(dm, Goal.GONE)
    check(dm, Goal.GONE)


@pytest.mark.parametrize("layer", list(Layer))
def test_what_is_open_is_not_removed(layer: Layer) -> None:
    dm = kernel()
    connect(dm)
    go(dm, Goal.ATTACHED)
    before = dm.state()
    device = dm.devices[VOLUME.device(layer)]
    device.opens = 1
    with pytest.raises(BusyError, match=device_path(device.name)):
        go(dm, Goal.GONE)
    device.opens = 0
    assert dm.state() == before
    go(dm, Goal.GONE)
    check(dm, Goal.GONE)
