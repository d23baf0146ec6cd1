"""Two appliances as processes, and a fence command: what proves that the other can write no more.

The agent is a script that kills by pid, as somebody would write who has nothing better.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.support.pairs import Pair
from tests.support.volumes import KIB, MIB, noise, wait_gone

ROOT = Path(__file__).parents[2]
WRITE = 1


class Agents:
    """One for each node, which kills the other; `log` names who was shot, a line each."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "shots"
        self._folder = folder

    def path(self, node: int) -> Path:
        return self._folder / f"fence{node}"

    def write(self, node: int, script: str | None = None) -> None:
        other = self._folder / f"n{3 - node}" / "run" / "vol0.pid"
        kill = (
            f'read -r action; read -r plug; echo "$action $plug" >> {self.log}\n'
            f"pid=$(cat {other}) || exit 1\n"
            'kill -9 "$pid" || exit 0\n'
            'while kill -0 "$pid" 2>/dev/null; do :; done\n'
        )
        self.path(node).write_text("#!/bin/sh\n" + (kill if script is None else script))
        self.path(node).chmod(0o755)

    def shots(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


Make = Callable[..., Pair]


@pytest.fixture
def agents(short_path: Path) -> Agents:
    return Agents(short_path)


@pytest.fixture
def make(short_path: Path, agents: Agents) -> Iterator[Make]:
    made: list[Pair] = []

    def pair(*options: str) -> Pair:
        it = Pair(short_path)
        made.append(it)
        for number in (1, 2):
            agents.write(number)
            command = ["--fence-command", str(agents.path(number))]
            it[number].options = [*it[number].options, *command, *options]
        it.create()
        it.start()
        for number in (1, 2):
            it[number].wait_in_sync()
        return it

    yield pair
    for it in made:
        it.destroy()


def taken(pair: Pair, node: int, *words: str) -> dict[str, Any]:
    answer = json.loads(pair[node].dmctl("--json", "takeover", "vol0", *words))
    return dict(answer["partner"])


def frozen(pair: Pair, node: int) -> int:
    pid = pair[node].pid
    os.kill(pid, signal.SIGSTOP)
    return pid


def paused(pair: Pair) -> None:
    """Nothing is copied, so that what is written stays the writer's."""
    for node in (1, 2):
        pair[node].dmctl("pause", "vol0")


def copied(pair: Pair) -> None:
    for node in (1, 2):
        pair[node].dmctl("resume", "vol0")
    for node in (1, 2):
        pair[node].wait_in_sync()


@pytest.mark.parametrize("alive", [1, 2])
def test_a_takeover_shoots_first_and_copies_what_the_record_names(
    make: Make, agents: Agents, alive: int
) -> None:
    pair = make()
    data = noise(1, MIB)
    pair[3 - alive].write(20 * MIB, data)
    pid = frozen(pair, 3 - alive)
    named = pair.until(alive, "cut")["partner_extents"]
    partner = taken(pair, alive)
    assert (partner["state"], partner["proof"], partner["term"]) == ("alone", "fence", 1)
    assert (partner["absorbed_extents_total"], partner["compared_extents_total"]) == (named, 0)
    assert agents.shots() == [f"action=off plug=node{3 - alive}"]
    wait_gone(pid)
    assert pair[alive].read(20 * MIB, MIB) == data
    pair[alive].write(30 * MIB, data)
    pair[alive].wait_in_sync()
    assert pair.equal()
    # The other comes back as a new process, which knows nothing and compares nothing.
    pair[3 - alive].start()
    assert pair.until(3 - alive, "paired")["compared_extents_total"] == 0
    assert taken(pair, alive)["state"] == "paired"
    assert len(agents.shots()) == 1  # nothing is proven of a partner that is there


def test_a_node_that_waits_shoots_and_compares_everything(make: Make, agents: Agents) -> None:
    pair = make("--partner-wait", "200ms")
    pair[1].write(7 * MIB, noise(3, MIB))
    pair[2].kill()
    frozen(pair, 1)
    assert pair[2].dmctl_process("start", "vol0").returncode == 15
    partner = taken(pair, 2)
    assert (partner["proof"], partner["compared_extents_total"]) == ("fence", 64)
    assert agents.shots() == ["action=off plug=node1"]
    pair[2].wait_in_sync()
    assert pair.equal()


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo the BMC is silent; exit 4\n", "ended with status 4: the BMC is silent"),
     ("sleep 600\n", "did not end within 0.3 s")],
)  # fmt: skip
def test_an_agent_that_fails_proves_nothing(
    make: Make, agents: Agents, script: str, said: str
) -> None:
    pair = make("--fence-timeout", "300ms")
    agents.write(1, script)
    frozen(pair, 2)
    pair.until(1, "cut")
    error = pair[1].refused("takeover", "vol0")
    assert error["exit_status"] == 15
    assert said in error["message"]
    assert "--fenced" in error["hint"]
    status = pair[1].status()
    assert status["partner"]["state"] == "cut"
    assert said in status["last_error"]["message"]
    os.kill(pair[2].pid, signal.SIGCONT)
    for node in (1, 2):
        pair.until(node, "paired")


