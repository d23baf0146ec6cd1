"""Consistent points of a volume that hosts write past the gate, in a real kernel."""

from __future__ import annotations

import pytest

from tests.vm.guest.disks import drop_cache
from tests.vm.guest.dmsites import DeviceWriter, dm_sites, newest

# A table that changes all the time, so that cuts meet both ways.
RESTLESS = ("--extent-size", "128KiB", "--record-limit", "8MiB", "--predictor", "lru")


@pytest.mark.parametrize("options", [(), RESTLESS], ids=["usual", "restless"])
def test_a_point_is_a_prefix_of_what_one_host_wrote(options: tuple[str, ...]) -> None:
    with dm_sites(*options) as (near, far):
        writer = DeviceWriter(near.device)
        writer.more(2500)
        before = near.points()["number"]
        for _ in range(4):
            told = writer.answered
            near.point(near.points()["number"] + 1)  # was cut after this line
            writer.more(300)
        status = near.status()
        near.kill()
        far.dmctl("promote", far.name)
        far.stop("--now")
        drop_cache(far.primary.path)
        found = newest(far.primary.path)
        assert status["points"]["number"] >= before + 4
        assert found >= told
        assert status["gate_writes_total"] < status["writes_total"], "nothing was direct"
        near.start()  # the kernel has waited for it
        writer.more(10)
        last = writer.stop()
        assert found <= last
