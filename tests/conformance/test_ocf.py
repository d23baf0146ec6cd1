"""`ocf:dmctl:volume` with the nodes of a pair, every action as the cluster's executor runs it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.needs import need
from tests.support.ocf import AGENT, Code, act, parameters
from tests.support.pairs import Pair
from tests.support.volumes import MIB, noise

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def needs() -> None:
    need("ocf-tester", "xmllint", "shellcheck")  # ocf-shellfuncs comes with the first


@pytest.fixture
def pair(short_path: Path) -> Iterator[Pair]:
    with Pair(short_path, 64 * MIB, "--serve", "on-promote", "--partner-wait", "500ms") as made:
        made.create()
        yield made


def started(pair: Pair) -> Pair:
    for number in (1, 2):
        assert act(pair[number], "start")[0] is Code.SUCCESS
    for number in (1, 2):
        pair.until(number, "paired")
    return pair


def test_from_start_to_stop(pair: Pair) -> None:
    one, two = pair[1], pair[2]
    for node in (one, two):
        assert act(node, "validate-all") == (Code.SUCCESS, "")
        for idle in ("monitor", "promote", "demote"):
            assert act(node, idle)[0] is Code.NOT_RUNNING
        assert act(node, "stop") == (Code.SUCCESS, "")
    assert act(two, "start") == (Code.SUCCESS, "")  # waits for node 1, and runs
    assert pair.partner(2)["state"] == "waiting"
    assert act(two, "monitor")[0] is Code.SUCCESS
    code, reason = act(two, "promote", timeout_s=6)
    assert code is Code.GENERIC
    assert "did not come in time" in reason
    assert act(one, "start") == (Code.SUCCESS, "")
    assert act(one, "start") == (Code.SUCCESS, "")  # twice is as once
    pair.until(2, "paired")
    for _ in range(2):
        assert act(one, "promote") == (Code.SUCCESS, "")
    assert (act(one, "monitor")[0], act(two, "monitor")[0]) == (
        Code.RUNNING_PROMOTED,
        Code.SUCCESS,
    )
    one.write(3 * MIB, noise(1, MIB))
    with one.host():  # who is connected does not hold up the cluster
        assert act(one, "demote") == (Code.SUCCESS, "")
    assert act(one, "demote") == (Code.SUCCESS, "")
    assert pair.partner(1)["own_extents"] == 0
    assert act(two, "promote") == (Code.SUCCESS, "")
    assert (act(one, "monitor")[0], act(two, "monitor")[0]) == (
        Code.SUCCESS,
        Code.RUNNING_PROMOTED,
    )
    assert two.read(3 * MIB, MIB) == noise(1, MIB)
    assert act(one, "stop") == (Code.SUCCESS, "")
    assert act(one, "monitor")[0] is Code.NOT_RUNNING
    assert pair.until(2, "alone")["proof"] == "bye"  # which needs no fencing
    assert act(two, "monitor")[0] is Code.RUNNING_PROMOTED
    assert act(two, "demote") == (Code.SUCCESS, "")
    assert act(two, "stop") == (Code.SUCCESS, "")
    assert act(two, "monitor")[0] is Code.NOT_RUNNING


def test_two_that_are_both_promoted_leave_one_another_alone(pair: Pair) -> None:
    started(pair)
    for number in (1, 2):
        assert act(pair[number], "promote", meta={"promoted_max": "2"})[0] is Code.SUCCESS
    for number in (1, 2):
        assert act(pair[number], "monitor")[0] is Code.RUNNING_PROMOTED


def test_of_one_that_is_promoted_the_other_takes_over(pair: Pair) -> None:
    """Should the cluster believe that nobody is promoted: hosts that are connected come first."""
    started(pair)
    act(pair[1], "promote")
    with pair[1].host():
        code, reason = act(pair[2], "promote", timeout_s=7)
        assert code is Code.GENERIC
        assert "1 hosts are connected at the partner" in reason
    pair[1].until(lambda status: status["connections"] == 0)
    assert act(pair[2], "promote")[0] is Code.SUCCESS
    assert act(pair[1], "monitor")[0] is Code.SUCCESS


def test_a_node_whose_process_died_is_not_running(pair: Pair) -> None:
    started(pair)
    act(pair[1], "promote")
    pair[1].kill()
    assert act(pair[1], "monitor")[0] is Code.NOT_RUNNING
    pair.until(2, "cut")
    code, reason = act(pair[2], "promote", timeout_s=6)  # a dead process is no proof
    assert code is Code.GENERIC
    assert "nothing proves" in reason or "did not come in time" in reason
    assert act(pair[1], "stop") == (Code.SUCCESS, "")
    assert act(pair[1], "start") == (Code.SUCCESS, "")
    assert act(pair[2], "promote") == (Code.SUCCESS, "")


def test_one_that_hangs_is_not_taken_for_stopped_and_stop_ends_it(pair: Pair) -> None:
    started(pair)
    os.kill(pair[1].pid, signal.SIGSTOP)
    code, reason = act(pair[1], "monitor")
    assert code is Code.GENERIC
    assert "does not answer" in reason
    assert act(pair[1], "stop", timeout_s=15) == (Code.SUCCESS, "")
    assert act(pair[1], "monitor")[0] is Code.NOT_RUNNING


@pytest.mark.parametrize("promoted", [True, False])
def test_a_promoted_node_that_may_not_write_has_failed(pair: Pair, promoted: bool) -> None:
    """Both were declared dead and both lived: split brain, seen at the node itself."""
    started(pair)
    if promoted:
        act(pair[1], "promote")
    door = pair.folder / "p1"
    door.rename(pair.folder / "away")
    stopped = pair[2].pid
    os.kill(stopped, signal.SIGSTOP)
    try:
        pair.until(1, "cut")
        pair[1].dmctl("takeover", "vol0", "--fenced")
        if not promoted:
            pair[1].dmctl("demote", "vol0")
    finally:
        os.kill(stopped, signal.SIGCONT)
    pair.until(2, "cut")
    pair[2].dmctl("takeover", "vol0", "--fenced")
    (pair.folder / "away").rename(door)
    pair.until(1, "split-brain")
    code, reason = act(pair[1], "monitor")
    assert code is (Code.FAILED_PROMOTED if promoted else Code.GENERIC)
    assert "split-brain" in reason


def test_notify_waits_for_a_node_that_comes_up(pair: Pair) -> None:
    assert act(pair[2], "start")[0] is Code.SUCCESS
    meta = {
        "notify_type": "pre", "notify_operation": "promote",
        "notify_slave_uname": "a b", "notify_promote_uname": "b",
    }  # fmt: skip
    alone = meta | {"notify_slave_uname": "b"}
    assert act(pair[2], "notify", meta=alone, timeout_s=60)[0] is Code.SUCCESS
    assert pair.partner(2)["state"] == "waiting"  # nobody else to wait for
    with ThreadPoolExecutor() as aside:
        waiting = aside.submit(act, pair[2], "notify", meta=meta)
        pair[1].start()
        assert waiting.result()[0] is Code.SUCCESS
    assert pair.partner(2)["state"] == "paired"
    assert act(pair[2], "notify")[0] is Code.SUCCESS


def test_what_does_not_fit_is_refused_with_a_reason(pair: Pair) -> None:
    node = pair[1]
    for code, text, changed in (
        (Code.CONFIGURED, "names no volume", {"volume": ""}),
        (Code.CONFIGURED, "names no volume", {"volume": "-v"}),
        (Code.INSTALLED, "is not a program", {"dmctl": "/nowhere/dmctl"}),
        (Code.INSTALLED, "no volume 'vol1'", {"volume": "vol1"}),
    ):
        for action in ("validate-all", "start"):
            found, reason = act(node, action, **changed)
            assert (found, text in reason) == (code, True), (action, reason)
    file = next((node.folder / "etc").rglob("vol0.toml"))
    good = file.read_text()
    for wrong, text in (('"always"', "on-promote"), ('"never"', "is wrong")):
        file.write_text(good.replace('"on-promote"', wrong))
        code, reason = act(node, "validate-all")
        assert (code, text in reason) == (Code.ARGS, True), reason
    assert act(node, "migrate_to")[0] is Code.UNIMPLEMENTED


def test_meta_data_is_valid_and_names_what_the_agent_reads() -> None:
    said = subprocess.run([AGENT, "meta-data"], capture_output=True, text=True, check=True).stdout
    subprocess.run(
        ["xmllint", "--noout", "--dtdvalid", "/usr/share/resource-agents/ra-api-1.dtd", "-"],
        input=said, text=True, check=True,
    )  # fmt: skip
    text = AGENT.read_text()
    for name in ("volume", "config_dir", "run_dir", "dmctl"):
        assert f'<parameter name="{name}"' in said
        assert f"OCF_RESKEY_{name}:=" in text


def test_ocf_tester_is_content(pair: Pair) -> None:
    pair.folder.chmod(0o755)
    agent = shutil.copy(AGENT, pair.folder / "volume")  # where anybody may read it
    pair[2].dmctl_process("start", "vol0")
    options = [word for item in parameters(pair[1]).items() for word in ("-o", "=".join(item))]
    done = subprocess.run(
        ["ocf-tester", "-n", "vol0", *options, str(agent)],
        env={**os.environ, "OCF_ROOT": "/usr/lib/ocf"},
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed all tests" in done.stdout