def test_by_itself_once_a_host_waits(make: Make, agents: Agents) -> None:
    """Also of a node that came back and dies again at once."""
    pair = make("--takeover", "auto", "--cut-patience", "20s")
    with pair[1].events() as events, pair[1].host() as host:
        for shots in (1, 2):
            pid = frozen(pair, 2)
            host.submit(WRITE, (33 + shots) * MIB, 4 * KIB, noise(7, 4 * KIB))
            events.wait("fence-started", plug="node2")
            events.wait("fenced")
            events.wait("takeover", proof="fence")
            assert host.reply().error == 0
            assert len(agents.shots()) == shots
            assert pair.partner(1)["state"] == "alone"
            wait_gone(pid)
            pair[2].start()
            pair.until(1, "paired")
        host.disconnect()


def test_two_that_shoot_at_once_leave_one(make: Make, agents: Agents) -> None:
    """The link is lost, both live, and hosts wait at both: the delay decides."""
    pair = make("--takeover", "auto", "--partner-timeout", "1s")
    assert [pair.partner(node)["own_extents"] for node in (1, 2)] == [0, 0]
    loser = pair[2].pid
    (pair.folder / "p1").unlink()
    with pair[1].host() as here, pair[2].host() as there:
        frozen(pair, 2)
        pair.until(1, "cut")
        here.submit(WRITE, 33 * MIB, 4 * KIB, noise(7, 4 * KIB))
        os.kill(loser, signal.SIGCONT)
        there.submit(WRITE, 50 * MIB, 4 * KIB, noise(8, 4 * KIB))
        assert here.reply().error == 0
        with pytest.raises((ConnectionError, EOFError)):
            there.reply()
        here.disconnect()
    wait_gone(loser)
    assert agents.shots() == ["action=off plug=node2"]
    assert pair[1].read(33 * MIB, 4 * KIB) == noise(7, 4 * KIB)
    pair[1].wait_in_sync()
    assert pair.equal()


def test_a_command_that_is_given_twice_shoots_once(make: Make, agents: Agents) -> None:
    pair = make()
    held = pair.folder / "held"
    os.mkfifo(held)
    agents.write(1, f"echo shot >> {agents.log}; read -r line < {held}; kill -9 {pair[2].pid}\n")
    frozen(pair, 2)
    pair.until(1, "cut")
    with pair[1].control() as first:
        first.send("takeover", fenced=False, force=False)
        pair[1].until(lambda status: status["partner"]["fencing"] == "agent")
        assert pair[1].refused("takeover", "vol0")["exit_status"] == 12
        held.write_text("go\n")
        pair.until(1, "alone")
    assert agents.shots() == ["shot"]


def test_a_host_waits_no_longer_than_it_was_told(make: Make) -> None:
    pair = make("--cut-patience", "1s")
    pair[1].dmctl("set", "vol0", "cut-patience=500ms")
    frozen(pair, 2)
    pair.until(1, "cut")
    with pair[1].host() as host:
        host.submit(WRITE, 33 * MIB, 4 * KIB, noise(7, 4 * KIB))
        assert host.reply().error == 5  # EIO
        host.disconnect()
    assert pair.partner(1)["state"] == "cut"


# -- shut out by the storage ------------------------------------------------------------------


