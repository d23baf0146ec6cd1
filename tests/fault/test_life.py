"""Starting, stopping, dying, and the first copy: what is copied, and that it is no more."""

from __future__ import annotations

import json
import random
import select
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.support import rawnbd
from tests.support.loops import sparse_file
from tests.support.nbdpeers import nbdkit, need
from tests.support.volumes import KIB, MIB, Volume, noise, run

SIZE = 32 * MIB
FAST = ["--era-interval", "100ms"]
SKIP = ["--initial-sync", "skip", *FAST]


@contextmanager
def started(folder: Path, *options: str) -> Iterator[Volume]:
    with Volume(folder, SIZE, options=[*SKIP, *options]) as volume:
        volume.create()
        volume.start()
        yield volume


def end_equal(volume: Volume) -> None:
    volume.wait_in_sync()
    volume.stop()
    assert volume.recorded() == set()
    assert volume.differing() == set()


# -- dying, and coming back ---------------------------------------------------------------


@contextmanager
def stubborn_host(volume: Volume) -> Iterator[Path]:
    """The socket of a foreign client that connects again and sends again what was not answered."""
    server = nbdkit(
        volume.folder,
        *("--filter=retry", "nbd", f"socket={volume.socket}", f"export={volume.name}"),
        *("retries=60", "retry-delay=1", "retry-exponential=no"),
    )
    with server as proxy:
        yield Path(proxy.path)


def fio(socket_path: Path, *options: str) -> subprocess.Popen[str]:
    need("fio")
    command = ["fio", "--name=host", "--ioengine=nbd", f"--uri=nbd+unix://?socket={socket_path}"]
    command += ["--thread=1", "--output-format=json", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=socket_path.parent,  # where it leaves its state files
    )


