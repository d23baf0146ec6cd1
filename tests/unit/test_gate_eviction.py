"""gate: a policy that names victims it was told to leave alone does no harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.support.mirror import PER_EXTENT, Mirror, ScriptedPolicy


class RudePolicy(ScriptedPolicy):
    """Names every extent as a victim, clean or not."""

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        return range(8)


def test_a_miss_that_needs_no_record_write_keeps_its_own_extents() -> None:
    """Its extents were given up and are still in the stored copy: nothing has to be waited for, and
    until its blocks are marked they look clean."""
    mirror = Mirror(limit_extents=1)
    mirror.policy.kept = {0, 1}
    mirror.put(0)
    mirror.put(PER_EXTENT)
    mirror.copier.start()
    mirror.run(1.0)
    mirror.run(1.0)
    assert mirror.gate.in_sync
    mirror.policy.unloved = [0]
    mirror.gate.tick()  # extent 0 leaves the record; its page is not written yet
    assert mirror.recorded() == {1}
    assert mirror.stored() == {0, 1}
    mirror.gate.set_policy(RudePolicy())
    answers = mirror.write(0, fill=2)
    mirror.run()
    assert answers == [None]
    assert mirror.recorded() == {0}, "the other one, which is clean, goes"
    assert 0 in mirror.stored()