class ShutOut:
    """Node 2's way to primary and secondary is cut by `close`, as by a reservation, and no sooner
    than that: what it has submitted may land before."""

    def __init__(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flag = pair.folder / "shut-out"
        self._pair = pair
        pair[2].stop()
        pair.until(1, "alone")
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(support.__file__).parent / "shutout"))
            patch.setenv("SHUT_OUT_BY", str(self.flag))
            pair[2].start()
        for node in (1, 2):
            pair.until(node, "paired")
            pair[node].wait_in_sync()
        self.incarnation = self._incarnation(pair[1].status())

    @staticmethod
    def _incarnation(status: dict[str, Any]) -> str:
        peer = status["partner"]["peer"]
        return str(peer["incarnation"]) if peer is not None else ""

    def until_anew(self) -> None:
        """Node 2 has executed itself anew, and joined as a fresh process."""

        def joined(status: dict[str, Any]) -> bool:
            anew = self._incarnation(status) != self.incarnation
            return anew and status["partner"]["state"] == "paired"

        self._pair[1].until(joined)


def test_a_node_that_the_storage_refuses_begins_anew(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hosts get an error, its partner takes over what it had, and nothing is lost."""
    pair = make()
    out = ShutOut(pair, monkeypatch)
    paused(pair)
    kept = noise(1, 64 * KIB)
    pair[2].write(20 * MIB, kept)
    with pair[2].events() as events, pair[2].host() as host:
        out.flag.touch()
        host.submit(WRITE, 20 * MIB, 4 * KIB, noise(2, 4 * KIB))
        assert host.reply().error == 5  # EIO
        assert "reservation" in events.wait("outdated")["message"]
        with pytest.raises(ConnectionError):
            host.reply()
    out.until_anew()
    assert pair[1].read(20 * MIB, 64 * KIB) == kept
    out.flag.unlink()  # the agent's `on`
    pair[2].write(21 * MIB, kept)
    copied(pair)
    assert pair.equal()


def test_a_node_that_stood_still_while_it_was_fenced_writes_nothing_any_more(
    make: Make, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes with a write of its own extent, which the storage refuses."""
    pair = make()
    out = ShutOut(pair, monkeypatch)
    agents.write(1, f"touch {out.flag}\n")
    paused(pair)
    pair[2].write(20 * MIB, noise(1, 64 * KIB))
    new = noise(2, 64 * KIB)
    with pair[2].host() as host:
        pid = frozen(pair, 2)
        host.submit(WRITE, 20 * MIB, 4 * KIB, noise(3, 4 * KIB))
        pair.until(1, "cut")
        assert taken(pair, 1)["proof"] == "fence"
        pair[1].write(20 * MIB, new)
        os.kill(pid, signal.SIGCONT)
        assert host.reply().error == 5  # EIO
    out.until_anew()
    assert pair[1].read(20 * MIB, 64 * KIB) == new
    out.flag.unlink()
    assert pair[2].read(20 * MIB, 64 * KIB) == new
    copied(pair)
    assert pair.equal()


# -- an agent from examples/ ------------------------------------------------------------------


def test_an_agent_of_one_s_own_ends_the_other_process(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ssh` leads to the other node's folders instead of another machine."""
    with Pair(short_path) as pair:
        agent = ["--fence-command", str(ROOT / "examples/fencing/fence-by-ssh")]
        pair[1].options = [*pair[1].options, *agent, "--fence-options", "plug=b volume=vol0"]
        pair.create()
        folder = short_path / "bin"
        folder.mkdir()
        home = pair[2].folder
        (folder / "ssh").write_text(
            "#!/bin/sh\nwhile [ $1 != dmctl ]; do shift; done; shift\n"
            f'exec {pair[2].program} --config-dir {home}/etc --run-dir {home}/run "$@"\n'
        )
        (folder / "ssh").chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
            pair[1].start()
        pair.start()
        pid = pair[2].pid
        (short_path / "p1").unlink()
        os.kill(pid, signal.SIGSTOP)
        pair.until(1, "cut")
        os.kill(pid, signal.SIGCONT)
        assert taken(pair, 1)["proof"] == "fence"
        wait_gone(pid)