def verified(process: subprocess.Popen[str], timeout_s: float = 100) -> dict[str, int]:
    """What a fio job that checks its data counts; fails with what fio said."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, output
    (job,) = json.loads(output[output.index("{\n") :])["jobs"]
    assert job["error"] == 0, output
    return {side: job[side]["total_ios"] for side in ("read", "write")}


LOAD = ["--rw=randwrite", "--bs=4k-32k", "--size=16m", "--iodepth=8", "--rate=12m"]
CHECKED = [*LOAD, "--loops=3", "--fsync=64", "--verify=crc32c"]


def test_case_04_after_kill_9_under_load_hosts_see_a_delay_and_their_data(short_path: Path) -> None:
    """A host that connects again gets no error; the long version is `make soak`."""
    with started(short_path) as volume, stubborn_host(volume) as host:
        job = fio(host, *CHECKED)
        try:
            for _ in range(2):
                volume.until(lambda status: status["writes_total"] >= 300)
                volume.kill()
                assert volume.differing() <= volume.recorded()
                volume.start()
                assert recovery_of(volume)["reason"] == "crash"
        except BaseException:
            job.kill()
            raise
        counts = verified(job)
        assert counts["write"] > 600
        assert counts["read"] > 600
        end_equal(volume)


def test_case_05_a_stop_and_a_start_under_load(short_path: Path) -> None:
    """What an upgrade does: the process ends in order and another one takes its place."""
    with started(short_path) as volume, stubborn_host(volume) as host:
        job = fio(host, *CHECKED)
        try:
            volume.until(lambda status: status["writes_total"] >= 300)
            volume.stop()
            assert volume.recorded() == set()
            assert volume.differing() == set()
            volume.start()
            assert volume.ask("status")["last_recovery"]["reason"] == "clean"
            volume.until(lambda status: status["writes_total"] >= 300)
            volume.stop("--now")
            assert volume.differing() <= volume.recorded()
            volume.start()
        except BaseException:
            job.kill()
            raise
        verified(job)
        end_equal(volume)


def test_case_05_a_clean_restart_copies_nothing(short_path: Path) -> None:
    with started(short_path) as volume:
        volume.write(MIB, noise(1, 3 * MIB))
        volume.stop()
        assert volume.status()["record_extents"] == 0
        volume.start()
        figures = volume.ask("status")
        assert figures["state"] == "in-sync"
        recovery = figures["last_recovery"]
        assert recovery["reason"] == "clean"
        assert (recovery["extents"], recovery["bytes_total"], recovery["bytes_copied"]) == (0, 0, 0)
        assert volume.ask("status")["copied_bytes_total"] == 0
        volume.stop()


def test_case_05_a_stop_copies_what_is_left_and_a_stop_now_leaves_it(short_path: Path) -> None:
    with started(short_path) as volume:
        volume.ask("set", copy_rate="1MiB")  # after the first 4 MiB, which are free
        volume.write(0, noise(1, 12 * MIB))
        answer = json.loads(volume.dmctl("--json", "stop", volume.name, "--now"))["volumes"][0]
        assert answer["clean"] is False
        left = volume.recorded()
        assert left
        assert volume.differing() <= left
        assert answer["record_extents"] == len(left)
        assert volume.status()["state"] == "stopped"
        assert volume.status()["record_extents"] == len(left)
        volume.start()
        assert volume.ask("status")["state"] == "resyncing"
        volume.ask("set", copy_rate="none")
        answer = json.loads(volume.dmctl("--json", "stop", volume.name))["volumes"][0]
        assert answer["clean"] is True
        assert volume.recorded() == set()
        assert volume.differing() == set()


def test_case_05_a_stop_that_copies_can_be_hurried(short_path: Path) -> None:
    with started(short_path) as volume:
        volume.ask("set", copy_rate="64KiB")
        volume.write(0, noise(1, 12 * MIB))
        slow = threading.Thread(target=volume.dmctl_process, args=("stop", volume.name))
        with volume.events() as events:
            slow.start()
            volume.until(lambda status: not volume.socket.exists())
            volume.stop("--now")
            assert events.wait("stopped")["clean"] is False
        slow.join()
        assert volume.differing() <= volume.recorded()


# -- the first copy -----------------------------------------------------------------------


def different_sides(volume: Volume, differing_mib: int) -> None:
    """Primary with data; the secondary lacks the last so many MiB and has something else."""
    volume.make_media()
    data = noise(1, SIZE)
    volume.primary.write_bytes(data)
    volume.secondary.write_bytes(data[: SIZE - differing_mib * MIB] + noise(2, differing_mib * MIB))


def recovery_of(volume: Volume) -> dict[str, int]:
    with volume.events() as events:
        return events.wait("recovery-finished")


def test_the_first_copy_in_full(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=["--initial-sync", "full", *FAST]) as volume:
        different_sides(volume, 4)
        volume.create()
        assert len(volume.recorded()) == SIZE // MIB
        volume.start()
        recovery = recovery_of(volume)
        assert recovery["reason"] == "initial"
        assert recovery["bytes_total"] == recovery["bytes_copied"] == SIZE
        figures = volume.ask("status")
        assert figures["sent_bytes_total"] == SIZE
        end_equal(volume)


def test_the_first_copy_by_checksum_sends_what_differs(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=["--initial-sync", "checksum", *FAST]) as volume:
        different_sides(volume, 4)
        volume.create()
        volume.start()
        recovery = recovery_of(volume)
        assert recovery["reason"] == "initial"
        assert recovery["bytes_total"] == SIZE
        assert volume.ask("status")["sent_bytes_total"] == 4 * MIB
        end_equal(volume)


def test_no_first_copy_is_refused_where_the_sides_differ(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        different_sides(volume, 4)
        error = volume.refused(*volume.create_command())
        assert error["exit_status"] == 101
        assert "differ near byte" in error["message"]
        different_sides(volume, 0)
        volume.create()
        assert volume.recorded() == set()
        volume.start()
        volume.wait_in_sync()
        assert volume.ask("status")["copied_bytes_total"] == 0
        volume.stop()


def test_the_first_copy_goes_on_after_kill_9_where_it_was(short_path: Path) -> None:
    """Killed twice, and it is still the first copy that goes on, with what is left of it."""
    with Volume(short_path, SIZE, options=["--initial-sync", "full", *FAST]) as volume:
        different_sides(volume, 32)
        # Predictions would fill the record of so small a volume again.
        volume.create("--copy-rate", "1MiB", "--predictor", "lru")
        left = SIZE // MIB
        for _ in range(2):
            volume.start()
            before = left
            # What was copied leaves the record every few seconds, the stored one a little later.
            volume.until(
                lambda status: (
                    status["record_extents"] <= before - 4 and status["record_clears_total"] >= 1
                )
            )
            # Acknowledged after a write of the page that comes after that one.
            volume.write(0, noise(7, 4 * KIB))
            volume.kill()
            recorded = volume.recorded()
            assert volume.differing() <= recorded
            left = len(recorded)
            assert left < before
        volume.start()
        assert volume.ask("status")["state"] == "resyncing"
        volume.ask("set", copy_rate="none")
        recovery = recovery_of(volume)
        assert recovery["reason"] == "initial"
        assert recovery["bytes_total"] == left * MIB
        assert recovery["bytes_copied"] <= left * MIB
        assert volume.ask("status")["copied_bytes_total"] == left * MIB
        volume.wait_in_sync()
        volume.kill()
        volume.start()
        assert recovery_of(volume)["reason"] != "initial", "who was in sync stays so"
        end_equal(volume)


# -- what may be asked of it --------------------------------------------------------------


def test_pause_and_resume(short_path: Path) -> None:
    with started(short_path) as volume:
        volume.dmctl("pause", volume.name)
        assert volume.status()["state"] == "paused"
        volume.write(4 * MIB, noise(1, 6 * MIB))
        figures = volume.until(lambda status: status["lag_seconds"] > 0.3)
        assert figures["copied_bytes_total"] == 0
        assert figures["dirty_bytes"] == 6 * MIB
        assert set(range(4, 10)) <= volume.recorded()
        for refused in (
            ("resync", volume.name),
            ("wait", volume.name, "--for", "in-sync"),
            ("verify", volume.name, "--repair"),
        ):
            error = volume.refused(*refused)
            assert error["exit_status"] == 14
            assert error["hint"] == f"dmctl resume {volume.name}"
        assert volume.dmctl_process("status", "--check").returncode == 101
        before = volume.secondary.read_bytes()
        for end in (volume.kill, volume.stop, partial(volume.stop, "--now")):
            end()
            assert volume.secondary.read_bytes() == before
            assert volume.differing() == set(range(4, 10)) <= volume.recorded()
            assert volume.status()["paused"] is True
            said = volume.dmctl_process("start", volume.name).stderr
            assert "copying is paused, 'dmctl resume vol0' ends that" in said
            assert volume.status()["state"] == "paused"
        stopped = volume.dmctl_process("stop", volume.name)
        assert "it stays paused" in stopped.stderr
        volume.start()
        volume.dmctl("resume", volume.name)
        end_equal(volume)


def test_a_kill_at_any_moment_of_a_pause_or_a_resume(short_path: Path) -> None:
    """The next start is as the answer said; without an answer it is either."""
    with started(short_path) as volume:
        wanted = random.Random(7)
        for round_ in range(8):
            verb, paused = (("pause", True), ("resume", False))[round_ % 2]
            with volume.control() as control:
                control.send(verb)
                answered = bool(select.select([control], [], [], wanted.random() / 300)[0])
                volume.kill()
            found = volume.status()["paused"]
            assert found is paused or not answered
            volume.start()
            assert volume.ask("status")["paused"] is found
        volume.dmctl("resume", volume.name)
        end_equal(volume)


def test_settings_take_effect_at_once_and_stay(short_path: Path) -> None:
    with started(short_path) as volume, volume.events() as events:
        volume.dmctl("set", volume.name, "copy-rate=256KiB", "era-interval=200ms")
        events.wait("settings-changed")
        volume.write(0, noise(1, 10 * MIB))
        # A bucket of 4 MiB is full at first.
        slow = volume.until(lambda status: status["copied_bytes_total"] >= 4 * MIB)
        assert slow["dirty_bytes"] > 0
        assert volume.refused("set", volume.name, "copy-rate=fast")["exit_status"] == 2
        assert volume.refused("set", volume.name, "secondary=/dev/null")["exit_status"] == 2
        volume.stop("--now")
        assert "256KiB" in volume.dmctl("config", "show", volume.name)
        volume.start()
        volume.dmctl("set", volume.name, "copy-rate=none", "predictor=lru")
        end_equal(volume)


def test_a_resync_by_checksum_sends_what_differs(short_path: Path) -> None:
    """What is in the record is read on both sides; only what differs costs the link."""
    with started(short_path) as volume:
        volume.write(0, noise(1, 8 * MIB))
        volume.wait_in_sync()
        sent = volume.ask("status")["sent_bytes_total"]
        with volume.secondary.open("r+b") as secondary:
            secondary.seek(5 * MIB)
            secondary.write(noise(2, 128 * KIB))
        answer = json.loads(volume.dmctl("--json", "resync", volume.name, "--checksum"))
        assert answer["volumes"][0]["extents"] >= 8
        volume.wait_in_sync()
        assert volume.ask("status")["sent_bytes_total"] == sent + 128 * KIB
        volume.dmctl("resync", "--all")
        assert volume.ask("status")["sent_bytes_total"] == sent + 128 * KIB
        end_equal(volume)


def test_a_host_that_only_trims_and_zeroes_is_mirrored(short_path: Path) -> None:
    with started(short_path) as volume:
        volume.write(0, noise(1, 8 * MIB))
        volume.wait_in_sync()
        with volume.host() as host:
            host.call(rawnbd.TRIM, MIB, 3 * MIB)
            host.call(rawnbd.WRITE_ZEROES, 5 * MIB + 4096, MIB)
            host.disconnect()
        end_equal(volume)
        assert volume.secondary.stat().st_blocks * 512 < 8 * MIB


def test_a_file_system_survives_a_crash_of_its_volume(short_path: Path) -> None:
    """An ext4 image written through a foreign client; a kill; its copy is clean for fsck."""
    image = sparse_file(short_path / "image", SIZE)
    for program in ("mkfs.ext4", "e2fsck", "nbdcopy"):
        need(program)
    run(["mkfs.ext4", "-q", "-d", str(Path(__file__).parent), str(image)])
    with started(short_path) as volume:
        run(["nbdcopy", "--flush", "--allocated", str(image), volume.uri])
        volume.kill()
        volume.start()
        end_equal(volume)
        run(["e2fsck", "-f", "-n", str(volume.secondary)])
        assert volume.secondary.read_bytes() == image.read_bytes()
