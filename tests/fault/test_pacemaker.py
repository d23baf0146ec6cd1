"""Pacemaker and corosync run a pair: start, promote, move, nodes that die, a link that is cut.

CLUSTER_ROUNDS says how often the volume moves and its node dies (1; 20 take a quarter of an hour).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.volumes import MIB, noise, run

ROUNDS = int(os.environ.get("CLUSTER_ROUNDS", "1"))
ADDRESS = "10.77.0.9"

pytestmark = pytest.mark.timeout(600 + 120 * ROUNDS)


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    run(["mount", "-t", "tmpfs", "tmpfs", str(folder)])
    try:
        yield folder
    finally:
        run(["umount", str(folder)])


def running(cluster: Cluster, *promoted: int) -> None:
    """Both nodes are there, paired, and these let hosts in."""
    cluster.until(lambda: cluster.promoted() == set(promoted), f"promoted at {promoted}")
    for number in (1, 2):
        cluster.until(
            lambda number=number: cluster.partner(number).get("state") == "paired",  # type: ignore[misc]
            f"paired at {number}",
        )
    cluster.settled(promoted[0])


def has_address(cluster: Cluster, number: int) -> bool:
    return ADDRESS in cluster.run(number, "ip", "addr", "show", "dev", "ring")


def equal(cluster: Cluster, number: int) -> None:
    cluster.pair[number].wait_in_sync()
    assert cluster.pair.equal()


def test_active_passive_with_an_address_that_moves_along(short_path: Path) -> None:
    with Cluster(short_path) as cluster:
        cluster.power_on(1, 2)
        cluster.until(lambda: len(cluster.promoted()) == 1, "one is promoted")
        (active,) = cluster.promoted()
        running(cluster, active)
        assert has_address(cluster, active)
        assert not has_address(cluster, 3 - active)
        assert cluster.fenced == []

        # The passive node dies: who serves hosts learns that it is dead from the cluster.
        cluster.power_off(3 - active)
        cluster.pair[active].write(50 * MIB, noise(50, MIB))  # a new place: needs the proof
        partner = cluster.partner(active)
        assert (partner["state"], partner["proof"]) == ("alone", "fence")
        cluster.power_on(3 - active)
        running(cluster, active)

        for number in range(ROUNDS):
            data = noise(number, MIB)
            cluster.pair[active].write(number * MIB, data)
            # Moved: nobody is fenced, nothing is compared.
            before = list(cluster.fenced)
            cluster.run(active, "crm_resource", "--ban", "-r", "vol0-clone", "--promoted")
            active = 3 - active
            running(cluster, active)
            cluster.run(active, "crm_resource", "--clear", "-r", "vol0-clone")
            cluster.settled(active)
            assert cluster.fenced == before
            assert cluster.promoted() == {active}
            assert has_address(cluster, active)
            assert cluster.pair[active].read(number * MIB, MIB) == data
            # Its node dies: once that is certain the other one serves what it had written.
            cluster.pair[active].write((number + 1) * MIB, data)
            cluster.power_off(active)
            dead, active = active, 3 - active
            cluster.until(lambda: cluster.promoted() == {active}, "taken over")
            # Once by the cluster, and once more if that was too long ago for the takeover.
            assert cluster.fenced_since(before) == {dead}
            partner = cluster.partner(active)
            assert (partner["state"], partner["proof"]) == ("alone", "fence")
            assert partner["compared_extents_total"] == 0
            assert cluster.pair[active].read((number + 1) * MIB, MIB) == data
            cluster.power_on(dead)
            running(cluster, active)

        # Its process dies, and its node lives: it is started again, and nobody is fenced.
        before = list(cluster.fenced)
        cluster.pair[active].write(30 * MIB, noise(30, MIB))
        before_it = cluster.pids()
        cluster.run(active, "kill", "-9", before_it[active])
        cluster.until(
            lambda: len(cluster.promoted()) == 1 and cluster.pids() != before_it, "it is mended"
        )
        (active,) = cluster.promoted()
        running(cluster, active)
        assert cluster.fenced == before
        assert cluster.pair[active].read(30 * MIB, MIB) == noise(30, MIB)
        equal(cluster, active)

        # The appliances' link is cut, the cluster's is not: both live, and nobody is fenced.
        before = list(cluster.fenced)
        cluster.cut("side")
        for number in (1, 2):
            cluster.until(
                lambda number=number: cluster.partner(number)["state"] == "cut",  # type: ignore[misc]
                "cut",
            )
        # The cluster hears of it from one node after the other: the scores stay what they were.
        cluster.monitored()
        cluster.settled(active)
        assert {cluster.score(number) for number in (1, 2)} == {1000}
        assert (cluster.promoted(), cluster.fenced) == ({active}, before)
        # Whoever is promoted now has the other one fenced first.
        cluster.run(active, "crm_resource", "--ban", "-r", "vol0-clone", "--promoted")
        dead, active = active, 3 - active
        cluster.until(lambda: cluster.promoted() == {active}, "promoted in the cut")
        # And perhaps again by the cluster, which may have missed it before it heard why.
        assert cluster.fenced_since(before) == {dead}
        assert cluster.partner(active)["proof"] == "fence"
        cluster.pair[active].write(40 * MIB, noise(40, MIB))
        equal(cluster, active)


def test_active_active(short_path: Path) -> None:
    with Cluster(short_path, promoted_max=2) as cluster, mounted(short_path / "others") as others:
        cluster.power_on(1, 2)
        running(cluster, 1, 2)
        # What else is mounted on this machine is nothing that a node keeps in use.
        for number in (1, 2):
            assert str(others) not in cluster.run(number, "cat", "/proc/self/mounts")
        for writer, reader in ((1, 2), (2, 1)):
            data = noise(writer, MIB)
            cluster.pair[writer].write(writer * MIB, data)
            assert cluster.pair[reader].read(writer * MIB, MIB) == data
        cluster.power_off(2)
        cluster.pair[1].write(2 * MIB, noise(3, MIB))  # it was the other's
        assert cluster.fenced_since([]) == {2}
        partner = cluster.partner(1)
        assert (partner["state"], partner["proof"]) == ("alone", "fence")
        cluster.power_on(2)
        running(cluster, 1, 2)
        assert cluster.pair[2].read(2 * MIB, MIB) == noise(3, MIB)
        equal(cluster, 2)
